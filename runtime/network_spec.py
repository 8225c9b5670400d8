"""What a compiled network takes and gives, tensor by tensor: plain data, no framework."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class IOTensor:
    """One named input or output of a network."""

    name: str
    """Name in the graph. Tensors of one name are one buffer in all engines of a session."""
    shape: tuple[int, ...]
    """Static shape."""
    dtype: str
    """Element type, spelled as torch and numpy do: float32, bfloat16, float16, float8_e4m3fn, int32, int64."""
    channels_last: bool = False
    """Whether its memory has channels, axis 1, innermost."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return (
            self.elements
            * {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int32": 4, "int64": 8}[self.dtype]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """What a compiled network takes and gives.

    A state is an output that is the next call's input: `k_cache_00_out` of `k_cache_00`. Where the pair is in
    `in_place`, the op itself updates the input's buffer and both names are bound to it; other pairs are carried over by
    the engine after each call.
    """

    name: str
    """Network name, also its file's stem."""
    inputs: tuple[IOTensor, ...]
    """Inputs in the order of the graph."""
    outputs: tuple[IOTensor, ...]
    """Outputs in the order of the graph."""
    states: tuple[tuple[str, str], ...] = ()
    """Pairs (output, input) of states."""
    in_place: bool = False
    """Whether states are updated in place by the op's contract."""

    def io_tensors(self) -> Iterator[IOTensor]:
        """Yield inputs, then outputs."""
        yield from self.inputs
        yield from self.outputs
