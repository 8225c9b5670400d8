"""Frame sinks: what reaches the disk, when, and what is said when it is full."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from causal_forcing.runtime import mp4_sink
from causal_forcing.runtime.errors import OutputError
from causal_forcing.runtime.frame_sink import open_sink
from causal_forcing.runtime.mp4_sink import Mp4Sink
from causal_forcing.runtime.png_sink import PngSink


def noise(count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """[T, 96, 160, 3] frames that compress badly, about 9 kB each."""
    return np.random.default_rng(seed).integers(0, 256, (count, 96, 160, 3), dtype=np.uint8)


def bars() -> npt.NDArray[np.uint8]:
    """[1, 96, 160, 3] of four saturated colours, which a wrong colour matrix shifts by tens."""
    frame = np.zeros((1, 96, 160, 3), np.uint8)
    for index, colour in enumerate(([255, 0, 0], [0, 255, 0], [0, 0, 255], [120, 200, 40])):
        frame[:, :, index * 40 : (index + 1) * 40] = colour
    return frame


def count_frames(path: Path) -> int:
    """Decode what can be decoded; a torn last piece ends the count as it ends playback."""
    count = 0
    with av.open(str(path)) as container, contextlib.suppress(av.FFmpegError):
        for _ in container.decode(video=0):
            count += 1
    return count


@contextlib.contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Make every write past that size fail with EFBIG, as a full disk fails with ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=["libx264", "mpeg4"])
def codec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {name}")
    monkeypatch.setattr(mp4_sink, "_find_codec", lambda: name)
    return name


@pytest.fixture(params=["finished at close", "fragmented for good"])
def is_hybrid(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    hybrid: bool = request.param == "finished at close"
    if hybrid and not mp4_sink._can_finish_fragments():
        pytest.skip("this FFmpeg has no hybrid_fragmented")
    monkeypatch.setattr(mp4_sink, "_can_finish_fragments", lambda: hybrid)
    return hybrid


def test_mp4_closed_has_every_frame_rate_and_duration(tmp_path: Path, codec: str, is_hybrid: bool) -> None:
    path = tmp_path / "clip.mp4"
    with Mp4Sink(path, fps=16) as sink:
        sink.write(noise(1))
        sink.write(noise(7))
        assert sink.frames_written == 8
        assert sink.codec == codec
    assert count_frames(path) == 8
    with av.open(str(path)) as container:
        assert container.duration == 8 * av.time_base // 16
        assert container.streams.video[0].average_rate == 16
        if is_hybrid:  # only an ordinary mp4 tells its frame count without being read to the end
            assert container.streams.video[0].frames == 8


def test_mp4_colours_survive_and_are_declared_bt709(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "clip.mp4"
    with Mp4Sink(path) as sink:
        sink.write(bars())
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
        frame = next(container.decode(video=0)).reformat(format="rgb24", src_colorspace="ITU709").to_ndarray()
    for x in (20, 60, 100, 140):
        # 8-bit limited-range YUV rounds by 1 or 2; the BT.601 matrix would be off by more than 10.
        np.testing.assert_allclose(frame[48, x].astype(int), bars()[0, 48, x].astype(int), atol=3)


@pytest.mark.parametrize("written", [2, 12, 25])
def test_mp4_killed_while_recording_keeps_all_but_the_last_frame(
    tmp_path: Path, codec: str, is_hybrid: bool, written: int
) -> None:
    path = tmp_path / "clip.mp4"
    script = """if True:
        import os, signal, sys
        from pathlib import Path
        import numpy as np
        from causal_forcing.runtime import mp4_sink
        path, codec, is_hybrid, written = sys.argv[1:]
        mp4_sink._find_codec = lambda: codec
        mp4_sink._can_finish_fragments = lambda: is_hybrid == "True"
        sink = mp4_sink.Mp4Sink(Path(path))
        sink.write(np.random.default_rng(0).integers(0, 256, (int(written), 96, 160, 3), dtype=np.uint8))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", script, str(path), codec, str(is_hybrid), str(written)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert count_frames(path) >= written - 1


def test_mp4_without_a_frame_leaves_the_existing_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"precious")
    with pytest.raises(KeyError), Mp4Sink(path):
        raise KeyError("the model failed to load")
    assert path.read_bytes() == b"precious"


