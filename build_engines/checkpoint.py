"""Reads state dicts safely, checks them against a network, and loads them into it.

Files are memory-mapped and never executed: torch files go through the weights-only unpickler, so a checkpoint that
smuggles Python code is refused instead of run.
"""

from __future__ import annotations

import errno
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from causal_forcing.runtime.errors import CheckpointError

GENERATOR = "generator"
GENERATOR_EMA = "generator_ema"
PLAIN = "plain"

TORCH_SUFFIXES = (".pt", ".pth")
SAFETENSORS_SUFFIX = ".safetensors"

# Segments that torch's wrappers (FSDP, activation checkpointing, compile) insert anywhere into a name.
_WRAPPER_SEGMENTS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
# Attribute names under which trainers hold the network.
_HOLDER_SEGMENTS = frozenset({"model", "net", "module"})

# Elements per finite check: bounds its temporaries to tens of megabytes, however large the tensor.
_FINITE_PART = 1 << 22
# Names spelled out per kind of problem in the one-line message.
_NAMES_SHOWN = 3

_ZIP_MAGIC = b"PK"
_PICKLE_MAGIC = b"\x80"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDict:
    """Named tensors, and where they came from."""

    tensors: dict[str, torch.Tensor]
    """CPU tensors in the file's dtype, names free of wrapper and holder prefixes; views into the mapped file."""
    source: Path
    """The file."""
    weight_set: str
    """Which set was taken: `generator`, `generator_ema`, or `plain` where the file holds a single one."""


class StateDictMismatchError(CheckpointError):
    """Weights that belong to another network.

    Args:
        message: The one-line summary.
        problems: One line per missing, extra, misshapen or non-finite tensor.
    """

    def __init__(self, message: str, problems: tuple[str, ...]) -> None:
        super().__init__(message)
        self.problems = problems
        for problem in problems:
            self.add_note(problem)  # `--debug` shows them all


def read_state_dict(path: Path, *, use_ema: bool | None = None) -> StateDict:
    """Read the tensors of a `.pt`, `.pth` or `.safetensors` file without running code and without copying.

    Args:
        path: A plain state dict, or upstream's container with `generator`, `generator_ema` or both.
        use_ema: Which set of a container is wanted; None takes `generator` where there is one. Where the wanted set is
            absent the other is taken: compare `StateDict.weight_set` and narrate.

    Raises:
        CheckpointError: The file is missing, damaged, unsafe, no checkpoint, or has no tensors.
    """
    if path.suffix == SAFETENSORS_SUFFIX:
        return StateDict(tensors=_clean(_read_safetensors(path), path), source=path, weight_set=PLAIN)
    if path.suffix not in TORCH_SUFFIXES:
        raise CheckpointError(
            f"{path} is not a checkpoint: its name ends in {path.suffix or 'nothing'!r}, expected "
            f"{', '.join((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX))}; pass such a file with --checkpoint"
        )
    weight_set, entries = _choose_set(_read_torch(path), path, use_ema)
    tensors = {str(name): value.detach() for name, value in entries.items() if isinstance(value, torch.Tensor)}
    return StateDict(tensors=_clean(tensors, path), source=path, weight_set=weight_set)


def verify_state_dict(
    state: StateDict,
    module_or_expected: torch.nn.Module | Mapping[str, tuple[int, ...]],
    *,
    what: str,
    is_content_read: bool = True,
    option: str = "--checkpoint or --wan-folder",
) -> None:
    """Check that a state dict has exactly the tensors of a network, and only finite numbers.

    Args:
        state: What was read.
        module_or_expected: The network (on any device, `meta` included), or its tensor names and shapes.
        what: The network in words, for the message, such as `the DiT of tiny`.
        is_content_read: Whether to look at the numbers, for which all of the file is read.
        option: What the right file is passed with, for the message.

    Raises:
        StateDictMismatchError: Anything differs; `problems` has a line for each tensor.
    """
    expected: Mapping[str, tuple[int, ...]]
    if isinstance(module_or_expected, torch.nn.Module):
        expected = {name: tuple(tensor.shape) for name, tensor in module_or_expected.state_dict().items()}
    else:
        expected = module_or_expected
    missing = [name for name in expected if name not in state.tensors]
    extra = [name for name in state.tensors if name not in expected]
    misshapen = []
    non_finite = []
    for name, tensor in state.tensors.items():
        if name not in expected:
            continue
        if tuple(tensor.shape) != tuple(expected[name]):
            misshapen.append(f"{name} (got {list(tensor.shape)}, expected {list(expected[name])})")
        elif is_content_read and not _is_finite(tensor):
            non_finite.append(name)
    kinds = {"missing": missing, "extra": extra, "misshapen": misshapen, "non-finite": non_finite}
    problems = tuple(f"{kind}: {name}" for kind, names in kinds.items() for name in names)
    if problems:
        counts = ", ".join(f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds.items() if names)
        more = "" if max(map(len, kinds.values())) <= _NAMES_SHOWN else " (all names: --debug)"
        raise StateDictMismatchError(
            f"{state.source} does not fit {what}: got {len(state.tensors)} tensors for {len(expected)}: "
            f"{counts}{more}; pass the file that belongs to this slug with {option}",
            problems,
        )


