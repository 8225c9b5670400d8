"""A tape: a network as a flat list of operator calls, which an engine plays with real tensors. No framework here.

`cf-build` writes it for the `cuda` backend, as JSON beside the weights:

    {"inputs": [name, …], "weights": {name: {"key": …, "channels_last": …}, …},
     "calls": [[operator, arguments, keywords, results], …], "outputs": [value, …]}

A value is JSON as it is, or one of `{"tensor": name}`, `{"dtype": name}`, `{"memory_format": name}`, `{"layout": name}`
and `{"device": null}` (the engine's own). Names are assigned once; a result that nothing reads is null.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from causal_forcing.runtime.errors import EngineDamagedError

TAPE_SUFFIX = ".tape.json"
"""End of a tape's file name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A constant of a tape."""

    key: str
    """Name of its tensor in the weight file."""
    channels_last: bool = False
    """Whether the tensor is laid out with channels innermost once it is on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One operator call."""

    operator: str
    """Qualified name with overload, such as `aten.linear.default`."""
    arguments: tuple[Any, ...]
    """By position, as values."""
    keywords: dict[str, Any]
    """By name, as values."""
    results: tuple[str | None, ...]
    """Names of its results; several where it returns a tuple."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tape:
    """All calls of one network."""

    weight_file: str
    """Safetensors file of its weights, relative to the engine directory."""
    inputs: tuple[str, ...]
    """Names of the inputs, in the order of the network's."""
    weights: dict[str, Weight]
    """Name to constant."""
    calls: tuple[Call, ...]
    """In order."""
    outputs: tuple[Any, ...]
    """Values, in the order of the network's outputs."""
    captured: bool = False
    """Whether it is played often enough to be captured in a CUDA graph."""

    def write(self, path: Path) -> None:
        """Write the tape as JSON."""
        path.write_text(json.dumps(asdict(self), separators=(",", ":")), encoding="utf-8")

    def last_reads(self) -> list[tuple[str, ...]]:
        """Return for each call the names that no later call and no output reads; they can be let go after it."""
        remaining = set(self.inputs) | set(self.weights) | set(tensor_names(self.outputs))
        released: list[tuple[str, ...]] = []
        for call in reversed(self.calls):
            names = {*tensor_names(call.arguments), *tensor_names(list(call.keywords.values()))}
            names |= {result for result in call.results if result is not None}
            released.append(tuple(sorted(names - remaining)))
            remaining |= names
        return released[::-1]


def read_tape(path: Path) -> Tape:
    """Read a tape.

    Raises:
        EngineDamagedError: It is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Tape(
            weight_file=content["weight_file"],
            inputs=tuple(content["inputs"]),
            weights={name: Weight(**weight) for name, weight in content["weights"].items()},
            calls=tuple(
                Call(
                    operator=call["operator"],
                    arguments=tuple(call["arguments"]),
                    keywords=call["keywords"],
                    results=tuple(call["results"]),
                )
                for call in content["calls"]
            ),
            outputs=tuple(content["outputs"]),
            captured=content["captured"],
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EngineDamagedError(f"{path} is not a readable tape ({error!r}); rebuild it with cf-build") from error


def tensor_names(value: Any) -> Iterator[str]:
    """Yield the names of all tensors in a value, or in a list of values."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from tensor_names(part)
    elif isinstance(value, dict) and "tensor" in value:
        yield value["tensor"]
