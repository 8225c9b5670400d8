"""Fixtures of all tests: golden data, a small engine that is built once, and a cache folder of the tests' own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    """Keep to the cores of a small machine: more threads than cores make torch crawl."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden data: all of it where it lies beside the checkout, else the copy of the essential cases."""
    shared = ROOT.parent / "shared" / "golden"
    return shared if shared.is_dir() else ROOT / "tests" / "data" / "golden"


@pytest.fixture(scope="session")
def adapter() -> ModuleType:
    """`tests/parity/adapter.py`, loaded as the golden folder's `check.py` loads it."""
    spec = importlib.util.spec_from_file_location("golden_adapter", ROOT / "tests" / "parity" / "adapter.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["golden_adapter"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def engine_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder for the whole test run: engines are built into it once, and nothing touches the user's own."""
    home = tmp_path_factory.mktemp("home")
    before = os.environ.get("CAUSAL_FORCING_HOME")
    os.environ["CAUSAL_FORCING_HOME"] = str(home)
    yield home
    if before is None:
        del os.environ["CAUSAL_FORCING_HOME"]
    else:
        os.environ["CAUSAL_FORCING_HOME"] = before


@pytest.fixture(scope="session")
def run(engine_home: Path) -> Run:
    """Run one of the programs as a user does; returns the finished process with its output as text."""

    def run_program(program: str, *arguments: str, cwd: Path | None = None, **options: object) -> object:
        command = [str(Path(sys.executable).parent / program), *arguments]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]

    return run_program  # type: ignore[return-value]


@pytest.fixture(scope="session")
def tiny_engine(run: Run) -> Path:
    """The engine directory of `tiny` at 32×48, ONNX Runtime."""
    return _built(run, "tiny", "--pixel-height", "32", "--pixel-width", "48")


@pytest.fixture(scope="session")
def tiny_i2v_engine(run: Run) -> Path:
    """The engine directory of `tiny-i2v` at 32×48, torch: quick to build."""
    return _built(run, "tiny-i2v", "--pixel-height", "32", "--pixel-width", "48", "--backend", "torch")


def _built(run: Run, *arguments: str) -> Path:
    finished = run("cf-build", *arguments)
    assert finished.returncode == 0, finished.stderr
    return Path(finished.stdout.strip())
