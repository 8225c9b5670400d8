"""The flow-matching schedule of few-step denoising: timesteps, sigmas, and the step from flow to the next latent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from causal_forcing.runtime.variant import Variant

TRAIN_TIMESTEPS = 1000

Sigma = TypeVar("Sigma", float, torch.Tensor)


def shift_sigma(sigma: Sigma, shift: float) -> Sigma:
    """Shift noise levels in [0, 1] towards 1: s·sigma / (1 + (s − 1)·sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


class FlowMatchSchedule:
    """Shifted sigmas and their timesteps, and upstream's ways of looking them up.

    Args:
        shift: Timestep shift s, of `shift_sigma`.

    Source: thu-ml/Causal-Forcing@1fc7bbc utils/scheduler.py FlowMatchScheduler (sigma_min 0, extra_one_step) and
    pipeline/causal_inference.py (warping).
    """

    def __init__(self, shift: float) -> None:
        sigmas = torch.linspace(1.0, 0.0, TRAIN_TIMESTEPS + 1)[:-1]
        self.sigmas = shift_sigma(sigmas, shift)
        """[1000] fp32, from 1 down to just above 0."""
        self.timesteps = self.sigmas * TRAIN_TIMESTEPS
        """[1000] fp32."""

    def warp(self, steps: Sequence[int]) -> torch.Tensor:
        """Map unwarped timesteps such as 750 to the shifted schedule (937.5 for shift 5); [steps] fp32."""
        table = torch.cat((self.timesteps, torch.zeros(1)))
        return table[TRAIN_TIMESTEPS - torch.tensor(steps, dtype=torch.int64)]

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """Return the sigma of the nearest timestep in the table, first of equals; fp32, shape of `timestep`.

        The table has no zero: timestep 0 gives 0.00498.
        """
        distance = (self.timesteps - timestep.to(torch.float32).reshape(-1, 1)).abs()
        return self.sigmas[distance.argmin(dim=1)].reshape(timestep.shape)


def timestep_embedding(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """Embed timesteps as [cos | sin] of their angles.

    Computed in fp64, on the host, because a timestep times a frequency loses the digits that matter in fp32 and because
    TensorRT has no fp64.

    Args:
        timesteps: [timesteps] fp32, in 0..1000.
        dim: Width of the embedding.

    Returns:
        [timesteps, dim] fp64.

    Source: thu-ml/Causal-Forcing@1fc7bbc wan/modules/model.py sinusoidal_embedding_1d.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    angles = timesteps.to(torch.float64)[:, None] * torch.pow(10000.0, -exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoisingStep:
    """One denoising pass and what follows it."""

    table_index: int
    """Row of the modulation tables."""
    sigma: float
    """Noise level of the pass's input."""
    next_sigma: float | None
    """Noise level to bring the estimate back to; None after the last pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoisingPlan:
    """Every pass of a clip, resolved once: which timesteps exist, and which steps a chunk takes."""

    timesteps: tuple[float, ...]
    """Distinct timesteps: rows of the modulation tables."""
    first_chunk: tuple[DenoisingStep, ...]
    """Steps of the first generated chunk."""
    chunk: tuple[DenoisingStep, ...]
    """Steps of every other chunk."""
    context_index: int
    """Row of the context pass's timestep."""
    initial_index: int
    """Row of timestep 0, at which initial latents enter the cache whatever the context pass's is."""

    @property
    def max_steps(self) -> int:
        """The most denoising passes that any chunk takes."""
        return max(len(self.first_chunk), len(self.chunk))


def plan_denoising(
    *,
    shift: float,
    steps: Sequence[int],
    first_chunk_steps: Sequence[int] | None,
    context_timestep: float,
    warp: bool = True,
) -> DenoisingPlan:
    """Resolve step lists against the schedule."""
    schedule = FlowMatchSchedule(shift)
    timesteps: list[float] = []

    def row(timestep: float) -> int:
        if timestep not in timesteps:
            timesteps.append(timestep)
        return timesteps.index(timestep)

    def resolve(unwarped: Sequence[int]) -> tuple[DenoisingStep, ...]:
        warped = schedule.warp(unwarped) if warp else torch.tensor(unwarped, dtype=torch.float32)
        sigmas = [*schedule.sigma(warped).tolist(), None]
        return tuple(
            DenoisingStep(table_index=row(timestep), sigma=sigmas[index], next_sigma=sigmas[index + 1])
            for index, timestep in enumerate(warped.tolist())
        )

    chunk = resolve(steps)
    first_chunk = chunk if first_chunk_steps is None else resolve(first_chunk_steps)
    context_index = row(float(context_timestep))
    initial_index = row(0.0)
    return DenoisingPlan(
        timesteps=tuple(timesteps),
        first_chunk=first_chunk,
        chunk=chunk,
        context_index=context_index,
        initial_index=initial_index,
    )


def plan_variant(variant: Variant) -> DenoisingPlan:
    """Resolve a variant's step lists; the build and the session must agree about the rows of the modulation tables."""
    return plan_denoising(
        shift=variant.timestep_shift,
        steps=variant.denoising_steps,
        first_chunk_steps=variant.first_chunk_denoising_steps,
        context_timestep=variant.context_timestep,
        warp=variant.warp_steps,
    )


def flow_to_x0_(latent: torch.Tensor, flow: torch.Tensor, sigma: float | torch.Tensor, workspace: torch.Tensor) -> None:
    """Turn a noisy latent into the estimate of the clean one, in place: x0 = x_t − sigma·flow.

    Args:
        latent: Noisy latent, any shape and dtype; becomes x0.
        flow: The network's output, same shape.
        sigma: Noise level of `latent`; a tensor broadcasts.
        workspace: fp64, same shape; overwritten.

    Source: thu-ml/Causal-Forcing@1fc7bbc utils/wan_wrapper.py _convert_flow_pred_to_x0 (fp64 as here).
    """
    workspace.copy_(flow).mul_(-sigma).add_(latent)
    latent.copy_(workspace)


def add_noise_(latent: torch.Tensor, noise: torch.Tensor, sigma: float | torch.Tensor) -> None:
    """Bring a clean latent to a noise level, in place: (1 − sigma)·x0 + sigma·noise.

    Args:
        latent: Clean latent, any shape, fp32; becomes the noisy one.
        noise: Unit normal, same shape.
        sigma: Noise level to reach; a tensor broadcasts.

    Source: thu-ml/Causal-Forcing@1fc7bbc utils/scheduler.py add_noise.
    """
    latent.lerp_(noise, sigma)
