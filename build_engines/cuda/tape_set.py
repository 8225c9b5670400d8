"""The artefacts of a `cuda` engine: a tape for each network, weights for each model, and compiled kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from causal_forcing.build_engines.cuda.tracing import write_tape
from causal_forcing.build_engines.cuda.weight_file import WeightFile
from causal_forcing.build_engines.networks import Network
from causal_forcing.runtime.engine import CHANNELS_LAST, IOTensors
from causal_forcing.runtime.engines.cuda_engine import CudaEngine, DeviceWeights
from causal_forcing.runtime.network_spec import IOTensor, NetworkSpec
from causal_forcing.runtime.tape import TAPE_SUFFIX

_CACHES = ("decoder_cache", "encoder_cache")
"""Parts of the names of convolution caches."""

_SHARED = {"vae_decoder": "vae_decoder", "vae_encoder": "vae_encoder", "text_encoder": None}
"""How the names of networks begin to the weight file they share; None is one each, all others share `dit`."""


class TapeSet:
    """Writes tapes, and the weights of a model when its last network has been traced.

    Args:
        folder: Where files go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._weights: WeightFile | None = None

    def add(self, network: Network) -> str:
        """Write one network's tape; returns its file's name."""
        name = network.spec.name
        shared = next((file for prefix, file in _SHARED.items() if name.startswith(prefix)), "dit")
        file = f"{shared or name}.safetensors"
        if self._weights is None or self._weights.name != file:
            self.finish()
            self._weights = WeightFile(file)
        write_tape(network, self._weights).write(self._folder / f"{name}{TAPE_SUFFIX}")
        return name + TAPE_SUFFIX

    def finish(self) -> None:
        """Write the weights that have not been written yet."""
        if self._weights is not None:
            self._weights.write(self._folder)
            self._weights = None


def lay_out(network: Network) -> Network:
    """Give the convolution caches of a network the memory that kernels want: channels innermost."""

    def laid_out(io_tensor: IOTensor) -> IOTensor:
        is_cache = len(io_tensor.shape) in CHANNELS_LAST and any(kind in io_tensor.name for kind in _CACHES)
        return replace(io_tensor, channels_last=True) if is_cache else io_tensor

    spec = network.spec
    inputs, outputs = (tuple(laid_out(io) for io in ios) for ios in (spec.inputs, spec.outputs))
    return replace(network, spec=replace(spec, inputs=inputs, outputs=outputs))


def compile_kernels(folder: Path, networks: Iterable[NetworkSpec], artefacts: Mapping[str, str]) -> None:
    """Run every network once on the GPU, the text encoder's apart, so that the directory holds the kernels they need.

    Args:
        folder: The engine directory, with tapes and weights.
        networks: What it holds.
        artefacts: Network name to the file of its tape.
    """
    from causal_forcing.runtime.engines.kernel_cache import use_kernel_cache  # only here: it needs Triton

    device = torch.device("cuda", torch.cuda.current_device())
    use_kernel_cache(folder)
    weights = DeviceWeights(folder, device)
    played = [network for network in networks if not network.name.startswith("text_encoder")]
    io_tensors = IOTensors(played, device)
    for network in played:
        engine = CudaEngine(weights, network, folder / artefacts[network.name])
        engine.bind(io_tensors)
        engine.enqueue()
    torch.cuda.synchronize(device)
