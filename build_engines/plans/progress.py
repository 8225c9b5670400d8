"""The builder's progress: the phases that TensorRT reports while it builds, as events and as the tree they describe."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Event = tuple[Any, ...]
"""("start", phase, parent or None, steps), ("step", phase, steps done) or ("finish", phase)."""


def make_monitor(trt: Any, emit: Callable[[Event], None], is_cancelled: Callable[[], bool]) -> Any:
    """Make a progress monitor of the module's class.

    Args:
        trt: The module.
        emit: Takes events, one at a time: TensorRT reports from several threads.
        is_cancelled: Asked after every step; a yes ends the build.
    """
    lock = threading.Lock()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with lock:
                emit(("start", phase_name, parent_phase, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            with lock:
                emit(("step", phase_name, step + 1))
            return not is_cancelled()

        def phase_finish(self, phase_name: str) -> None:
            with lock:
                emit(("finish", phase_name))

    return Monitor()


@dataclass(slots=True)
class Phase:
    """A phase that is under way."""

    name: str
    """What TensorRT calls it."""
    steps: int
    """How many steps it has."""
    done: int = 0
    """How many of them are through."""
    children: list[Phase] = field(default_factory=list)
    """Phases inside it."""


class ProgressTree:
    """The phases that are under way, from events."""

    def __init__(self) -> None:
        self._roots: list[Phase] = []

    def take(self, event: Event) -> None:
        """Bring the tree up to date with an event."""
        kind, name, *rest = event
        if kind == "start":
            parent, steps = rest
            siblings = next((phase.children for _, phase in self.rows() if phase.name == parent), self._roots)
            siblings.append(Phase(name, steps))
        elif kind == "step":
            for _, phase in self.rows():
                if phase.name == name:
                    phase.done = rest[0]
        else:
            self._remove(self._roots, name)

    def rows(self) -> Iterator[tuple[int, Phase]]:
        """Yield (depth, phase) of all phases, parents before their children."""
        yield from self._walk(self._roots, 0)

    def line(self) -> str:
        """Return the tree in one line: the way to the phase that began last."""
        path: list[Phase] = []
        phases = self._roots
        while phases:
            path.append(phases[-1])
            phases = phases[-1].children
        return " > ".join(f"{phase.name} {phase.done}/{phase.steps}" for phase in path)

    def _walk(self, phases: list[Phase], depth: int) -> Iterator[tuple[int, Phase]]:
        for phase in list(phases):
            yield depth, phase
            yield from self._walk(phase.children, depth + 1)

    def _remove(self, phases: list[Phase], name: str) -> None:
        for phase in list(phases):
            if phase.name == name:
                phases.remove(phase)
            else:
                self._remove(phase.children, name)
