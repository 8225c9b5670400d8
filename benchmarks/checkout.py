"""The checkout that is measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Its root, where benchmarks run."""


def head_commit(folder: Path = ROOT) -> str | None:
    """Return the commit that is checked out in a folder; `+changes` says that files differ from it."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=folder, capture_output=True, check=False)
    except OSError:  # no git here
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if changed.returncode == 1 else "")
