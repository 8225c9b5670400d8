"""How far a build is: a line a network, and below it, on a terminal, TensorRT's own phases as a tree of bars."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from causal_forcing.build_engines.plans.progress import ProgressTree
from causal_forcing.runtime import console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

REDRAW_INTERVAL_S = 0.1
"""Least time between two drawings of the tree: small graphs report thousands of steps a second."""


class BuildDisplay:
    """Shows a build. `export` and `compile` go to the builder as its callbacks.

    Args:
        names: All networks of the build, in order.
        clock: Monotonic time in seconds.
    """

    def __init__(self, names: Sequence[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._names = names
        self._clock = clock
        self._compiling: str | None = None
        self._shown_s = 0.0
        self._live: Progress | None = None
        self._tasks: list[TaskID] = []

    def export(self, name: str) -> None:
        """Say that a network's export begins."""
        console.narrate(f"{self._position(name)} {name}")

    def compile(self, name: str, tree: ProgressTree) -> None:
        """Show how far the compiling of a network is."""
        now_s = self._clock()
        if name != self._compiling:
            self._compiling, self._shown_s = name, now_s
            console.narrate(f"{self._position(name)} {name}: compiling")
        interval_s = REDRAW_INTERVAL_S if self._live else console.PLAIN_INTERVAL_S
        if now_s - self._shown_s < interval_s:
            return
        self._shown_s = now_s
        if self._live is None:
            console.narrate(f"{self._position(name)} {name}: {tree.line()}")
        else:
            self._draw(self._live, tree)

    def __enter__(self) -> Self:
        if console.is_terminal(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
            # Results go to stdout even while bars are live; they vanish when the build is through.
            self._live = Progress(*columns, console=Console(file=sys.stderr), redirect_stdout=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def _position(self, name: str) -> str:
        return f"[{self._names.index(name) + 1}/{len(self._names)}]"

    def _draw(self, live: Progress, tree: ProgressTree) -> None:
        rows = list(tree.rows())
        while len(self._tasks) < len(rows):
            self._tasks.append(live.add_task("", total=1))
        for index, task in enumerate(self._tasks):
            if index < len(rows):
                depth, phase = rows[index]
                description = "  " * depth + phase.name
                live.update(task, description=description, total=phase.steps, completed=phase.done, visible=True)
            else:
                live.update(task, visible=False)
