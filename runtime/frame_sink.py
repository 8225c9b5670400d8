"""Where frames go, an mp4 or a folder of PNGs: what both kinds of sink do, and which one a path asks for.

A sink takes frames chunk by chunk and puts them on disk at once.

    with open_sink(Path("clip.mp4"), fps=16) as sink:
        for frames in session:          # [T, H, W, 3] uint8 RGB
            sink.write(frames)
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from causal_forcing.runtime.frame_output import is_frame_folder
from causal_forcing.runtime.mp4_sink import Mp4Sink
from causal_forcing.runtime.png_sink import PngSink

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class FrameSink(Protocol):
    """A place that keeps frames; a context manager that closes itself."""

    @property
    def frames_written(self) -> int:
        """Frames taken so far."""

    def write(self, frames: npt.NDArray[np.uint8]) -> None:
        """Take [T, H, W, 3] uint8 RGB frames and put them on disk before returning."""

    def close(self) -> None:
        """Finish the result; closing twice is harmless."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_sink(path: Path | str, *, fps: int) -> FrameSink:
    """Choose the sink by what the path looks like; nothing is created yet.

    Args:
        path: `*.mp4` for a video; a folder that exists, a name without a suffix or with a trailing slash for PNGs.
        fps: Playback rate of a video.

    Raises:
        UsageError: Another suffix.
        OutputError: The result cannot be written there.
    """
    is_folder = is_frame_folder(path)
    return PngSink(Path(path)) if is_folder else Mp4Sink(Path(path), fps)
