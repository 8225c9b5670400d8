"""Clips made in this process: what a request becomes, what is on disk at each moment, and who builds."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from causal_forcing.runtime.clip import make_clip
from causal_forcing.runtime.clip_request import ClipRequest
from causal_forcing.runtime.clip_writer import ClipWriter
from causal_forcing.runtime.config import GenerateConfig
from causal_forcing.runtime.engine_lookup import find_or_build, recorded_engine
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.errors import CausalForcingError, EngineDamagedError, OutputError
from causal_forcing.runtime.interruption import held_back, stoppable
from causal_forcing.runtime.mp4_sink import Mp4Sink
from causal_forcing.runtime.record import ClipRecord, read_record

OPTIONS = EngineOptions(slug="tiny", pixel_height=32, pixel_width=48)


def request_for(output: Path, **changes: Any) -> ClipRequest:
    config = GenerateConfig(prompt="a fox", **{"total_blocks": 2} | changes)
    return ClipRequest(options=OPTIONS, generate=config, output=str(output), fps=16, device="cpu")


def new_record(output: Path | None) -> ClipRecord:
    return ClipRecord(
        engine_options={},
        engine="engine",
        engine_fingerprint="0",
        engine_config={},
        generate={},
        device="cpu",
        output="" if output is None else str(output),
        fps=16,
    )


def frames_of(value: int, count: int = 3) -> npt.NDArray[np.uint8]:
    return np.full((count, 32, 48, 3), value, dtype=np.uint8)


def test_clip_same_request_gives_the_same_frames_and_another_seed_others(tiny_engine: Path, tmp_path: Path) -> None:
    first = make_clip(request_for(tmp_path / "a.mp4"))
    again = make_clip(request_for(tmp_path / "b.mp4"))
    other = make_clip(request_for(tmp_path / "c.mp4", seed=1))
    assert first.engine == str(tiny_engine)
    assert first.frames == 21
    assert first.frames_sha256 == again.frames_sha256 != other.frames_sha256
    assert read_record(tmp_path / "a.json") == first


def test_clip_as_pngs_has_the_same_frames(tiny_engine: Path, tmp_path: Path) -> None:
    video, pictures = make_clip(request_for(tmp_path / "a.mp4")), make_clip(request_for(tmp_path / "frames"))
    assert video.frames_sha256 == pictures.frames_sha256
    assert len(list((tmp_path / "frames").iterdir())) == 21
    assert read_record(tmp_path / "frames.json").output == str(tmp_path / "frames")


def test_clip_first_blocks_of_a_longer_clip_are_the_shorter_one(tiny_engine: Path, tmp_path: Path) -> None:
    short = make_clip(request_for(tmp_path / "frames", total_blocks=1))
    make_clip(request_for(tmp_path / "long", total_blocks=2))
    for index in range(short.frames):
        name = f"frame_{index:05d}.png"
        assert (tmp_path / "frames" / name).read_bytes() == (tmp_path / "long" / name).read_bytes()


def test_recorded_engine_is_found_while_it_is_the_same(tiny_engine: Path, tmp_path: Path) -> None:
    record = make_clip(request_for(tmp_path / "a.mp4", total_blocks=1))
    assert recorded_engine(record) == tiny_engine
    record.engine_fingerprint = "0" * 64
    assert recorded_engine(record) is None
    record.engine = "/gone"
    assert recorded_engine(record) is None


def test_find_or_build_finds_what_is_built(tiny_engine: Path) -> None:
    assert find_or_build(OPTIONS, "cpu") == tiny_engine


@pytest.mark.parametrize("name", ["dit_step.onnx", "text_encoder.onnx"])
def test_clip_of_a_damaged_engine_in_the_cache_builds_it_again_and_goes_on(
    name: str, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, built = shutil.copytree(tiny_engine, tmp_path / "damaged"), []
    (damaged / name).write_bytes(b"damaged")

    def build(options: EngineOptions, device: str) -> Path:
        built.append(options)
        return tiny_engine

    monkeypatch.setattr("causal_forcing.runtime.clip.find_or_build", lambda options, device: damaged)
    monkeypatch.setattr("causal_forcing.runtime.clip.build_engine", build)
    asked = dataclasses.replace(request_for(tmp_path / "a.mp4", total_blocks=1), prompt_cache=False)
    assert make_clip(asked).engine == str(tiny_engine)
    assert built == [OPTIONS]
    with pytest.raises(EngineDamagedError, match=f"{name} is damaged"):
        make_clip(dataclasses.replace(asked, engine_folder=damaged))


@pytest.mark.parametrize(
    ("body", "exit_code", "is_said"),
    [("import sys; sys.exit(3)", 3, True), ("import os; os.kill(os.getpid(), 9)", 3, False)],
)
def test_build_that_fails_passes_its_exit_code_on(
    engine_home: Path, monkeypatch: pytest.MonkeyPatch, body: str, exit_code: int, is_said: bool
) -> None:
    options = EngineOptions(slug="tiny", window_frames=9)
    popen = subprocess.Popen

    def instead(command: list[str], **settings: Any) -> Any:
        return popen([command[0], "-c", body], **settings)

    monkeypatch.setattr("causal_forcing.runtime.engine_lookup.subprocess.Popen", instead)
    with pytest.raises(CausalForcingError) as caught:
        find_or_build(options, "cpu")
    assert (caught.value.exit_code, caught.value.said) == (exit_code, is_said)
    assert is_said or "killed by SIGKILL" in str(caught.value)


# --- the writer -----------------------------------------------------------------------------------------------------


def record_of(path: Path, blocks: int) -> ClipRecord:
    """Return a record once it knows of so many chunks: they are written while others are made."""
    deadline_s = time.monotonic() + 30
    while not path.exists() or read_record(path).blocks < blocks:
        assert time.monotonic() < deadline_s, "nothing is written"
        time.sleep(0.01)
    return read_record(path)


def test_writer_after_every_chunk_the_record_on_disk_is_true(tmp_path: Path) -> None:
    with ClipWriter(new_record(tmp_path / "a.mp4"), output_dir=tmp_path, slug="tiny") as writer:
        assert not list(tmp_path.iterdir())
        hashes = set()
        for index in range(3):
            writer.add(index, frames_of(50 * index), timing={"generate_s": float(index)}, memory={"host": index})
            on_disk = record_of(tmp_path / "a.json", index + 1)
            assert (on_disk.timing, on_disk.memory) == ({"generate_s": index}, {"host": index})
            assert (on_disk.status, on_disk.blocks, on_disk.frames) == ("running", index + 1, 3 * index + 3)
            hashes.add(on_disk.frames_sha256)
        assert len(hashes) == 3
    assert read_record(tmp_path / "a.json").status == "complete"


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "interrupted"), (ValueError("x"), "failed")])
def test_writer_left_by_an_error_keeps_the_clip_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: BaseException, status: str
) -> None:
    with (
        pytest.raises(type(error)),
        ClipWriter(new_record(tmp_path / "a.mp4"), output_dir=tmp_path, slug="x") as writer,
    ):
        writer.add(0, frames_of(0))
        raise error
    assert read_record(tmp_path / "a.json").status == status
    assert capsys.readouterr().err == f"kept the clip so far: 3 frames in {tmp_path / 'a.mp4'}\n"


def test_writer_left_before_the_first_chunk_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), ClipWriter(new_record(None), output_dir=tmp_path / "out", slug="tiny"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


def test_writer_whose_record_cannot_be_written_still_tells_the_first_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="first"),
        ClipWriter(new_record(tmp_path / "a.mp4"), output_dir=tmp_path, slug="tiny") as writer,
    ):
        writer.add(0, frames_of(0))
        record_of(tmp_path / "a.json", 1)
        (tmp_path / "a.json").unlink()
        (tmp_path / "a.json").mkdir()
        raise ValueError("first")


def test_writer_stopped_inside_a_chunk_finishes_the_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ClipRecord.write

    def stop_then_write(self: ClipRecord, path: Path) -> None:
        if self.status == "running":
            os.kill(os.getpid(), signal.SIGINT)
        write(self, path)

    monkeypatch.setattr(ClipRecord, "write", stop_then_write)
    with (
        pytest.raises(KeyboardInterrupt),
        ClipWriter(new_record(tmp_path / "a.mp4"), output_dir=tmp_path, slug="tiny") as writer,
    ):
        writer.add(0, frames_of(0))
        time.sleep(30)  # the stop comes while the main thread is at something else
        pytest.fail("the stop came too late")
    record = read_record(tmp_path / "a.json")
    assert (record.status, record.blocks, record.frames) == ("interrupted", 1, 3)


def test_writer_takes_the_next_chunk_once_the_one_before_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, events, write = threading.Event(), list[str](), ClipRecord.write

    def write_when_allowed(self: ClipRecord, path: Path) -> None:
        assert may_write.wait(30)
        events.append(f"wrote {self.blocks}")
        write(self, path)

    monkeypatch.setattr(ClipRecord, "write", write_when_allowed)
    with ClipWriter(new_record(tmp_path / "a.mp4"), output_dir=tmp_path, slug="tiny") as writer:
        writer.add(0, frames_of(0))
        events.append("another is made")
        may_write.set()
        writer.add(1, frames_of(1))
        assert events[:2] == ["another is made", "wrote 1"]
    assert events[2:] == ["wrote 2", "wrote 2"]


def test_writer_that_fails_says_so_when_the_next_chunk_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OutputError("no space")

    monkeypatch.setattr(Mp4Sink, "write", fail)
    with (
        pytest.raises(OutputError, match="no space"),
        ClipWriter(new_record(tmp_path / "a.mp4"), output_dir=tmp_path, slug="tiny") as writer,
    ):
        writer.add(0, frames_of(0))
        writer.add(1, frames_of(1))
        pytest.fail("the error was lost")


def test_writer_free_names_are_taken_once_by_clips_and_records(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "tiny-2.json").write_text("a record whose clip is gone")
    taken: list[str] = []

    def write() -> None:
        record = new_record(None)
        with ClipWriter(record, output_dir=folder, slug="tiny") as writer:
            writer.add(0, frames_of(0))
        taken.append(Path(record.output).name)

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(taken) == ["tiny-3.mp4", "tiny-4.mp4", "tiny-5.mp4", "tiny.mp4"]


def test_writer_into_a_folder_that_is_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with (
        pytest.raises(OutputError, match="choose another --output-dir"),
        ClipWriter(new_record(None), output_dir=tmp_path / "out", slug="tiny") as writer,
    ):
        writer.add(0, frames_of(0))


# --- stops ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["SIGINT", "SIGTERM", "SIGHUP"])
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    number = signal.Signals[request.param]
    before = signal.getsignal(number)
    yield number
    assert signal.getsignal(number) == before


def test_stop_signal_raises_where_it_comes(number: signal.Signals) -> None:
    with stoppable() as received:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert received == [number]


def test_stop_signal_held_back_comes_after_the_block(number: signal.Signals) -> None:
    done: list[int] = []
    with stoppable(), pytest.raises(KeyboardInterrupt):
        with held_back():
            signal.raise_signal(number)
            signal.raise_signal(number)
            done.append(1)
        pytest.fail("the stop was lost")
    assert done == [1]


def test_stop_signal_that_is_ignored_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stoppable() as received, held_back():
            signal.raise_signal(number)
        assert received == []
    finally:
        signal.signal(number, before)
