"""The seam between a session and its backends: engines with named, preallocated io_tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch

from causal_forcing.runtime.network_spec import NetworkSpec


class Engine(Protocol):
    """A compiled network, loaded.

    Buffers belong to the session: they are bound once and never move, so that a call can be captured in a CUDA graph.
    """

    spec: NetworkSpec

    def bind(self, io_tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the buffers of all inputs and outputs, by name; called once, before the first `enqueue`."""

    def enqueue(self) -> None:
        """Run the network on the bound buffers, on the current stream.

        Afterwards every state's input buffer holds the new state.
        """


def copy_targets(spec: NetworkSpec, io_tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor | None]:
    """Return the buffer that each output of a module is copied to; None where the op has updated it in place.

    A state goes straight to its input's buffer: the call has finished reading it by then.
    """
    states = dict(spec.states)
    return [
        None if spec.in_place and output.name in states else io_tensors[states.get(output.name, output.name)]
        for output in spec.outputs
    ]


def copy_outputs(outputs: torch.Tensor | Sequence[torch.Tensor], targets: Sequence[torch.Tensor | None]) -> None:
    """Copy what a module returned, one tensor or several, to its targets."""
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    for target, output in zip(targets, outputs, strict=True):
        if target is not None:
            target.copy_(output)


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Number of axes to the memory format with channels innermost."""


class IOTensors(Mapping[str, torch.Tensor]):
    """The buffers of a session: one per name, shared by all engines that use the name.

    Sharing is what connects the engines: `prompt_kv` writes the cross-attention keys where `dit_step` reads them, and
    `dit_step` and `dit_context` work on the same caches. Outputs that are updated in place share their input's buffer.

    Args:
        networks: Specifications of all engines of the session.
        device: Where the buffers live.
    """

    def __init__(self, networks: Iterable[NetworkSpec], device: torch.device) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        networks = list(networks)
        aliases = {output: source for network in networks if network.in_place for output, source in network.states}
        for network in networks:
            for io_tensor in network.io_tensors():
                dtype = getattr(torch, io_tensor.dtype)
                name = aliases.get(io_tensor.name, io_tensor.name)
                if name not in self._tensors:
                    buffer = torch.zeros(io_tensor.shape, dtype=dtype, device=device)
                    if io_tensor.channels_last:
                        buffer = buffer.contiguous(memory_format=CHANNELS_LAST[buffer.dim()])
                    self._tensors[name] = buffer
                known = self._tensors[name]
                assert (tuple(known.shape), known.dtype) == (io_tensor.shape, dtype), (
                    f"networks disagree about io_tensor {io_tensor.name}: {tuple(known.shape)} {known.dtype}, "
                    f"{network.name} has {io_tensor.shape} {dtype}"
                )
        self._tensors |= {output: self._tensors[source] for output, source in aliases.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @classmethod
    def measure(cls, networks: Iterable[NetworkSpec]) -> int:
        """Return the bytes that the buffers of these networks take, without taking them."""
        buffers = cls(networks, torch.device("meta"))
        return sum({id(tensor): tensor.nbytes for tensor in buffers.values()}.values())
