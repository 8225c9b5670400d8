"""Where frames go: an mp4 that can be played while it grows, or a folder of PNGs.

A sink takes frames chunk by chunk and puts them on disk at once. The mp4 is *fragmented* while it is recorded: every
frame is a self-contained piece behind a header that is already there, so a process killed at any moment leaves a
playable file, at most one frame short. On `close` it becomes an ordinary mp4 with a duration and an index.

    with open_sink(Path("clip.mp4"), fps=16) as sink:
        for frames in session:          # [T, H, W, 3] uint8 RGB
            sink.write(frames)
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from causal_forcing.runtime.errors import OutputError, UsageError

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
_PNG_THREADS = min(4, os.cpu_count() or 1)
_FRAME_FILE = re.compile(r"frame_\d{5,}\.png")


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
        _check_frames(frames)
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
        return _output_error(self._path, error, max(0, self._packets_muxed - 1))


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
        _check_folder(folder)
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
        _check_frames(frames)
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
            raise _output_error(self._folder, error, self._frames_written) from error

    def close(self) -> None:
        """Do nothing: every frame is already complete."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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


def is_frame_folder(path: Path | str) -> bool:
    """Return whether that output is a folder of PNGs rather than an mp4.

    Raises:
        UsageError: It is neither.
    """
    name, path = str(path), Path(path)
    if name.endswith("/"):
        return True
    if path.suffix.lower() == ".mp4":
        return False
    if not path.suffix or os.path.isdir(path):
        return True
    raise UsageError(
        f"cannot write {path.suffix} files: got {name}, expected NAME.mp4 for a video or a folder for PNG frames"
    )


def check_writable(path: Path | str) -> None:
    """Find out whether frames can be written there, without creating or changing anything.

    Raises:
        UsageError: The suffix is none that can be written.
        OutputError: They cannot; the message names the reason and the fix.
    """
    is_folder = is_frame_folder(path)
    path = Path(path)
    if is_folder:
        _check_folder(path)
        return
    if os.path.isdir(path):
        raise OutputError(f"cannot write {path}: it is a folder; name a file: {path / 'clip.mp4'}")
    if not os.path.lexists(path):
        _check_parent(path)
        return
    try:
        # No O_TRUNC: what is there stays. O_NONBLOCK: a pipe that nobody reads fails instead of hanging.
        os.close(os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0)))
    except OSError as error:
        raise _output_error(path, error) from error


def _check_folder(folder: Path) -> None:
    if not os.path.lexists(folder):
        _check_parent(folder)
        return
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise _output_error(folder, error) from error
    if any(_FRAME_FILE.fullmatch(name) for name in names):
        fix = f"rm {shlex.quote(str(folder))}/frame_*.png"
        raise OutputError(f"{folder} holds frames of an earlier clip: name another folder, or remove them: {fix}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _output_error(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def _check_parent(path: Path) -> None:
    parent = path.parent
    if not os.path.exists(parent):
        raise OutputError(f"cannot write {path}: its folder is missing: mkdir -p {shlex.quote(str(parent))}")
    if not os.path.isdir(parent):
        raise OutputError(f"cannot write {path}: {parent} is a file, expected a folder: name another output")
    # True for root whatever the mode, but false on a read-only file system even then.
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _output_error(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def _png(frame: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    # Level 1: a third of the time of the default for files a tenth larger.
    Image.fromarray(frame).save(content, format="PNG", compress_level=1)
    return content.getvalue()


def _check_frames(frames: npt.NDArray[np.uint8]) -> None:
    shape = tuple(frames.shape)
    assert frames.dtype.name == "uint8", f"frames of {frames.dtype.name}, expected uint8 RGB"
    assert shape[3:] == (3,), f"frames of shape {shape}, expected [T, H, W, 3]"


_FIXES = {
    errno.ENOSPC: "free some space, or name an output on another disk",
    errno.EDQUOT: "free some of your quota, or name an output on another disk",
    errno.EROFS: "name an output on a writable file system",
    errno.EACCES: "name an output that you may write",
    errno.EPERM: "name an output that you may write",
    errno.EFBIG: "raise the file size limit: ulimit -f unlimited",
    errno.ENAMETOOLONG: "name a shorter output",
    errno.ENOTDIR: "name an output whose folders are folders",
}


def _output_error(path: Path, error: Exception, frames_safe: int = 0) -> OutputError:
    number = getattr(error, "errno", None)
    reason = os.strerror(number) if isinstance(number, int) and number > 0 else " ".join(str(error).split())
    fix = _FIXES.get(number, "name another output") if isinstance(number, int) else "name another output"
    state = f"; the first {frames_safe} frames are safe in it" if frames_safe else ""
    return OutputError(f"cannot write {path}: {reason}{state}; {fix}")


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
