"""Every error a user can meet, in one tree.

    CausalForcingError                    exit 1   base: `except CausalForcingError` catches all of them
    ├── UsageError                        exit 2   the request is wrong: an option, a prompt, an image, a checkpoint
    │   ├── UnknownNameError                       no slug, option or network of that name; offers the nearest
    │   ├── PromptError                            empty or unreadable prompt
    │   ├── ImageError                             missing, unreadable or unfit conditioning image
    │   ├── CheckpointError                        unreadable, unsafe or misfitting weights
    │   └── RecordError                            unreadable or incompatible clip record
    ├── TensorRTError                     exit 1   a call of TensorRT failed; carries what its error recorder noted
    ├── PlanError                         exit 1   TensorRT makes no plan of a graph, or not the plan that was asked for
    ├── RanksEndedError                            another of the processes that share a clip ended it; its exit code
    └── RequirementError                  exit 3   the request is right, this machine or folder cannot serve it
        ├── BackendUnavailableError                no usable backend, or the chosen one is not installed
        ├── WeightsMissingError                    released weights are neither here nor downloadable
        ├── EngineNotFoundError                    no engine directory there
        ├── EngineMismatchError                    an engine of another schema, shape, version or plugin
        ├── EngineDamagedError                     engine files missing or altered
        ├── BuildLockedError                       another build of the same engine is running
        └── OutputError                            the result cannot be written

A message is one line: what happened, got versus expected, and the command that fixes it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CausalForcingError(Exception):
    """Base of all errors of this project; `exit_code` is what the programs leave with."""

    exit_code = 1
    said = False
    """Whether a program that this one started has told the user already."""


class UsageError(CausalForcingError):
    """The request itself is wrong."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that nothing carries.

    Args:
        kind: What was looked up, such as `slug`.
        name: The name that was given.
        known: All valid names.
        advice: What to do if it was meant as something else.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], *, advice: str = "") -> None:
        known = list(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        end = f"; {advice}" if advice else ""
        super().__init__(f"unknown {kind} {name!r}: {hint}valid: {', '.join(known)}{end}")


class PromptError(UsageError):
    """An empty or unreadable prompt."""


class ImageError(UsageError):
    """A missing, unreadable or unfit conditioning image."""


class CheckpointError(UsageError):
    """Weights that cannot be read, may not be trusted, or belong to another model."""


class RecordError(UsageError):
    """A clip record that cannot be read or repeated."""


class TensorRTError(CausalForcingError):
    """A call of TensorRT failed; the message carries what its error recorder noted."""


class PlanError(CausalForcingError):
    """TensorRT cannot make a plan of an exported graph, or would make another than was asked for."""


class RanksEndedError(CausalForcingError):
    """Another of the processes that make a clip together failed or died, and so ended it for all.

    Args:
        message: What happened there.
        exit_code: What all leave with.
        said: Whether another process tells the user.
    """

    def __init__(self, message: str, *, exit_code: int, said: bool) -> None:
        super().__init__(message)
        self.exit_code, self.said = exit_code, said


class RequirementError(CausalForcingError):
    """The request is right, but this machine or folder cannot serve it."""

    exit_code = 3


class BackendUnavailableError(RequirementError):
    """No usable backend, or the chosen one is not installed here."""


class WeightsMissingError(RequirementError):
    """Released weights are neither on this machine nor downloadable from it."""


class EngineNotFoundError(RequirementError):
    """There is no engine directory where one was expected."""


class EngineMismatchError(RequirementError):
    """An engine built for something else.

    Args:
        field: The manifest field that differs.
        got: Its value in the engine's manifest.
        expected: The value that is needed.
        fix: The command that builds the right engine.
    """

    def __init__(self, field: str, *, got: object, expected: object, fix: str) -> None:
        super().__init__(f"the engine does not fit: {field} is {got}, expected {expected}; rebuild it: {fix}")
        self.field = field


class EngineDamagedError(RequirementError):
    """Engine files that are missing or were altered after the build."""


class BuildLockedError(RequirementError):
    """Another build of the same engine is running."""


class OutputError(RequirementError):
    """The result cannot be written."""
