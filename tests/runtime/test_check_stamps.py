"""Big files are hashed once: an unchanged one is taken as it is, a changed one is found out."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from causal_forcing.runtime import check_stamps, manifest
from causal_forcing.runtime.check_stamps import STAMPS_FOLDER
from causal_forcing.runtime.errors import EngineDamagedError
from causal_forcing.runtime.manifest import check_files, read_manifest, stamp_files

Hashed = list[str]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, in which every file but the tokenizer's counts as big."""
    monkeypatch.setenv("CAUSAL_FORCING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(check_stamps, "SMALL_BYTES", 20_000)
    return tmp_path / "home"


@pytest.fixture
def engine(tiny_engine: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny engine that counts as written long ago."""
    monkeypatch.setattr(check_stamps, "SETTLED_S", -1.0)
    return Path(shutil.copytree(tiny_engine, tmp_path / "engine"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Hashed:
    """Names of the files that were hashed."""
    names: Hashed = []
    whole = manifest.file_sha256

    def listen(path: Path) -> str:
        names.append(path.name)
        return whole(path)

    monkeypatch.setattr(manifest, "file_sha256", listen)
    return names


def big_files(engine: Path) -> set[str]:
    return {name for name, entry in read_manifest(engine).files.items() if entry.bytes >= check_stamps.SMALL_BYTES}


def check(engine: Path, hashed: Hashed, *, trust_stamps: bool = True) -> set[str]:
    """Check an engine; returns what was hashed."""
    hashed.clear()
    check_files(engine, read_manifest(engine), trust_stamps=trust_stamps)
    return set(hashed)


def test_big_file_is_hashed_once_and_small_ones_every_time(engine: Path, hashed: Hashed) -> None:
    everything = {Path(name).name for name in read_manifest(engine).files}
    big = big_files(engine)
    assert {"dit_step.onnx"} <= big
    assert big < everything
    assert check(engine, hashed) == everything
    assert check(engine, hashed) == everything - big
    assert check(engine, hashed, trust_stamps=False) == everything, "a full check hashes whatever is known"


def test_full_check_and_a_build_leave_stamps_too(engine: Path, hashed: Hashed, home: Path) -> None:
    big = big_files(engine)
    check(engine, hashed, trust_stamps=False)
    assert not check(engine, hashed) & big
    shutil.rmtree(home)
    assert check(engine, hashed) >= big
    shutil.rmtree(home)
    stamp_files(engine, read_manifest(engine))
    assert not check(engine, hashed) & big
    assert len(list((home / STAMPS_FOLDER).iterdir())) == 1


def _alter(path: Path) -> None:
    """Change a byte in place and put the times back."""
    before = path.stat()
    with path.open("r+b") as stream:
        stream.seek(before.st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(before.st_size // 2)
        stream.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)
    _alter(other)
    other.replace(path)


@pytest.mark.parametrize(
    "damage", [_alter, _replace, lambda path: path.write_bytes(b""), Path.unlink], ids=["byte", "file", "empty", "gone"]
)
def test_big_file_that_was_stamped_and_then_changed_is_found_out(
    damage: Callable[[Path], object], engine: Path, hashed: Hashed
) -> None:
    check(engine, hashed)
    damage(engine / "dit_step.onnx")
    for _ in range(2):
        with pytest.raises(EngineDamagedError, match=r"dit_step\.onnx is (damaged|missing).*rebuild it: cf-build tiny"):
            check(engine, hashed)


def test_big_file_whose_recorded_hash_is_another_is_hashed(engine: Path, hashed: Hashed) -> None:
    """Stamps are of contents: a manifest that wants other content is not served by them."""
    check(engine, hashed)
    content = read_manifest(engine)
    entry = dataclasses.replace(content.files["dit_step.onnx"], sha256="0" * 64)
    with pytest.raises(EngineDamagedError, match=r"dit_step\.onnx is damaged"):
        check_files(engine, dataclasses.replace(content, files={"dit_step.onnx": entry}), trust_stamps=True)


def test_copied_engine_is_hashed_again(engine: Path, tmp_path: Path, hashed: Hashed) -> None:
    check(engine, hashed)
    assert check(Path(shutil.copytree(engine, tmp_path / "copy")), hashed) >= big_files(engine)


def test_file_that_was_just_written_gets_no_stamp(
    engine: Path, hashed: Hashed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_stamps, "SETTLED_S", 3600.0)
    check(engine, hashed)
    assert check(engine, hashed) >= big_files(engine)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"dit_step.onnx": 3}', "\xff"])
def test_stamps_that_are_damaged_cost_a_hash(content: str, engine: Path, hashed: Hashed, home: Path) -> None:
    check(engine, hashed)
    (stamps,) = (home / STAMPS_FOLDER).iterdir()
    stamps.write_text(content, encoding="latin-1")
    assert "dit_step.onnx" in check(engine, hashed)
    assert "dit_step.onnx" not in check(engine, hashed)


def test_stamps_that_cannot_be_written_cost_a_hash(engine: Path, hashed: Hashed, home: Path) -> None:
    home.touch()
    for _ in range(2):
        assert "dit_step.onnx" in check(engine, hashed)
