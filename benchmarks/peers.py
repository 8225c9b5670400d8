"""What makes clips in one process: the engine, and peers to compare it with, each opened, warmed up and measured."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from benchmarks.clips import Clip

PEERS = ("eager", "compile", "compile-graph", "upstream")
"""Peers by name: this project's torch modules as they are, through torch.compile, and the same in CUDA graphs; and
upstream's own code."""


class ClipMaker(Protocol):
    """Makes the same clip again and again."""

    def clip(self, *, staged: bool) -> Clip:
        """Make a clip, with its stages timed or without."""

    def facts(self) -> dict[str, Any]:
        """Return what else is reported of it."""

    def first_latents(self) -> torch.Tensor | None:
        """Return the first chunk's latents, fp32 on the host, where they can be held to another's."""

    def close(self) -> None:
        """Free everything."""


@dataclass(slots=True)
class Runner:
    """One of those that are compared: how it is opened, and what it took so far."""

    name: str
    """`engine`, or a peer's name."""
    about: str
    """What it is, in a few words."""
    precision: str
    """Type of its activations."""
    open: Callable[[], ClipMaker]
    """Makes it; may take minutes."""
    device: torch.device
    """Where it runs."""
    maker: ClipMaker | None = None
    """It, while it is open."""
    plain: list[Clip] = field(default_factory=list)
    """Clips without stages timed."""
    staged: list[Clip] = field(default_factory=list)
    """Clips with stages timed."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else is reported: seconds of opening, memory."""
    latents: torch.Tensor | None = None
    """Of its first chunk."""
    error: str | None = None
    """Why there is nothing to report."""

    def start(self, warm_ups: int) -> None:
        """Open it and make clips that do not count."""
        print(f"opening {self.name}: {self.about}", file=sys.stderr, flush=True)
        before = _allocated(self.device)
        started_s = time.perf_counter()
        self.maker = self.open()
        self.facts["open_s"] = round(time.perf_counter() - started_s, 1)
        self.facts["warm_up_clip_s"] = []
        for _ in range(warm_ups):
            clip = self._make(staged=False)
            self.facts["warm_up_clip_s"].append(round(clip.total_ms / 1000, 2))
        self.facts |= self.maker.facts()
        self.latents = self.maker.first_latents()
        print(f"{self.name}: opened in {self.facts['open_s']} s, {self.facts['warm_up_clip_s']}", file=sys.stderr)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            self.facts["resident_bytes"] = _allocated(self.device) - before
            self.facts["transient_bytes"] = 0

    def measure(self, *, staged: bool) -> None:
        """Make a clip that counts."""
        before = _allocated(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        (self.staged if staged else self.plain).append(self._make(staged=staged))
        if self.device.type == "cuda":
            transient = torch.cuda.max_memory_allocated(self.device) - before
            self.facts["transient_bytes"] = max(self.facts["transient_bytes"], transient)
            self.facts["torch_peak_bytes"] = self.facts["resident_bytes"] + self.facts["transient_bytes"]

    def close(self) -> None:
        """Free it; what it took stays."""
        if self.maker is not None:
            self.maker.close()
            self.maker = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def fail(self, error: Exception) -> None:
        """Note why it cannot be measured, and free it."""
        traceback.print_exception(error)
        self.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self.plain.clear()
        self.staged.clear()
        try:
            self.close()
        except Exception:  # it is half open: what can be freed is freed with it
            self.maker = None

    def _make(self, *, staged: bool) -> Clip:
        assert self.maker is not None, "it is opened before it makes clips"
        return self.maker.clip(staged=staged)


def run_interleaved(runners: list[Runner], *, warm_ups: int, repeats: int, staged_repeats: int) -> None:
    """Measure all in turns, A B A B, so that a clock that drifts does so for each.

    One that does not fit into memory beside the others is measured alone, after them; one that fails is left out.
    """
    alone = []
    for runner in runners:
        try:
            runner.start(warm_ups)
        except torch.OutOfMemoryError:
            runner.close()
            alone.append(runner)
        except Exception as error:
            runner.fail(error)
    together = [runner for runner in runners if runner.maker is not None]
    _run_rounds(together, repeats=repeats, staged_repeats=staged_repeats)
    alone += [runner for runner in together if runner.error and "OutOfMemory" in runner.error]
    for runner in together:
        runner.facts["interleaved"] = runner not in alone
        runner.close()
    for runner in alone:
        runner.error, runner.facts = None, {"interleaved": False}
        try:
            runner.start(warm_ups)
        except Exception as error:
            runner.fail(error)
        else:
            _run_rounds([runner], repeats=repeats, staged_repeats=staged_repeats)
        runner.close()


def _run_rounds(runners: list[Runner], *, repeats: int, staged_repeats: int) -> None:
    for staged in (False,) * repeats + (True,) * staged_repeats:
        for runner in runners:
            if runner.error is None:
                try:
                    runner.measure(staged=staged)
                except Exception as error:
                    runner.fail(error)


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)
