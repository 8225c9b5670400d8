"""The checkout that is measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Its root, where benchmarks run."""


def head_commit(folder: Path = ROOT) -> str | None:
    """Return the commit that is checked out in a folder, the root of a clone; `+changes` where files differ from it."""
    try:
        head, root = (_git(folder, *words) for words in (("rev-parse", "HEAD"), ("rev-parse", "--show-toplevel")))
        changed = _git(folder, "diff", "--quiet", "HEAD")
    except OSError:  # no git here
        return None
    if head.returncode or Path(root.stdout.strip()) != folder.resolve():
        return None
    return head.stdout.strip() + ("+changes" if changed.returncode == 1 else "")


def _git(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
