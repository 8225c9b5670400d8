"""The text encoder: the largest network of all, in memory only while a prompt is encoded unless it is kept."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence

import torch

from causal_forcing.runtime.engine import Engine
from causal_forcing.runtime.network_spec import NetworkSpec

TEXT_ENCODER = "text_encoder"
"""What the names of its networks begin with: it is one, or several that hand on hidden states in their order."""


class TextEncoder:
    """Token ids and mask to a prompt embedding, in a session's buffers.

    A text encoder of several networks that is not kept is never in memory as a whole: each is loaded, run and let go
    before the next.

    Args:
        networks: Its networks, in order.
        load: Loads one by name.
        device: Where they run.
        keep: Whether they stay loaded for further prompts.
    """

    def __init__(
        self, networks: Sequence[NetworkSpec], load: Callable[[str], Engine], device: torch.device, *, keep: bool
    ) -> None:
        self.networks = tuple(networks)
        self.device = device
        self.keep = keep
        self.load = load
        self._kept: dict[str, Engine] = {}
        self._io_tensors: Mapping[str, torch.Tensor] = {}

    def bind(self, io_tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the buffers of all networks' inputs and outputs, by name."""
        self._io_tensors = io_tensors
        for engine in self._kept.values():
            engine.bind(io_tensors)

    def enqueue(self) -> None:
        """Turn `token_ids` and `token_mask` into `prompt_embeds`, on the bound buffers.

        Raises:
            EngineDamagedError: A file of it is missing, altered, or no engine.
        """
        for network in self.networks:
            if network.name in self._kept:
                self._kept[network.name].enqueue()
                continue
            engine = self.load(network.name)
            engine.bind(self._io_tensors)
            engine.enqueue()
            if self.keep:
                self._kept[network.name] = engine
                continue
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # an engine must not be let go while it runs
            del engine
            gc.collect()  # a torch module is full of cycles
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
