"""Whether frames can be written somewhere, and what is said where they cannot: the same for an mp4 and for PNGs."""

from __future__ import annotations

import errno
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from causal_forcing.runtime.errors import OutputError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_FRAME_FILE = re.compile(r"frame_\d{5,}\.png")

_FIXES = {
    errno.ENOSPC: "free some space, or name an output on another disk",
    errno.EDQUOT: "free some of your quota, or name an output on another disk",
    errno.EROFS: "name an output on a writable file system",
    errno.EACCES: "name an output that you may write",
    errno.EPERM: "name an output that you may write",
    errno.EFBIG: "raise the file size limit: ulimit -f unlimited",
    errno.ENAMETOOLONG: "name a shorter output",
    errno.ENOTDIR: "name an output whose folders are folders",
}


def is_frame_folder(path: Path | str) -> bool:
    """Return whether that output is a folder of PNGs rather than an mp4.

    Raises:
        UsageError: It is neither.
    """
    name, path = str(path), Path(path)
    if name.endswith("/"):
        return True
    if path.suffix.lower() == ".mp4":
        return False
    if not path.suffix or os.path.isdir(path):
        return True
    raise UsageError(
        f"cannot write {path.suffix} files: got {name}, expected NAME.mp4 for a video or a folder for PNG frames"
    )


def check_writable(path: Path | str) -> None:
    """Find out whether frames can be written there, without creating or changing anything.

    Raises:
        UsageError: The suffix is none that can be written.
        OutputError: They cannot; the message names the reason and the fix.
    """
    is_folder = is_frame_folder(path)
    path = Path(path)
    if is_folder:
        check_folder(path)
        return
    if os.path.isdir(path):
        raise OutputError(f"cannot write {path}: it is a folder; name a file: {path / 'clip.mp4'}")
    if not os.path.lexists(path):
        _check_parent(path)
        return
    try:
        # No O_TRUNC: what is there stays. O_NONBLOCK: a pipe that nobody reads fails instead of hanging.
        os.close(os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0)))
    except OSError as error:
        raise output_error(path, error) from error


def check_folder(folder: Path) -> None:
    """Find out whether PNGs can be written into that folder, without creating or changing anything.

    Raises:
        OutputError: They cannot, or it holds those of an earlier clip.
    """
    if not os.path.lexists(folder):
        _check_parent(folder)
        return
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise output_error(folder, error) from error
    if any(_FRAME_FILE.fullmatch(name) for name in names):
        fix = f"rm {shlex.quote(str(folder))}/frame_*.png"
        raise OutputError(f"{folder} holds frames of an earlier clip: name another folder, or remove them: {fix}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise output_error(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def _check_parent(path: Path) -> None:
    parent = path.parent
    if not os.path.exists(parent):
        raise OutputError(f"cannot write {path}: its folder is missing: mkdir -p {shlex.quote(str(parent))}")
    if not os.path.isdir(parent):
        raise OutputError(f"cannot write {path}: {parent} is a file, expected a folder: name another output")
    # True for root whatever the mode, but false on a read-only file system even then.
    if not os.access(parent, os.W_OK | os.X_OK):
        raise output_error(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def check_frames(frames: npt.NDArray[np.uint8]) -> None:
    """Check that these are [T, H, W, 3] uint8 RGB frames."""
    shape = tuple(frames.shape)
    assert frames.dtype.name == "uint8", f"frames of {frames.dtype.name}, expected uint8 RGB"
    assert shape[3:] == (3,), f"frames of shape {shape}, expected [T, H, W, 3]"


def output_error(path: Path, error: Exception, frames_safe: int = 0) -> OutputError:
    """Return what to raise where the system refused to write: its reason, what is safe, and a fix."""
    number = getattr(error, "errno", None)
    reason = os.strerror(number) if isinstance(number, int) and number > 0 else " ".join(str(error).split())
    fix = _FIXES.get(number, "name another output") if isinstance(number, int) else "name another output"
    state = f"; the first {frames_safe} frames are safe in it" if frames_safe else ""
    return OutputError(f"cannot write {path}: {reason}{state}; {fix}")
