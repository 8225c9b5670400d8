"""Compiled kernels inside an engine directory, which are found there wherever the directory has been moved to."""

from __future__ import annotations

import json
from pathlib import Path

from triton import knobs
from triton.runtime.cache import FileCacheManager

from causal_forcing.plugins.kernels.cuda_source import keep_machine_code

KERNELS_FOLDER = "kernels"
"""Folder of compiled kernels inside an engine directory."""


class MovableCache(FileCacheManager):  # type: ignore[misc]  # triton has no types
    """Triton's file cache, but for the absolute paths it writes down: files are where the cache is."""

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Return the files of one compiled kernel by name, or None where it has not been compiled."""
        listing = Path(self.cache_dir) / f"__grp__{filename}"
        if not listing.exists():
            return None
        names = json.loads(listing.read_text(encoding="utf-8")).get("child_paths") or {}
        paths = {name: Path(self.cache_dir) / name for name in names}
        return {name: str(path) for name, path in paths.items() if path.exists()}


def use_kernel_cache(folder: Path) -> None:
    """Take kernels from an engine directory, and put there what still has to be compiled."""
    keep_machine_code(folder / KERNELS_FOLDER)
    knobs.cache.dir = str(folder / KERNELS_FOLDER)
    knobs.cache.manager_class = MovableCache