def test_mp4_error_of_the_generator_finishes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    sink = Mp4Sink(path)
    sink.write(noise(5))
    with pytest.raises(KeyboardInterrupt), sink:
        raise KeyboardInterrupt
    assert count_frames(path) == 5


def test_mp4_name_like_a_protocol_is_a_plain_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Mp4Sink(Path("http:clip.mp4")) as sink:
        sink.write(noise(2))
    assert count_frames(tmp_path / "http:clip.mp4") == 2


def test_mp4_disk_full_while_writing_says_how_many_frames_are_safe(tmp_path: Path, codec: str, is_hybrid: bool) -> None:
    path = tmp_path / "clip.mp4"
    sink = Mp4Sink(path)
    sink.write(noise(6))
    with file_size_limit(150_000), pytest.raises(OutputError) as caught:
        sink.write(noise(60))
    safe = count_frames(path)
    assert safe >= 6
    assert f"the first {safe} frames are safe in it" in str(caught.value)
    assert "\n" not in str(caught.value)
    sink.close()  # harmless after the failure
    assert count_frames(path) == safe


def test_mp4_disk_full_at_close_keeps_a_playable_file(tmp_path: Path) -> None:
    if not mp4_sink._can_finish_fragments():
        pytest.skip("older FFmpeg ignores errors while it finishes a fragmented file")
    reference, path = tmp_path / "reference.mp4", tmp_path / "clip.mp4"
    with Mp4Sink(reference) as sink:
        sink.write(noise(6))
    sink = Mp4Sink(path)
    sink.write(noise(6))
    limit_bytes = reference.stat().st_size - 50  # the last bytes of the index do not fit
    with file_size_limit(limit_bytes), pytest.raises(OutputError, match="the first 5 frames are safe"):
        sink.close()
    assert count_frames(path) == 5


def test_mp4_full_device_reports_no_space(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.symlink_to("/dev/full")
    with (
        pytest.raises(OutputError, match=r"clip\.mp4: No space left on device; free some space"),
        Mp4Sink(path) as sink,
    ):
        sink.write(noise(3))


def test_mp4_too_long_name_is_one_line(tmp_path: Path) -> None:
    with Mp4Sink(tmp_path / ("x" * 300 + ".mp4")) as sink, pytest.raises(OutputError, match="File name too long"):
        sink.write(noise(1))


def test_mp4_without_libx264_falls_back_to_mpeg4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4", "vp9"})
    assert Mp4Sink(tmp_path / "clip.mp4").codec == "mpeg4"


def test_png_frames_are_numbered_and_exact(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    with PngSink(folder) as sink:
        sink.write(noise(2))
        sink.write(bars())
        assert sink.frames_written == 3
    assert sorted(os.listdir(folder)) == ["frame_00000.png", "frame_00001.png", "frame_00002.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "frame_00001.png")), noise(2)[1])


def test_png_without_a_frame_creates_no_folder(tmp_path: Path) -> None:
    PngSink(tmp_path / "frames").close()
    assert not (tmp_path / "frames").exists()


def test_png_disk_full_while_writing_leaves_only_complete_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = PngSink(tmp_path)
    sink.write(bars())
    with file_size_limit(10_000), pytest.raises(OutputError, match="the first 1 frames are safe in it"):
        sink.write(noise(1))  # 46 kB as PNG
    assert os.listdir(tmp_path) == ["frame_00000.png"]

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        sink.write(bars())


def test_png_folder_with_frames_of_another_clip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "frame_00007.png").touch()
    with pytest.raises(OutputError, match=r"earlier clip.*: rm .*/frame_\*\.png"):
        open_sink(tmp_path, fps=16)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.mp4", Mp4Sink), ("a.MP4", Mp4Sink), ("frames", PngSink), ("frames.v2/", PngSink), ("old.d", PngSink)],
)
def test_open_sink_by_name_chooses_the_kind(tmp_path: Path, name: str, kind: type) -> None:
    (tmp_path / "old.d").mkdir()
    assert isinstance(open_sink(f"{tmp_path}/{name}", fps=16), kind)
