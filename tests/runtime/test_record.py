"""Clip records: written whole, read with suspicion, repeated bit for bit."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from PIL import Image

from causal_forcing.runtime.errors import OutputError, RecordError
from causal_forcing.runtime.record import FrameHash, check_record_path, read_record, record_path, recorded_options

Refuses = Callable[..., str]
Run = Callable[..., CompletedProcess[str]]
SIZE = ("--pixel-height", "32", "--pixel-width", "48")


@pytest.fixture(scope="module")
def clip(run: Run, tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `a.mp4` and its record `a.json`."""
    folder = tmp_path_factory.mktemp("clip")
    ask = ("--prompt", "a fox at dusk", "--seed", "7", "--total-blocks", "2", "--output", "a.mp4")
    finished = run("cf-generate", "tiny", *SIZE, *ask, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture
def record(clip: Path, tmp_path: Path) -> Path:
    """A copy of the record to spoil."""
    return Path(shutil.copy(clip / "a.json", tmp_path / "a.json"))


def edited(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_record_holds_every_option_and_the_outcome(clip: Path, tiny_engine: Path) -> None:
    record = read_record(clip / "a.json")
    assert record.engine == str(tiny_engine)
    assert record.generate == {
        "prompt": "a fox at dusk",
        "seed": 7,
        "total_blocks": 2,
        "image": None,
        "image_fit": "stretch",
    }
    assert (record.status, record.blocks, record.frames, record.output) == ("complete", 2, 21, "a.mp4")
    assert record.device == "cpu"
    assert record.prompt_source == "encoded"
    assert record.memory["host"] > 2**20
    assert {name for name, value in record.timing.items() if value} == {
        "load_s",
        "prompt_s",
        "first_frame_s",
        "process_to_first_frame_s",
        "steady_fps",
        "generate_s",
    }


def test_record_repeats_its_clip_bit_for_bit_in_a_new_process(run: Run, clip: Path, tmp_path: Path) -> None:
    again = run("cf-generate", "--from-record", str(clip / "a.json"), "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "repeated bit for bit: 21 frames" in again.stderr
    summary = json.loads(again.stdout)
    assert summary["prompt_source"] == "cached"
    assert summary["output"] == "outputs/tiny.mp4"
    assert summary["frames_sha256"] == read_record(clip / "a.json").frames_sha256
    assert (tmp_path / "outputs" / "tiny.mp4").read_bytes() == (clip / "a.mp4").read_bytes()


def test_record_with_other_frames_is_told_and_both_clips_are_kept(run: Run, record: Path, tmp_path: Path) -> None:
    edited(record, frames_sha256="0" * 64)
    again = run("cf-generate", "--from-record", "a.json", "--output", "b.mp4", cwd=tmp_path)
    assert again.returncode == 2
    last = again.stderr.splitlines()[-1]
    assert last.startswith("error: the frames in b.mp4 are not the record's: engine ")
    assert (tmp_path / "b.mp4").exists()


def test_record_whose_engine_is_gone_names_the_same_engine_again(record: Path) -> None:
    content = json.loads(record.read_text())
    sparse = content["engine_options"] | {"pixel_height": None, "pixel_width": None}
    options, config = recorded_options(read_record(edited(record, engine="/gone", engine_options=sparse, blocks=1)))
    assert (options.pixel_height, options.pixel_width) == (32, 48)
    assert (options.backend, options.precision, options.random_weights) == ("onnxruntime", "fp32", 0)
    assert config.total_blocks == 1, "as far as the clip got"


def test_record_whose_engine_is_gone_is_repeated_with_the_one_in_the_cache(
    run: Run, record: Path, tmp_path: Path
) -> None:
    edited(record, engine="/gone")
    again = run("cf-generate", "--from-record", "a.json", "--output", "b.mp4", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "repeated bit for bit: 21 frames" in again.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "record a.json does not exist: name the .json file beside a clip"),
        (b"", "record a.json is not readable JSON"),
        (b"\xff\xfe", "record a.json is not readable JSON"),
        (b"[1]", "a.json is no clip record of version 1, got None"),
        (b'{"mine": true}', "a.json is no clip record of version 1, got None"),
        (b'{"record_version": 2}', "a.json is no clip record of version 1, got 2"),
        (b'{"record_version": 1}', "record a.json lacks or misnames a field"),
    ],
)
def test_record_that_is_none_is_refused(refuses: Refuses, tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    assert said in refuses("cf-generate", "--from-record", "a.json")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"generate": None}, "record a.json has None for generate, expected dict"),
        ({"frames": "many"}, "record a.json has 'many' for frames"),
        ({"engine_options": {"slugs": "tiny"}}, "names an option that is not one"),
        ({"engine_config": {}}, "names an option that is not one ('geometry')"),
        ({"generate": {"prompt": "x", "colour": 3}}, "names an option that is not one"),
        ({"generate": {"prompt": 3}}, "the record's generate has 3 for prompt, expected <class 'str'>"),
        ({"generate": {"prompt": "x", "seed": -1}}, "--seed -1 is out of range"),
        ({"generate": {"prompt": "x", "seed": "7"}}, "names an option that is not one"),
        ({"blocks": 0}, "--total-blocks 0 makes no video"),
        ({"unknown": 1}, "record a.json lacks or misnames a field"),
    ],
)
def test_record_edited_is_refused(refuses: Refuses, record: Path, changes: dict[str, Any], said: str) -> None:
    edited(record, **changes)
    assert said in refuses("cf-generate", "--from-record", "a.json")


