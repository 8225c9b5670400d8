"""An engine directory while it is written: one build at a time, and under its name only when it is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock

from causal_forcing.build_engines.networks import Network
from causal_forcing.runtime.errors import BuildLockedError, OutputError
from causal_forcing.runtime.manifest import MANIFEST_NAME


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the build lock of a directory; it goes with the process that held it, however that ends."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.parent / f".{folder.name}.lock")
        with lock.acquire(timeout=0):
            yield
    except filelock.Timeout:
        raise BuildLockedError(
            f"another process is building {folder}: wait for it, or stop it and run the same command again"
        ) from None
    except OSError as error:
        raise _cannot_write(folder, error) from error


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give a hidden folder beside `folder` that takes its name if all goes well."""
    for stale in folder.parent.glob(f".{folder.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        assert (partial / MANIFEST_NAME).exists(), "a build ends by writing its manifest"
        replaced = folder.parent / f".{folder.name}.partial-replaced"
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_room(network: Network, folder: Path) -> None:
    """Refuse to write a network that the disk has no room for; found out later, it would end torch's writer."""
    needed, free = sum(weight.nbytes for weight in network.module.parameters()), shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"cannot write {network.spec.name} into {folder}: it takes {needed / 2**30:.2f} GiB and "
            f"{free / 2**30:.2f} GiB are free; free some, or choose another folder with cf-build --output or "
            "CAUSAL_FORCING_HOME"
        )


def _cannot_write(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write the engine {folder}: {error.strerror or error}; free space, or choose another folder with "
        "cf-build --output or CAUSAL_FORCING_HOME"
    )
