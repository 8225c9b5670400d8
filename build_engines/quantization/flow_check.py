"""The check at the end: the flow's error over the passes of a real clip, with every choice in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from causal_forcing.build_engines.dit_networks import dit_networks
from causal_forcing.build_engines.models.dit import CausalDiT
from causal_forcing.build_engines.networks import Network
from causal_forcing.build_engines.quantization.passes import PassPlan, run_passes
from causal_forcing.build_engines.quantization.recipe import Recipe
from causal_forcing.runtime.config import EngineConfig
from causal_forcing.runtime.engine import IOTensors


def flow_error(dit: CausalDiT, recipe: Recipe, config: EngineConfig, plan: PassPlan, embedding: torch.Tensor) -> float:
    """Return the RMS error of the flow over all denoising passes of a clip, relative to the flow's RMS.

    Every pass is run twice on the same latent, in the carrier type and quantised, each with caches of its own: what
    quantisation does to the keys and values of earlier chunks is in the error, what it would do to their pictures is
    not.

    Args:
        dit: The model, in the carrier type; unchanged afterwards.
        recipe: What is quantised.
        config: The engine's.
        plan: Shapes.
        embedding: The clip's prompt, [B, text_len, text_dim].
    """
    quantised = recipe.modules(dit)
    with _replaced(dit, quantised):  # caches hold codes where attention is quantised
        networks = dit_networks(dit, plan.geometry, precision=config.dtype, timesteps=1)
    caches = {source for network in networks for _, source in network.spec.states}
    quantised_io = IOTensors([network.spec for network in networks if network.spec.states], torch.device(plan.device))
    squares = torch.zeros(2, dtype=torch.float64)

    def twice(network: Network) -> Callable[..., Any]:
        names = [io_tensor.name for io_tensor in network.spec.inputs]

        def run(*inputs: torch.Tensor) -> Any:
            own = [quantised_io[name] if name in caches else tensor for name, tensor in zip(names, inputs, strict=True)]
            with _replaced(dit, quantised):
                got = network.module(*own)
            want = network.module(*inputs)
            if network.spec.name == "dit_step":
                flow = want[0].float()
                squares.add_(torch.stack([(got[0].float() - flow).square().sum(), flow.square().sum()]).double().cpu())
            return want

        return run

    run_passes(dit, config, plan, [embedding], in_place_of=twice)
    return float((squares[0] / squares[1]).sqrt()) if squares[1] else 0.0


@contextmanager
def _replaced(dit: CausalDiT, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the place of some of a model's, and its own back again."""
    own = {name: dit.get_submodule(name) for name in modules}
    for name, module in modules.items():
        dit.set_submodule(name, module)
    try:
        yield
    finally:
        for name, module in own.items():
            dit.set_submodule(name, module)
