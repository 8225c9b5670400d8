"""How far a clip is: what is shown of it while it is made, and the rates that its record keeps."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from causal_forcing.runtime import console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class GenerationProgress:
    """Show how far a clip is: one live line on a terminal, a plain line now and then elsewhere.

    Args:
        total_chunks: Chunks of the clip; None if it is endless.
        clock: Monotonic time in seconds.
    """

    def __init__(self, total_chunks: int | None, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._total_chunks = total_chunks
        self._clock = clock
        self._start_s = clock()
        self._first_chunk_s = self._last_chunk_s = 0.0
        self._first_chunk_frames = 0
        self._chunks = self._frames = 0
        self._printed_s, self._printed_chunks = -math.inf, 0
        self._live: Progress | None = None
        self._task: TaskID | None = None

    @property
    def frames(self) -> int:
        """Frames so far."""
        return self._frames

    @property
    def first_frame_s(self) -> float | None:
        """Seconds from the start to the first chunk's frames; None before."""
        return self._first_chunk_s - self._start_s if self._chunks else None

    @property
    def fps(self) -> float | None:
        """Steady rate: frames after the first chunk over the time since it; None before the second chunk."""
        elapsed_s = self._last_chunk_s - self._first_chunk_s
        return (self._frames - self._first_chunk_frames) / elapsed_s if elapsed_s > 0 else None

    @property
    def eta_s(self) -> float | None:
        """Seconds to go at the steady rate; None while unknown, or if the clip is endless."""
        if self._total_chunks is None or self._chunks < 2:
            return None
        per_chunk_s = (self._last_chunk_s - self._first_chunk_s) / (self._chunks - 1)
        return per_chunk_s * max(0, self._total_chunks - self._chunks)

    def advance(self, frames: int) -> None:
        """Count one chunk that gave that many frames."""
        now_s = self._last_chunk_s = self._clock()
        self._chunks += 1
        self._frames += frames
        if self._chunks == 1:
            self._first_chunk_s, self._first_chunk_frames = now_s, frames
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=self._chunks, status=self._status())
        elif now_s - self._printed_s >= console.PLAIN_INTERVAL_S:
            self._print_plain(now_s)

    def __enter__(self) -> Self:
        self._start_s = self._clock()
        if console.is_terminal(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn
            from rich.table import Column

            self._live = Progress(
                BarColumn(bar_width=12),
                TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True)),
                console=Console(file=sys.stderr),
                redirect_stdout=False,  # results go to stdout even while the line is live
            )
            self._task = self._live.add_task("", total=self._total_chunks, status=self._status())
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._chunks > self._printed_chunks:
            self._print_plain(self._last_chunk_s)

    def _print_plain(self, now_s: float) -> None:
        self._printed_s, self._printed_chunks = now_s, self._chunks
        console.narrate(self._status())

    def _status(self) -> str:
        of = "" if self._total_chunks is None else f"/{self._total_chunks}"
        parts = [f"chunk {self._chunks}{of}", f"{self._frames} frames"]
        if self.fps is not None:
            parts.append(f"{self.fps:.1f} fps")
        if self.first_frame_s is not None:
            parts.append(f"first frame {self.first_frame_s:.2f} s")
        if self.eta_s:
            minutes, seconds = divmod(round(self.eta_s), 60)
            parts.append(f"ETA {minutes}:{seconds:02d}")
        return ", ".join(parts)
