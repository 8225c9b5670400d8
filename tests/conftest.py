"""Fixtures of all tests: golden data, a small engine that is built once, and a cache folder of the tests' own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]

Run = Callable[..., subprocess.CompletedProcess[str]]
Refuses = Callable[..., str]


@pytest.fixture(scope="session", autouse=True)
def own_cores() -> None:
    """Keep to this worker's share of a small machine's cores, programs that tests start too: more threads only wait."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = min(2, max(1, (os.cpu_count() or 1) // workers))
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


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
    return _built(
        run, "tiny-i2v", "--pixel-height", "32", "--pixel-width", "48", "--backend", "torch", "--precision", "fp32"
    )


@pytest.fixture(scope="session")
def tiny_torch_engine(engine_home: Path) -> Path:
    """The engine directory of `tiny` at 32×48, torch, built in this process."""
    from causal_forcing.build_engines.builder import build
    from causal_forcing.build_engines.planner import make_job
    from causal_forcing.runtime.engine_options import EngineOptions
    from causal_forcing.runtime.resolution import default_root

    options = EngineOptions(slug="tiny", backend="torch", precision="fp32", pixel_height=32, pixel_width=48)
    job = make_job(options, device="cpu")
    folder = job.config.folder(default_root())
    build(job, folder)
    return folder


def _built(run: Run, *arguments: str) -> Path:
    finished = run("cf-build", *arguments)
    assert finished.returncode == 0, finished.stderr
    return Path(finished.stdout.strip())


@pytest.fixture
def refuses(
    run: Run, engine_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Refuses:
    """Run a program on bad input and return its one error line.

    It must leave with the given code, print nothing but that line (narration before it is fine where work had `begun`),
    show no traceback, and leave every file in the working folder and in the cache as it was. The program runs in this
    process, which is quick, unless `alone` or with `options` for `run`.
    """
    monkeypatch.chdir(tmp_path)

    def check(
        program: str, *arguments: str, code: int = 2, begun: bool = False, alone: bool = False, **options: Any
    ) -> str:
        before = _files(tmp_path), _files(engine_home)
        got: object
        if alone or options:
            finished = run(program, *arguments, cwd=tmp_path, **options)
            got, out, err = finished.returncode, finished.stdout, finished.stderr
        else:
            capfd.readouterr()
            with pytest.raises(SystemExit) as left:
                _main(program)(arguments)
            got, (out, err) = left.value.code, capfd.readouterr()
        *narration, last = err.splitlines() or [""]
        assert got == code, err
        assert out == ""
        assert last.startswith("error: "), err
        assert "Traceback" not in err
        assert not last.startswith("error: unexpected")
        assert not narration or (begun and not any(line.startswith("error") for line in narration)), err
        assert (_files(tmp_path), _files(engine_home)) == before, "files were left, lost or changed"
        return last

    return check


def _main(program: str) -> Callable[[Sequence[str]], None]:
    from causal_forcing.build_engines.cli import main as build
    from causal_forcing.runtime.cli import main as generate

    return {"cf-build": build, "cf-generate": generate}[program]


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return size and time of all files below a folder, but for the locks of builds, which stay."""
    paths = (path for path in folder.rglob("*") if path.suffix != ".lock" and not path.is_dir())
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}