def load_into(
    module: torch.nn.Module,
    state: StateDict,
    *,
    dtype: torch.dtype,
    what: str | None = None,
    names: Mapping[str, str] | None = None,
    option: str = "--checkpoint or --wan-folder",
) -> None:
    """Verify a state dict and make its tensors, converted, the module's own.

    The module may be on `meta`. It is left in evaluation mode and without gradients. Tensors that already have the
    dtype stay views into the mapped file.

    Args:
        module: The network to fill.
        state: What was read.
        dtype: Floating-point tensors are converted to it, one by one.
        what: The network in words, for the message; by default its class name.
        names: The module's name of each name in the file, where they differ.
        option: What the right file is passed with, for the message.

    Raises:
        StateDictMismatchError: The state dict does not fit.
    """
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    names = {name: name for name in own} if names is None else names
    assert set(names.values()) == set(own), f"the names given for {type(module).__name__} are not its tensors' names"
    expected = {name: own[names[name]] for name in names}
    verify_state_dict(state, expected, what=what or type(module).__name__, option=option)
    converted = {
        names[name]: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in state.tensors.items()
    }
    module.load_state_dict(converted, strict=True, assign=True)
    module.requires_grad_(False).eval()
    hollow = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not hollow, f"{type(module).__name__} made buffers on meta that no file fills: {_first(hollow)}"


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    _require_content(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the handle is no mapping)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged, truncated or no safetensors file ({_one_line(error)}); download it again"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_torch(path: Path) -> object:
    magic = _require_content(path)
    try:
        with warnings.catch_warnings():
            # The unpickler comments on odd pickle protocols; what is wrong with such a file is said below.
            warnings.simplefilter("ignore")
            # Files in torch's format of before 1.6 are no zip archives and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=magic == _ZIP_MAGIC)
    except OSError as error:
        if magic == _ZIP_MAGIC and error.errno == errno.EINVAL:  # torch sought beyond the end
            raise _damaged(path) from error
        raise _unreadable(path, error) from error
    except Exception as error:  # a file that is no pickle derails the unpickler into any exception
        if isinstance(error, pickle.UnpicklingError) and (magic == _ZIP_MAGIC or magic[:1] == _PICKLE_MAGIC):
            named = re.search(r"GLOBAL (\S+)", str(error))
            what = f"contains Python code ({named[1]})" if named else "is no torch file and may contain Python code"
            raise CheckpointError(
                f"{path} {what}, which was not run; expected tensors only: get the file from its publisher again, or "
                "have it saved as .safetensors"
            ) from error
        if magic == _ZIP_MAGIC:
            raise _damaged(path) from error
        raise CheckpointError(
            f"{path} is not a checkpoint: got neither torch's zip archive nor a pickle; download it again, or pass "
            "another file with --checkpoint"
        ) from error


def _require_content(path: Path) -> bytes:
    """Return the first two bytes of a file that exists and is not empty."""
    if not path.is_file():
        what = "is a folder, expected a file" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {what}; pass an existing file with --checkpoint")
    try:
        with path.open("rb") as file:
            magic = file.read(2)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not magic:
        raise CheckpointError(f"checkpoint {path} is empty; download it again")
    return magic


def _choose_set(content: object, path: Path, use_ema: bool | None) -> tuple[str, Mapping[object, object]]:
    """Return which set of weights a loaded file gives, and its entries."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, expected a state dict (names to tensors); pass another file "
            "with --checkpoint"
        )
    order = (GENERATOR_EMA, GENERATOR) if use_ema else (GENERATOR, GENERATOR_EMA)
    for weight_set in order:
        if isinstance(content.get(weight_set), Mapping):
            return weight_set, content[weight_set]
    return PLAIN, content


def _clean(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Strip wrapper and holder prefixes from the names."""
    if not tensors:
        raise CheckpointError(
            f"{path} has no tensors in it, neither plain nor under `{GENERATOR}` or `{GENERATOR_EMA}`; pass another "
            "file with --checkpoint"
        )
    origins: dict[str, str] = {}
    for name in tensors:
        segments = [segment for segment in name.split(".") if segment not in _WRAPPER_SEGMENTS]
        while len(segments) > 1 and segments[0] in _HOLDER_SEGMENTS:
            del segments[0]
        stripped = ".".join(segments)
        if stripped in origins:
            raise CheckpointError(
                f"{path} holds two networks at once: {origins[stripped]!r} and {name!r} both name {stripped!r}; pass a "
                "file with one set of weights"
            )
        origins[stripped] = name
    return {stripped: tensors[name] for stripped, name in origins.items()}


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    for part in torch.split(tensor.reshape(-1), _FINITE_PART):
        # Eight-bit floats have no isfinite kernel.
        if not bool(torch.isfinite(part if part.itemsize > 1 else part.float()).all()):
            return False
    return True


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or truncated; download it again")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read ({_one_line(error)}); check the path and its permissions: ls -l {path}"
    )
