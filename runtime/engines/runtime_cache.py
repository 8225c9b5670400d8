"""What TensorRT-RTX compiles when an engine is loaded, kept beside the plan for the next time."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import filelock

from causal_forcing.runtime.errors import TensorRTError
from causal_forcing.runtime.tensorrt_library import LOGGER, TensorRTLibrary

SUFFIX = ".runtime_cache"
"""Of the files. They belong to one machine and come after the build, so no manifest lists them."""


class RuntimeCache:
    """The kernels of one engine for one GPU, in memory and in a file of their own.

    A cache only saves time: one that cannot be read or written is a line in the log and no error.

    Args:
        library: TensorRT-RTX.
        cache: Its `IRuntimeCache`, still empty.
        path: The file.
    """

    def __init__(self, library: TensorRTLibrary, cache: Any, path: Path) -> None:
        self.handle = cache
        self._library = library
        self._path = path
        self._is_saved = self._load()

    def save(self) -> None:
        """Write what was compiled, unless it came from the file; the file is whole or not there."""
        if self._is_saved:
            return
        self._is_saved = True
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            content = self._library.attempt(self.handle.serialize, "serialize its runtime cache")
            # Whoever holds the lock is writing the same kernels: nothing is lost by leaving it to them.
            with filelock.FileLock(self._path.with_name(f".{self._path.name}.lock"), timeout=0):
                try:
                    partial.write_bytes(content)
                    partial.replace(self._path)
                finally:
                    partial.unlink(missing_ok=True)
        except (OSError, TensorRTError) as error:
            LOGGER.info("compiled kernels are not kept in %s: %s", self._path, error)

    def _load(self) -> bool:
        """Read the file; return whether its kernels are of use."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return False
        except OSError as error:
            LOGGER.warning("%s cannot be read and is not used: %s", self._path, error)
            return False
        try:
            self._library.attempt(lambda: self.handle.deserialize(content), f"use {self._path}")
        except TensorRTError as error:  # another driver, or a damaged file
            LOGGER.warning("compiling again: %s", error)
            return False
        return True


def runtime_cache_path(plan: Path, *, gpu: str, version: str) -> Path:
    """Return the file of a plan's runtime cache, beside it: one for every GPU model and version of TensorRT-RTX.

    Args:
        plan: The plan's file.
        gpu: Name of the GPU model.
        version: Version of TensorRT-RTX.
    """
    model = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return plan.with_name(f"{plan.stem}.{model}.{version}{SUFFIX}")
