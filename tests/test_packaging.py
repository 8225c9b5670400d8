"""What is shipped: the packages, their data, a wheel that works away from the checkout, and a tidy top level."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("build_engines", "runtime", "plugins")
TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", *FOLDERS, "tests", "benchmarks", "docs", "examples"}
WEIGHTS = Path("build_engines/shapes/weights")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a `build/` left in the checkout would find its way into it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def away(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment of its own that has the wheel, and sees this one's libraries behind it."""
    folder = tmp_path_factory.mktemp("away") / "venv"
    venv.create(folder, symlinks=True)
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--no-deps"]
    subprocess.run([*command, "--no-index", "--quiet", str(wheel)], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # A path that a .pth file adds comes last, and .pth files in it, such as an editable install's, stay unread.
    (site_packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder


def test_packages_are_the_folders_with_an_init_file(project: dict[str, Any]) -> None:
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(_packages())


def test_every_package_is_marked_as_typed(project: dict[str, Any]) -> None:
    for name in FOLDERS:
        assert (ROOT / name / "py.typed").is_file()
        assert "py.typed" in project["tool"]["setuptools"]["package-data"][f"causal_forcing.{name}"]


def test_type_checkers_see_the_folders_themselves() -> None:
    for name in FOLDERS:
        assert os.readlink(ROOT / ".typing" / "causal_forcing" / name) == f"../../{name}"


def test_nothing_makes_the_namespace_a_package() -> None:
    assert not list(ROOT.glob("**/causal_forcing/__init__.py"))


def test_wheel_holds_the_packages_the_included_weights_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {path for folder in FOLDERS for kind in ("*.py", "*.cu") for path in (ROOT / folder).rglob(kind)}
    expected = {f"causal_forcing/{path.relative_to(ROOT).as_posix()}" for path in sources}
    expected |= {f"causal_forcing/{name}/py.typed" for name in FOLDERS}
    provenance = json.loads((ROOT / WEIGHTS / "provenance.json").read_text(encoding="utf-8"))
    weights = {f"causal_forcing/{WEIGHTS.as_posix()}/{name}" for name in (*provenance["sha256"], "provenance.json")}
    assert len(weights) == 5
    assert names == expected | weights
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_names_its_licence_and_programs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(files["METADATA"]).decode()
        programs = archive.read(files["entry_points.txt"]).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "LICENSE" in files
    assert "cf-build = causal_forcing.build_engines.cli:main" in programs
    assert "cf-generate = causal_forcing.runtime.cli:main" in programs


def test_wheel_makes_a_clip_away_from_the_checkout(
    away: Path, tiny_engine: Path, engine_home: Path, tmp_path: Path
) -> None:
    where = "import causal_forcing.runtime as package; print(package.__file__)"
    found = _run(away / "bin" / "python", "-c", where, cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(away), "the wheel's package is imported, not the checkout's"
    size = ("--pixel-height", "32", "--pixel-width", "48")
    prompt = ("--prompt", "a paper boat", "--total-blocks", "2")
    record = json.loads(_run(away / "bin" / "cf-generate", "tiny", *size, *prompt, "--json", cwd=tmp_path))
    assert (record["output"], record["engine"]) == ("outputs/tiny.mp4", str(tiny_engine))
    with av.open(tmp_path / record["output"]) as container:
        frames = [(frame.height, frame.width) for frame in container.decode(video=0)]
    assert frames == [(32, 48)] * 21


def test_wheel_finds_the_included_weights_away_from_the_checkout(away: Path, tmp_path: Path) -> None:
    program = """
from causal_forcing.build_engines.weights import resolve_weights
from causal_forcing.runtime.variant import find_variant
print(*resolve_weights(find_variant("shapes"), checkpoint=None, wan_folder=None).paths().values(), sep="\\n")
"""
    paths = [Path(line) for line in _run(away / "bin" / "python", "-c", program, cwd=tmp_path).splitlines()]
    assert len(paths) == 4
    assert all(path.is_relative_to(away) for path in paths)


def test_top_level_holds_what_a_newcomer_expects() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    top = {name.split("/")[0] for name in listed if (ROOT / name).exists()}
    assert {name for name in top if not name.startswith(".")} == TOP_LEVEL
    assert ".ci" in top


def _packages() -> Iterator[str]:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("__init__.py"):
            yield ".".join(("causal_forcing", *path.parent.relative_to(ROOT).parts))


def _run(program: Path, *arguments: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [str(program), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
