"""What is known of big files that were hashed before: an unchanged one need not be hashed again. No framework here.

A file counts as unchanged while its size, inode and both times are what they were before it was hashed. A stamp only
saves time: one that cannot be read or written costs another hash and is no error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from causal_forcing.runtime.environment import cache_folder

STAMPS_FOLDER = "checked"
"""Folder of the stamps inside the cache folder, a file an engine directory."""

SMALL_BYTES = 64 * 2**20
"""Files below this size are hashed every time: that takes less than a tenth of a second."""

SETTLED_S = 2.0
"""A file written later than this long ago gets no stamp: the clock of its times may be too coarse to tell a change."""


class CheckStamps:
    """The stamps of one engine directory.

    Args:
        folder: The engine directory.
    """

    def __init__(self, folder: Path) -> None:
        name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:32]
        self._path = cache_folder() / STAMPS_FOLDER / f"{name}.json"
        self._stamps = self._read()
        self._is_changed = False

    def holds(self, name: str, sha256: str, status: os.stat_result) -> bool:
        """Return whether a file had this hash and has not changed since.

        Args:
            name: Of the file, relative to the directory.
            sha256: The hash that it should have.
            status: What it is now.
        """
        return self._stamps.get(name) == [sha256, *_state(status)]

    def add(self, name: str, sha256: str, before: os.stat_result, after: os.stat_result) -> None:
        """Note that a file has this hash.

        Args:
            name: Of the file, relative to the directory.
            sha256: The hash that was found.
            before: What the file was before it was hashed.
            after: What it was afterwards; one that was being written gets no stamp.
        """
        is_settled = time.time() - max(before.st_mtime, before.st_ctime) >= SETTLED_S
        if before.st_size < SMALL_BYTES or not is_settled or _state(before) != _state(after):
            return
        self._is_changed |= not self.holds(name, sha256, before)
        self._stamps[name] = [sha256, *_state(before)]

    def write(self) -> None:
        """Keep what was added; the file is whole at any moment."""
        if not self._is_changed:
            return
        partial = self._path.with_name(f".{self._path.name}.partial-{os.getpid()}")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_text(json.dumps(self._stamps), encoding="utf-8")
                partial.replace(self._path)
            finally:
                partial.unlink(missing_ok=True)

    def _read(self) -> dict[str, object]:
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(self._path.read_text(encoding="utf-8"))
            if isinstance(content, dict):
                return content
        return {}


def _state(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
