"""Engine directories appear whole or not at all, whatever stops their build."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from causal_forcing.build_engines import builder
from causal_forcing.build_engines.builder import BuildJob, build
from causal_forcing.build_engines.model_loading import RandomModels
from causal_forcing.build_engines.networks import Network
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.errors import BuildLockedError, EngineDamagedError, OutputError
from causal_forcing.runtime.loading import load_engines
from causal_forcing.runtime.manifest import MANIFEST_NAME, check_files, read_manifest
from causal_forcing.runtime.model_spec import TINY
from causal_forcing.runtime.network_spec import IOTensor, NetworkSpec
from causal_forcing.runtime.resolution import resolve_engine

NAMES = ["one", "two", "three"]


def linear(name: str) -> Network:
    x, y = (IOTensor(name=axis, shape=(2, 4), dtype="float32") for axis in "xy")
    return Network(spec=NetworkSpec(name=name, inputs=(x,), outputs=(y,)), module=nn.Linear(4, 4))


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> BuildJob:
    """A job of three small networks, quick to build."""

    def cut(job: BuildJob, recipe: object = None) -> Iterator[Network]:
        yield from map(linear, NAMES)

    monkeypatch.setattr(builder, "cut_networks", cut)
    options = EngineOptions(slug="tiny", backend="torch", precision="fp32", pixel_height=32, pixel_width=48)
    config = resolve_engine(options, weights="random:0", device="cpu")
    return BuildJob(config=config, source=RandomModels(model=TINY, seed=0, dtype=torch.float32), parts=())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "engines" / "tiny" / "0123"


def beside(folder: Path) -> list[str]:
    """Return what lies in the folder of engines, but for locks, which go with their process."""
    return sorted(path.name for path in folder.parent.iterdir() if path.suffix != ".lock")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_build_makes_the_folder_with_a_file_for_each_network(job: BuildJob, folder: Path) -> None:
    heard: list[str] = []
    manifest = build(job, folder, progress=heard.append)
    assert heard == NAMES
    assert beside(folder) == ["0123"]
    assert sorted(contents(folder)) == [MANIFEST_NAME, "one.pt2", "three.pt2", "two.pt2"]
    assert read_manifest(folder) == manifest
    check_files(folder, manifest)
    assert [network.name for network in manifest.networks] == NAMES
    assert manifest.artefacts == {name: f"{name}.pt2" for name in NAMES}
    assert set(manifest.build) >= {"created", "seconds", "network_seconds", "versions"}


def test_build_records_where_weights_came_from(job: BuildJob, folder: Path) -> None:
    job = BuildJob(config=job.config, source=job.source, parts=(), provenance={"weight_files": {"dit": "a.pt"}})
    assert build(job, folder).build["weight_files"] == {"dit": "a.pt"}
    assert read_manifest(folder).build["weight_files"] == {"dit": "a.pt"}


def test_build_under_way_shows_nothing_under_its_name(job: BuildJob, folder: Path) -> None:
    seen: list[bool] = []
    build(job, folder, progress=lambda name: seen.append(folder.exists()))
    assert seen == [False] * 3
    assert folder.is_dir()


@pytest.mark.parametrize("error", [RuntimeError("export broke"), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("at", NAMES)
def test_build_that_fails_anywhere_leaves_nothing(error: BaseException, at: str, job: BuildJob, folder: Path) -> None:
    def fail(name: str) -> None:
        if name == at:
            raise error

    with pytest.raises(type(error)):
        build(job, folder, progress=fail)
    assert beside(folder) == []
    build(job, folder)
    assert beside(folder) == ["0123"]


def test_build_that_fails_in_the_exporter_leaves_nothing(
    job: BuildJob, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(network: Network) -> None:
        raise RuntimeError(f"cannot export {network.spec.name}")

    monkeypatch.setattr(builder, "export_program", fail)
    with pytest.raises(RuntimeError, match="cannot export one"):
        build(job, folder)
    assert beside(folder) == []


def test_build_that_fails_leaves_the_engine_that_was_there(job: BuildJob, folder: Path) -> None:
    build(job, folder)
    before = contents(folder)

    def fail(name: str) -> None:
        if name == "three":
            assert contents(folder) == before, "replaced before the end"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        build(job, folder, progress=fail)
    assert contents(folder) == before
    assert beside(folder) == ["0123"]


def test_build_over_an_engine_replaces_all_of_it(job: BuildJob, folder: Path) -> None:
    build(job, folder)
    (folder / "left.over").write_text("from another build")
    (folder / "one.pt2").write_bytes(b"damaged")
    with pytest.raises(EngineDamagedError):
        check_files(folder, read_manifest(folder))
    check_files(folder, build(job, folder))
    assert "left.over" not in contents(folder)
    assert beside(folder) == ["0123"]


def test_build_removes_what_killed_builds_of_the_same_engine_left(job: BuildJob, folder: Path) -> None:
    stale = [f".{folder.name}.partial-99999", f".{folder.name}.partial-replaced"]
    other = ".4567.partial-1"
    for name in (*stale, other):
        (folder.parent / name / "tokenizer").mkdir(parents=True)
        (folder.parent / name / "one.pt2").write_bytes(b"half")
    build(job, folder)
    assert beside(folder) == sorted([other, "0123"])


def test_build_of_the_same_engine_at_once_is_refused_in_a_line(job: BuildJob, folder: Path) -> None:
    refused = []

    def build_again(name: str) -> None:
        with pytest.raises(BuildLockedError) as caught:
            build(job, folder)
        refused.append(str(caught.value))

    build(job, folder, progress=build_again)
    assert (
        refused == [f"another process is building {folder}: wait for it, or stop it and run the same command again"] * 3
    )
    check_files(folder, read_manifest(folder))
    build(job, folder)


def test_build_of_another_engine_at_once_is_not_in_the_way(job: BuildJob, folder: Path) -> None:
    def build_other(name: str) -> None:
        build(job, folder.with_name("4567"))

    build(job, folder, progress=build_other)
    assert beside(folder) == ["0123", "4567"]


def test_build_with_a_full_disk_says_so_and_leaves_nothing(
    job: BuildJob, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(program: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(builder, "save_program", fail)
    with pytest.raises(OutputError, match=f"cannot write the engine {folder}: No space left on device"):
        build(job, folder)
    assert beside(folder) == []


def test_build_below_a_file_says_that_it_cannot_write(job: BuildJob, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write the engine .*file/tiny/0123"):
        build(job, tmp_path / "file" / "tiny" / "0123")


def test_build_with_a_tokenizer_copies_its_files_alone(job: BuildJob, folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "umt5-xxl"
    source.mkdir()
    for name in ("tokenizer.json", "spiece.model", "README.md", "weights.bin"):
        (source / name).write_text(name)
    build(BuildJob(config=job.config, source=job.source, tokenizer=source, parts=("text_encoder",)), folder)
    assert sorted(path.name for path in (folder / "tokenizer").iterdir()) == ["spiece.model", "tokenizer.json"]


def test_build_killed_halfway_leaves_no_engine_and_the_next_build_works(folder: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from causal_forcing.build_engines.builder import build\n"
        "from causal_forcing.build_engines.planner import make_job\n"
        "from causal_forcing.runtime.engine_options import EngineOptions\n"
        "def progress(name):\n"
        "    if name == 'dit_step':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "options = EngineOptions(slug='tiny', backend='torch', precision='fp32', pixel_height=32, pixel_width=48)\n"
        "build(make_job(options, device='cpu'), Path(sys.argv[1]), progress=progress)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (left,) = beside(folder)
    assert left.startswith(".0123.partial-")
    assert (folder.parent / left / "prompt_kv.pt2").stat().st_size > 0
    options = EngineOptions(slug="tiny", backend="torch", precision="fp32", pixel_height=32, pixel_width=48)
    config = resolve_engine(options, weights="random:0", device="cpu")
    source = RandomModels(model=TINY, seed=0, dtype=torch.float32)
    build(BuildJob(config=config, source=source, parts=("dit",)), folder)
    assert beside(folder) == ["0123"]
    assert list(load_engines(folder, device="cpu").engines) == [
        "timestep_modulation",
        "prompt_kv",
        "dit_step",
        "dit_context",
    ]
