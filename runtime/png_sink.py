"""A folder of PNGs, one a frame, each of which appears complete or not at all."""

from __future__ import annotations

import contextlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from causal_forcing.runtime.frame_output import check_folder, check_frames, output_error

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_PNG_THREADS = min(4, os.cpu_count() or 1)


class PngSink:
    """Write `frame_00000.png`, `frame_00001.png`, … into a folder.

    Each file appears complete or not at all. The folder is created at the first frame.

    Args:
        folder: The folder; its parent must exist, and it may not hold frames of an earlier clip, which would be taken
            for this clip's.

    Raises:
        OutputError: The folder cannot be written; raised up front where that can be known.
    """

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        self._folder = folder
        self._frames_written = 0

    @property
    def frames_written(self) -> int:
        """Frames taken so far."""
        return self._frames_written

    def write(self, frames: npt.NDArray[np.uint8]) -> None:
        """Write [T, H, W, 3] uint8 RGB frames, one file each.

        Raises:
            OutputError: A file cannot be written; the message says how many frames are safe.
        """
        check_frames(frames)
        part = self._folder / ".frame.png.part"
        try:
            self._folder.mkdir(exist_ok=True)
            # A frame takes 20 to 40 ms to compress, a GPU less to make.
            with ThreadPoolExecutor(_PNG_THREADS) as pool:
                for content in pool.map(_png, frames):
                    part.write_bytes(content)
                    part.replace(self._folder / f"frame_{self._frames_written:05d}.png")
                    self._frames_written += 1
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise output_error(self._folder, error, self._frames_written) from error

    def close(self) -> None:
        """Do nothing: every frame is already complete."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _png(frame: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    # Level 1: a third of the time of the default for files a tenth larger.
    Image.fromarray(frame).save(content, format="PNG", compress_level=1)
    return content.getvalue()
