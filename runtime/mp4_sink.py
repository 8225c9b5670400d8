"""An mp4 that can be played while it grows.

The mp4 is *fragmented* while it is recorded: every frame is a self-contained piece behind a header that is already
there, so a process killed at any moment leaves a playable file, at most one frame short. On `close` it becomes an
ordinary mp4 with a duration and an index.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from causal_forcing.runtime.errors import OutputError
from causal_forcing.runtime.frame_output import check_frames, check_writable, output_error

# PyAV costs 0.1 s to import: only a sink that is used pays for it, `--help` does not.
if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from av.container import OutputContainer
    from av.video.stream import VideoStream

_HYBRID_FLAGS = "hybrid_fragmented+frag_every_frame"
_FRAGMENTED_FLAGS = "empty_moov+default_base_moof+frag_every_frame"
_BT709 = 1
"""The code of BT.709 for primaries, transfer and matrix alike (ITU-T H.273)."""


class Mp4Sink:
    """Write an H.264 mp4 frame by frame.

    Nothing on disk is touched before the first frame. The muxer learns how long a frame lasts when the next one comes,
    so the file is always one frame behind `frames_written` until it is closed.

    Args:
        path: The file; one that exists is replaced at the first frame.
        fps: Playback rate.
        crf: Constant quality of H.264, lower is better; 18 is visually lossless.

    Raises:
        OutputError: The file cannot be written; raised up front where that can be known.
    """

    def __init__(self, path: Path, fps: int = 16, *, crf: int = 18) -> None:
        check_writable(path)
        self._path = path
        self._fps = fps
        self._crf = crf
        self._codec = _find_codec()
        self._frames_written = 0
        self._packets_muxed = 0
        self._bytes_safe = 0
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None
        self._closed = False

    @property
    def codec(self) -> str:
        """The encoder in use: `libx264`, or `mpeg4` where this FFmpeg was built without it."""
        return self._codec

    @property
    def frames_written(self) -> int:
        """Frames taken so far."""
        return self._frames_written

    def write(self, frames: npt.NDArray[np.uint8]) -> None:
        """Encode [T, H, W, 3] uint8 RGB frames and flush them to the file.

        Raises:
            OutputError: The file cannot be written; the message says how many frames are safe in it.
        """
        assert not self._closed, f"write to the closed sink of {self._path}"
        check_frames(frames)
        import av

        try:
            if self._stream is None:
                self._open(*frames.shape[1:3])
            for frame in frames:
                self._encode(frame)
        except (OSError, av.FFmpegError) as error:
            self._abandon()
            raise self._write_error(error) from error

    def close(self) -> None:
        """Write the index and the duration; without a frame, leave the disk as it was."""
        if self._closed:
            return
        self._closed = True
        if self._container is None or self._stream is None:
            return
        import av

        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
        except (OSError, av.FFmpegError) as error:
            self._abandon()
            raise self._write_error(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, height: int, width: int) -> None:
        import av
        from av.video.stream import VideoStream

        assert height % 2 == width % 2 == 0, f"frames of {height}×{width}, expected even sides for yuv420p"
        container = av.open(
            os.path.abspath(self._path),  # a relative name such as `a:b.mp4` would be read as a protocol
            "w",
            format="mp4",
            container_options={
                "movflags": _HYBRID_FLAGS if _can_finish_fragments() else _FRAGMENTED_FLAGS,
                "flush_packets": "1",
            },
        )
        stream = container.add_stream(self._codec, rate=self._fps)
        assert isinstance(stream, VideoStream), f"{self._codec} is no video codec"
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.gop_size = 2 * self._fps
        context.max_b_frames = 0
        context.thread_count = min(4, os.cpu_count() or 1)  # more only cuts a 480-line frame into thinner slices
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        if self._codec == "libx264":
            # Without look-ahead and B-frames a frame leaves the encoder in the call that brought it.
            context.options = {"crf": str(self._crf), "preset": "veryfast", "tune": "zerolatency"}
        else:
            context.options = {"qmin": "2", "qmax": "4"}
            context.bit_rate = 20 * width * height * self._fps // 10  # high enough for the quantiser to stay at qmin
        self._container, self._stream = container, stream

    def _encode(self, pixels: npt.NDArray[np.uint8]) -> None:
        import av
        from av.video.reformatter import ColorRange, Colorspace

        assert self._container is not None, "encode before open"
        assert self._stream is not None, "encode before open"
        height, width = pixels.shape[:2]
        size = (self._stream.height, self._stream.width)
        assert (height, width) == size, f"a frame of {height}×{width} in a video of {size[0]}×{size[1]}"
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        frame.pts = self._frames_written
        frame.time_base = 1 / self._stream.codec_context.framerate
        for packet in self._stream.encode(frame):
            self._container.mux(packet)
            self._packets_muxed += 1
            self._bytes_safe = os.path.getsize(self._path)
        self._frames_written += 1

    def _abandon(self) -> None:
        """Let go of the file after a failed write, cut back to its last complete piece."""
        self._closed = True
        container, self._container, self._stream = self._container, None, None
        if container is not None:
            import av

            with contextlib.suppress(OSError, av.FFmpegError):  # the error that brought us here is the one to report
                container.close()
        if self._packets_muxed > 1:
            with contextlib.suppress(OSError):  # a device or a pipe cannot be cut
                os.truncate(self._path, self._bytes_safe)
        elif os.path.isfile(self._path):
            with contextlib.suppress(OSError):  # not one frame is in it
                os.unlink(self._path)

    def _write_error(self, error: Exception) -> OutputError:
        # The piece that failed is that of the frame before the last packet; everything before it is complete.
        return output_error(self._path, error, max(0, self._packets_muxed - 1))


def _find_codec() -> str:
    from av import codecs_available

    return "libx264" if "libx264" in codecs_available else "mpeg4"


@functools.cache
def _can_finish_fragments() -> bool:
    """Return whether this FFmpeg can turn a fragmented recording into an ordinary mp4 at its end (7.1 and newer do)."""
    import av

    try:
        with av.open(io.BytesIO(), "w", format="mp4", container_options={"movflags": _HYBRID_FLAGS}) as trial:
            stream = trial.add_stream("mpeg4", rate=1)
            stream.width = stream.height = 16
            stream.pix_fmt = "yuv420p"
            # One real frame: FFmpeg 8.1 crashes the process when it finishes a hybrid file that has none.
            trial.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
            trial.mux(stream.encode(None))
    except (OSError, av.FFmpegError):
        return False
    return True
