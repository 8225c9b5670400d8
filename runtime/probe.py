"""A look at one topic of the machine, and what every look needs. Only the standard library is imported."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What one look at the machine found."""

    name: str
    """Topic."""
    status: Status
    """`fail` is broken or unusable, `warn` is usable but less than it could be."""
    detail: str
    """What was found, one line."""
    fix: str | None = None
    """A command to paste, if one would help."""


def guard(name: str, look: Callable[[], Probe]) -> Probe:
    """Look at something; whatever a broken installation raises becomes a failed probe."""
    try:
        return look()
    except Exception as error:
        text = " ".join(str(error).split())
        return Probe(
            name=name, status="fail", detail=f"{type(error).__name__}: {text}" if text else type(error).__name__
        )


def load(module: str) -> Any:
    """Import by name: a plain import statement would make the module a dependency of this one."""
    return importlib.import_module(module)


def is_installed(module: str) -> bool:
    """Return whether a module could be imported, as far as its files tell."""
    return importlib.util.find_spec(module) is not None


def installed_version(packages: Iterable[str]) -> str | None:
    """Return the version of the first of some distributions that is here."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def gib(size_bytes: int) -> str:
    """Return a size as text."""
    return f"{size_bytes / 2**30:.1f} GiB"
