"""Clocks of a device, and engines that leave marks on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from causal_forcing.runtime.engine import Engine

STAGES = (
    ("dit_context_step", "context_and_denoise"),
    ("dit_context", "context"),
    ("dit_", "denoise"),
    ("vae_decoder", "decode"),
    ("vae_encoder", "encode"),
    ("vae_", "decode"),
    ("tae", "decode"),
    ("prompt_kv", "prompt"),
    ("text_encoder", "text"),
    ("timestep_modulation", "modulation"),
)
"""How networks' names begin, and the stage they belong to; the first that fits counts."""

DIT_STAGES = ("denoise", "context", "context_and_denoise")
"""Stages that are passes of the DiT."""

COLD_BYTES = 256 * 2**20
"""Written before a call that shall find nothing in the GPU's caches."""


def stage_of(network: str) -> str:
    """Return the stage that a network belongs to."""
    return next((stage for prefix, stage in STAGES if network.startswith(prefix)), "other")


class Mark(Protocol):
    """A point in time of a device."""

    def elapsed_ms(self, later: Any) -> float:
        """Return the milliseconds from this mark to a later one; a GPU must have passed both."""


class HostMark:
    """A point in time of the host: a CPU's work is done when its call returns."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_ms(self, later: HostMark) -> float:
        """See `Mark.elapsed_ms`."""
        return 1000 * (later.seconds - self.seconds)


class StreamMark:
    """A point in the current CUDA stream, whichever that is."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record()

    def elapsed_ms(self, later: StreamMark) -> float:
        """See `Mark.elapsed_ms`."""
        return float(self.event.elapsed_time(later.event))


def marker(device: torch.device) -> Callable[[], Mark]:
    """Return what makes the marks of a device."""
    return StreamMark if device.type == "cuda" else HostMark


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(slots=True)
class CallLog:
    """Calls of engines with their marks, while it is open."""

    mark: Callable[[], Mark]
    """Makes marks."""
    is_open: bool = False
    """Whether calls are noted."""
    calls: list[tuple[str, Mark, Mark]] = field(default_factory=list)
    """Name, begin and end."""

    def run(self, name: str, call: Callable[[], Any]) -> Any:
        """Make a call, between marks where the log is open."""
        if not self.is_open:
            return call()
        begin = self.mark()
        result = call()
        self.calls.append((name, begin, self.mark()))
        return result

    def take(self) -> list[tuple[str, Mark, Mark]]:
        """Return the calls since the last time, and forget them."""
        calls, self.calls = self.calls, []
        return calls


class TimedEngine:
    """An engine whose calls are logged; all else is the engine's own.

    Args:
        engine: The engine.
        log: Where its calls go.
    """

    def __init__(self, engine: Engine, log: CallLog) -> None:
        self.spec = engine.spec
        self._engine, self._log = engine, log

    def bind(self, io_tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Engine.bind`."""
        self._engine.bind(io_tensors)

    def enqueue(self) -> None:
        """See `Engine.enqueue`."""
        self._log.run(self.spec.name, self._engine.enqueue)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def time_calls(
    call: Callable[[], object], device: torch.device, *, warm_ups: int, repeats: int, cold: bool = False
) -> list[float]:
    """Time calls one by one, without waiting for one before the next is given to the device.

    Args:
        call: What to time.
        device: Where it runs.
        warm_ups: Calls before those that are timed.
        repeats: Calls that are timed.
        cold: Whether each finds the GPU's caches full of something else, as in a pass of many layers.

    Returns:
        Milliseconds of each.
    """
    mark = marker(device)
    other = torch.empty(COLD_BYTES, dtype=torch.int8, device=device) if cold and device.type == "cuda" else None
    for _ in range(warm_ups):
        call()
    marks = []
    synchronize(device)
    for _ in range(repeats):
        if other is not None:
            other.zero_()
        begin = mark()
        call()
        marks.append((begin, mark()))
    synchronize(device)
    return [begin.elapsed_ms(end) for begin, end in marks]