def test_record_excludes_options_that_would_change_the_clip(refuses: Refuses, record: Path) -> None:
    said = refuses("cf-generate", "tiny", "--from-record", "a.json", "--seed", "0", "--fps", "8", "--json")
    assert "--from-record repeats a clip as it was: leave out --seed, --fps, SLUG" in said


def test_record_is_not_replaced_by_its_own_repetition(refuses: Refuses, record: Path) -> None:
    said = refuses("cf-generate", "--from-record", "a.json", "--output", "./a.mp4")
    assert "./a.mp4 would replace the clip and record that are to be repeated: name another --output" in said


def test_record_with_a_changed_image_is_refused_before_generating(
    refuses: Refuses, record: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (48, 32), "blue").save(tmp_path / "a.png")
    content = json.loads(record.read_text())
    content["engine_config"]["variant"]["slug"] = "tiny-i2v"
    content["generate"]["image"] = "a.png"
    edited(
        record, engine="/gone", image_sha256="0" * 64, **{name: content[name] for name in ("engine_config", "generate")}
    )
    said = refuses("cf-generate", "--from-record", "a.json", "--output", "c.mp4")
    assert "the image a.png is not the record's any more: bring back the one it was" in said


@pytest.mark.parametrize(
    ("output", "path"),
    [
        ("a.mp4", "a.json"),
        ("out/a.MP4", "out/a.json"),
        ("frames", "frames.json"),
        ("frames/", "frames.json"),
        ("frames.v2/", "frames.v2.json"),
        ("a.mp4/", "a.mp4.json"),
    ],
)
def test_record_path_lies_beside_the_clip(output: str, path: str) -> None:
    assert record_path(output) == Path(path)


def test_record_path_of_the_working_folder_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert record_path(".") == tmp_path.parent / f"{tmp_path.name}.json"
    with pytest.raises(OutputError, match="no folder to lie in"):
        record_path("/")


def test_record_path_of_another_record_may_be_written(record: Path) -> None:
    check_record_path(str(record.with_suffix(".mp4")))


def test_record_written_is_whole_at_any_moment(record: Path) -> None:
    content, stop = read_record(record), threading.Event()

    def write() -> None:
        while not stop.is_set():
            content.write(record)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            assert read_record(record) == content
    finally:
        stop.set()
        writer.join()


def test_record_that_cannot_be_written_leaves_nothing(record: Path, tmp_path: Path) -> None:
    content = read_record(record)
    with pytest.raises(OutputError, match="cannot write the record"):
        content.write(tmp_path / "missing" / "a.json")
    with pytest.raises(RecordError):
        read_record(tmp_path / "missing" / "a.json")


def test_frame_hash_depends_on_every_frame_and_not_on_the_chunks() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 4, 6, 3), dtype=np.uint8)
    whole, parts, other = FrameHash(), FrameHash(), FrameHash()
    whole.update(frames)
    parts.update(frames[:2])
    parts.update(frames[2:])
    other.update(frames[:4])
    assert whole.hexdigest() == parts.hexdigest() != other.hexdigest()
