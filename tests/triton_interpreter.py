"""Kernels on the CPU, through Triton's interpreter: in processes of their own, since Triton looks when imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


def is_usable() -> bool:
    """Return whether Triton is here, and one whose interpreter works: that of 3.6 does not with NumPy 2.4."""
    if importlib.util.find_spec("triton") is None:
        return False
    return tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) >= (3, 7)


def require() -> None:
    """Skip a test where it is not."""
    if not is_usable():
        pytest.skip("needs Triton 3.7 or newer: the interpreter of 3.6 does not work with NumPy 2.4")


def interpret(script: Path, cases: object, folder: Path) -> Any:
    """Hand cases to a script, `SCRIPT CASES RESULTS`, files of torch.save in `folder`; returns its results."""
    require()
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, str(script), str(folder / "cases.pt"), str(folder / "results.pt")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return torch.load(folder / "results.pt", weights_only=True)
