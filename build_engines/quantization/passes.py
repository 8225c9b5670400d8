"""Real passes over torch modules: the ordinary session runs them, on engines that are the modules themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from causal_forcing.build_engines.dit_networks import dit_networks
from causal_forcing.build_engines.models.dit import CausalDiT
from causal_forcing.build_engines.networks import Network
from causal_forcing.runtime.config import EngineConfig
from causal_forcing.runtime.engine import Engine, copy_outputs, copy_targets
from causal_forcing.runtime.geometry import LATENT_STRIDE, Geometry
from causal_forcing.runtime.loading import EngineSet
from causal_forcing.runtime.manifest import Manifest
from causal_forcing.runtime.model_spec import DiTSpec
from causal_forcing.runtime.network_spec import NetworkSpec
from causal_forcing.runtime.schedule import plan_variant
from causal_forcing.runtime.session import VideoSession

PROMPTS = 8
"""Clips that are run at the engine's own resolution."""

PROMPTS_REDUCED = 2
"""Clips that are run where the resolution is reduced."""

CLIPS_OF_CHECKS = 3
"""Clips that measuring takes afterwards: one for attention, one twice for the flow."""

CPU_OPERATIONS = 8e13
"""Multiplications and additions that calibration may take on a CPU: 200 passes of the full model at 80×144, each of
which took 6 s on two busy cores in bf16."""

_PASSES = ("dit_step", "dit_context")


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPlan:
    """How large the calibration passes are, and how many."""

    geometry: Geometry
    """Shapes of the passes."""
    prompts: int
    """Clips."""
    chunks: int
    """Chunks of a clip: enough that the window fills and its oldest chunk leaves."""
    device: str
    """Where they run."""

    def expected_passes(self, config: EngineConfig) -> int:
        """Return how many passes there will be, or a few more: a clip's last chunk, say, has no context pass."""
        return self.prompts * self.chunks * (plan_variant(config.variant).max_steps + 1)

    def fields(self) -> dict[str, Any]:
        """Return what the manifest records."""
        return {
            "device": self.device,
            "pixel_height": self.geometry.pixel_height,
            "pixel_width": self.geometry.pixel_width,
            "window_frames": self.geometry.window_frames,
            "sink_frames": self.geometry.sink_frames,
            "clips": self.prompts,
            "chunks": self.chunks,
        }


def plan_passes(config: EngineConfig, *, device: str | None = None) -> PassPlan:
    """Choose passes that this machine can run in minutes.

    On a CUDA device, and wherever the model is small enough, they have the engine's own resolution. The full-size model
    on a CPU runs fewer and far smaller pictures of the same shape. What is calibrated, the range of every channel over
    all tokens, is a property of the channel more than of the number of tokens; but a small picture is not what the
    model was trained on, so a GPU gives the better calibration, and the record says which one it was.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    geometry, spec = config.geometry, config.variant.model.dit
    chunks = math.ceil(geometry.window_frames / geometry.chunk_frames) + 1
    passes = chunks * (plan_variant(config.variant).max_steps + 1)

    def operations(geometry: Geometry, prompts: int) -> float:
        return 2.0 * linear_weights(spec) * geometry.chunk_tokens * passes * (prompts + CLIPS_OF_CHECKS)

    if device != "cpu" or operations(geometry, PROMPTS) <= CPU_OPERATIONS:
        return PassPlan(geometry=geometry, prompts=PROMPTS, chunks=chunks, device=device)
    multiple = LATENT_STRIDE * geometry.patch_size
    rows, columns = geometry.token_rows, geometry.token_columns
    while operations(geometry, PROMPTS_REDUCED) > CPU_OPERATIONS and geometry.token_rows > 1:
        height = geometry.token_rows - 1
        width = max(1, round(height * columns / rows))
        geometry = replace(geometry, pixel_height=height * multiple, pixel_width=width * multiple)
    return PassPlan(geometry=geometry, prompts=PROMPTS_REDUCED, chunks=chunks, device=device)


def linear_weights(spec: DiTSpec) -> int:
    """Return how many weights the linear layers of all transformer layers have."""
    return spec.num_layers * (6 * spec.dim**2 + 2 * spec.dim * spec.ffn_dim)


class ModuleEngine:
    """An engine that is the torch module itself, for passes before anything has been exported.

    Args:
        spec: The network.
        run: Its module, or what is called in the module's place.
    """

    def __init__(self, spec: NetworkSpec, run: Callable[..., Any]) -> None:
        self.spec = spec
        self._run = run
        self._inputs: list[torch.Tensor] = []
        self._outputs: list[torch.Tensor | None] = []

    def bind(self, io_tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Engine.bind`."""
        self._inputs = [io_tensors[io_tensor.name] for io_tensor in self.spec.inputs]
        self._outputs = copy_targets(self.spec, io_tensors)

    @torch.inference_mode()
    def enqueue(self) -> None:
        """See `Engine.enqueue`."""
        copy_outputs(self._run(*self._inputs), self._outputs)


def run_passes(
    dit: CausalDiT,
    config: EngineConfig,
    plan: PassPlan,
    embeds: Sequence[torch.Tensor],
    *,
    in_place_of: Callable[[Network], Callable[..., Any]] = lambda network: network.module,
) -> int:
    """Generate clips with the DiT's modules, every denoising and every context pass of them.

    An image-to-video model is run from text: the weights are those of its framewise text-to-video model, and the
    image's latent takes the context pass that every chunk takes.

    Args:
        dit: On the plan's device.
        config: The engine's; its resolution gives way to the plan's, and one process runs all.
        plan: Shapes.
        embeds: A clip's prompt embedding each, [B, text_len, text_dim]; the clip's place is the seed of its noise.
        in_place_of: Gives what is run in place of the module of `dit_step`, and of `dit_context`.

    Returns:
        How many passes were run.
    """
    variant = replace(config.variant, takes_image=False)
    config = replace(config, geometry=plan.geometry, variant=variant, context_parallel=1)
    timesteps = len(plan_variant(config.variant).timesteps)
    networks = dit_networks(dit, plan.geometry, precision=config.dtype, timesteps=timesteps)
    passes = 0

    def count(module: nn.Module, args: Any) -> None:
        nonlocal passes
        passes += 1

    hooks = [network.module.register_forward_pre_hook(count) for network in networks if network.spec.name in _PASSES]
    engines: dict[str, Engine] = {
        network.spec.name: ModuleEngine(
            network.spec, in_place_of(network) if network.spec.name in _PASSES else network.module
        )
        for network in networks
    }
    specs = tuple(network.spec for network in networks)
    manifest = Manifest(config=config, networks=specs, artefacts={}, files={})
    engine_set = EngineSet(folder=Path(), manifest=manifest, engines=engines, device=torch.device(plan.device))
    with VideoSession(engine_set) as session:
        for seed, embedding in enumerate(embeds):
            for _ in session.generate(embedding, total_blocks=plan.chunks, seed=seed):
                pass
    for hook in hooks:
        hook.remove()
    return passes
