"""A clip on disk while it grows: frames, their hash and the record, kept in step chunk by chunk.

They are written in a thread, so that the next chunk is made meanwhile. Signals are for the main thread: a stop there
waits for what was handed over.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from causal_forcing.runtime import console
from causal_forcing.runtime.errors import CausalForcingError, OutputError
from causal_forcing.runtime.frame_sink import FrameSink, open_sink
from causal_forcing.runtime.interruption import held_back
from causal_forcing.runtime.record import ClipRecord, FrameHash, record_path

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class ClipWriter:
    """Write a clip and its record; both are whole after every chunk, whatever ends the program.

    Nothing on disk is touched before the first chunk.

    Args:
        record: Describes the clip; its outcome is filled in. Without an output it gets a free name.
        output_dir: Folder of clips without an output; it is made if it is not there.
        slug: What free names are made of.
    """

    def __init__(self, record: ClipRecord, *, output_dir: Path, slug: str) -> None:
        self._record = record
        self._output_dir = output_dir
        self._slug = slug
        self._hash = FrameHash()
        self._sink: FrameSink | None = None
        self._writing = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="clip-writer")
        self._handed_over: Future[None] | None = None

    def add(
        self,
        index: int,
        frames: npt.NDArray[np.uint8],
        *,
        timing: Mapping[str, float | None] | None = None,
        memory: Mapping[str, int] | None = None,
    ) -> None:
        """Hand over a chunk to be written, with the record; waits until the one before is.

        Args:
            index: Position of the chunk in the clip.
            frames: [T, H, W, 3]; left alone from here on.
            timing: What the record is to say of the time so far.
            memory: Likewise, of memory.

        Raises:
            OutputError: The chunk before, or its record, could not be written.
        """
        if self._handed_over is not None:
            self._handed_over.result()
        with held_back():
            self._handed_over = self._thread.submit(self._write, index, frames, timing or {}, memory or {})

    def _write(
        self,
        index: int,
        frames: npt.NDArray[np.uint8],
        timing: Mapping[str, float | None],
        memory: Mapping[str, int],
    ) -> None:
        record = self._record
        with self._writing:
            if self._sink is None:
                record.output = record.output or _claim_name(self._output_dir, self._slug)
                self._sink = open_sink(record.output, fps=record.fps)
            self._sink.write(frames)
            self._hash.update(frames)
            record.blocks, record.frames = index + 1, self._sink.frames_written
            record.frames_sha256 = self._hash.hexdigest()
            record.timing |= timing
            record.memory |= memory
            record.write(record_path(record.output))

    def abandon(self, status: str, *, timeout_s: float = 1.0) -> None:
        """Close the clip and its record from another thread, where the one that writes them is blocked elsewhere.

        Args:
            status: What the record is to say.
            timeout_s: How long to wait for a chunk that is being written; after that both stay as they are.
        """
        if not self._writing.acquire(timeout=timeout_s):
            return
        # The lock is kept: whoever wrote this is about to be ended.
        record = self._record
        if record.status != "running":  # it was closed as it should be
            return
        record.status = status
        if self._sink is not None:
            with contextlib.suppress(CausalForcingError):
                self._sink.close()
        self._finish_record(KeyboardInterrupt())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        record = self._record
        with held_back():
            self._thread.shutdown()  # once everything is written
            unwritten = None if self._handed_over is None else self._handed_over.exception()
            error = error or unwritten
            with self._writing:
                record.status = "complete" if error is None else "failed"
                if isinstance(error, KeyboardInterrupt):
                    record.status = "interrupted"
                try:
                    if self._sink is not None:
                        self._sink.close()
                except CausalForcingError:
                    record.status = "failed"
                    raise
                finally:
                    self._finish_record(error)
            if kind is None and unwritten is not None:
                raise unwritten

    def _finish_record(self, error: BaseException | None) -> None:
        record = self._record
        if not record.frames:
            return
        # A record that cannot be written must not hide why the clip ended.
        with contextlib.nullcontext() if error is None else contextlib.suppress(OutputError):
            record.write(record_path(record.output))
        if error is not None and not isinstance(error, OutputError):  # which says itself what is kept
            console.narrate(f"kept the clip so far: {record.frames} frames in {record.output}")


def _claim_name(folder: Path, slug: str) -> str:
    """Create an empty file with a name that no clip and no record has, also with other programs at it; its name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))):
            path = folder / f"{slug}{suffix}.mp4"
            if path.with_suffix(".json").exists():
                continue
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                return str(path)
    except OSError as error:
        raise OutputError(f"cannot write into {folder}: {error.strerror}; choose another --output-dir") from error
    raise AssertionError("the numbers do not end")
