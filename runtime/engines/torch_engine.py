"""Engines of the `torch` backend: the exported programs as they are, on any device. The reference of all others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.export.passes import move_to_device_pass

from causal_forcing.plugins import row_ops, token_ops  # noqa: F401  # programs for several ranks hold their ops
from causal_forcing.plugins.torch_op import write_caches_in_place
from causal_forcing.runtime.engine import copy_outputs, copy_targets
from causal_forcing.runtime.errors import EngineDamagedError
from causal_forcing.runtime.network_spec import NetworkSpec


class TorchEngine:
    """An exported program, run eagerly.

    Args:
        spec: The network.
        path: Its `.pt2` file.
        device: Where to run it.

    Raises:
        EngineDamagedError: Torch cannot load the file.
    """

    def __init__(self, spec: NetworkSpec, path: Path, device: torch.device) -> None:
        self.spec = spec
        try:
            program = torch.export.load(path)
        except Exception as error:  # torch.export.load raises whatever its parts raise
            text = str(error).splitlines()[0]
            raise EngineDamagedError(f"torch cannot load {path}: {text}; rebuild it with cf-build") from error
        if device.type != "cpu":
            program = move_to_device_pass(program, str(device))
        module = program.module()
        assert isinstance(module, torch.fx.GraphModule), "an exported program unlifts to a GraphModule"
        write_caches_in_place(module)
        self._module = module
        self._inputs: list[torch.Tensor] = []
        self._copies: list[torch.Tensor | None] = []

    def bind(self, io_tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Engine.bind`."""
        self._inputs = [io_tensors[io_tensor.name] for io_tensor in self.spec.inputs]
        self._copies = copy_targets(self.spec, io_tensors)

    def enqueue(self) -> None:
        """See `Engine.enqueue`."""
        # fp32 means fp32: cuDNN would round convolutions to TF32.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            copy_outputs(self._module(*self._inputs), self._copies)
