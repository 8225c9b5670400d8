"""Train the denoiser of `shapes`, in two stages.

`diffusion`: autoregressive flow matching with teacher forcing; every chunk has its own noise level, shifted by 5.
`distil`: causal consistency distillation: the student's estimate of the clean chunk must be the same at neighbouring
noise levels of the teacher's path, which classifier-free guidance sharpens; few steps are enough then.

    python examples/shapes/train_dit.py diffusion --output runs/shapes --minutes 8
    python examples/shapes/train_dit.py distil --output runs/shapes --minutes 8

Chunks of three frames and of one take turns, so that one set of weights serves the chunkwise and framewise variants.
A stage goes on from its own averaged weights where there are some.

Source of the stages: Causal Forcing (arXiv 2602.02214) sections 3 and 4.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from dataset import LATENT_FRAMES, Batch, Dataset
from teacher_forcing import TeacherForcing
from torch import nn
from training import DEVICE, AveragedWeights, Optimizer, Run, write_sheet

from causal_forcing.build_engines.models.dit import CausalDiT
from causal_forcing.build_engines.shapes.captions import plain_caption
from causal_forcing.build_engines.shapes.world import BACKGROUNDS, SIZES, Scene, Thing, all_things
from causal_forcing.runtime.schedule import FlowMatchSchedule
from causal_forcing.runtime.spec import SHAPES as MODEL

SHIFT = 5.0
CHUNKS = (3, 1)
"""Latent frames denoised together, in turn."""

NO_PROMPT_SHARE = 0.1
"""Share of clips whose prompt is empty, for the teacher's guidance."""

CONTEXT_NOISE = 0.1
"""Largest noise level of the clean half, in half of the clips: a generated past is not perfect either."""

GUIDANCE = 2.5
LEVELS = 40
"""Noise levels of the teacher's path."""

PEAK_LEARNING_RATE = {"diffusion": 2e-3, "distil": 8e-4}
FOUR_STEPS = (1000, 750, 500, 250)

Stage = Literal["diffusion", "distil"]


def main(
    stage: Annotated[Stage, typer.Argument(help="Which stage.")],
    output: Annotated[Path, typer.Option(help="Folder of this run.")] = Path("runs/shapes"),
    minutes: Annotated[float, typer.Option(help="Time that this run may take, preparation included.")] = 8.0,
    steps: Annotated[int, typer.Option(help="Most optimizer steps.")] = 1_000_000,
    batch: Annotated[int, typer.Option(help="Clips a step.")] = 128,
    scenes: Annotated[int, typer.Option(help="Different scenes to encode first.")] = 24_576,
    seed: Annotated[int, typer.Option(help="Seed of weights, scenes and noise.")] = 0,
) -> None:
    """Train, and write `diffusion.pt` or `distil.pt`, curves, and a sheet of clips of held-out prompts."""
    run = Run(output, stage, steps=steps, minutes=minutes)
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    dit = new_dit(seed).to(DEVICE)
    optimizer = Optimizer(dit, muon=True)
    teacher: TeacherForcing | None = None
    if stage == "distil":
        weights = torch.load(output / "diffusion.pt", map_location=DEVICE, weights_only=True)["average"]
        dit.load_state_dict(weights)
        teacher = TeacherForcing(copy.deepcopy(dit).requires_grad_(False), compiled=DEVICE.type == "cuda")
    before = run.resume()
    if before is not None:
        dit.load_state_dict(before["average"])
    average = AveragedWeights(dit, decay=0.999 if stage == "diffusion" else 0.995)
    averaged = copy.deepcopy(dit).requires_grad_(False)
    data = Dataset(output, scenes=scenes, seed=seed + 1 + run.steps_before)
    print(f"{scenes} scenes encoded in {run.seconds:.0f} s", flush=True)
    student = TeacherForcing(dit, compiled=DEVICE.type == "cuda")
    target = TeacherForcing(averaged, compiled=DEVICE.type == "cuda")
    run.preparation_ends()
    while True:
        chunk_frames = CHUNKS[run.step % len(CHUNKS)]
        drawn = data.draw(batch)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            if teacher is None:
                loss = flow_matching_loss(student, drawn, data.no_prompt, chunk_frames)
            else:
                average.copy_to(averaged)
                loss = consistency_loss(student, target, teacher, drawn, data.no_prompt, chunk_frames)
        norm = optimizer.step(loss, run.learning_rate(PEAK_LEARNING_RATE[stage]))
        average.update()
        run.log(**{f"loss_{chunk_frames}": loss.detach()}, gradient=norm, every=51)
        if not run.advance():
            break
    average.copy_to(averaged)
    run.save(average=averaged.state_dict(), seed=seed)
    draw_sheets(target, data, output / stage, many_steps=stage == "diffusion")


def new_dit(seed: int) -> CausalDiT:
    """Return a denoiser with fresh weights: as torch draws them, except what should start near nothing."""
    torch.manual_seed(seed)
    dit = CausalDiT(MODEL.dit)
    for layer in dit.layers:
        nn.init.normal_(layer.modulation, std=0.02)
    for linear in (dit.time_embedding[0], dit.time_embedding[2], dit.time_projection[1]):
        assert isinstance(linear, nn.Linear), "the timestep's network is made of linear layers"
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    nn.init.zeros_(dit.head.head.weight)
    nn.init.zeros_(dit.head.head.bias)
    return dit


def shifted(uniform: torch.Tensor) -> torch.Tensor:
    """Return the noise level of a place in the schedule, both in [0, 1]."""
    return SHIFT * uniform / (1 + (SHIFT - 1) * uniform)


def per_chunk(values: torch.Tensor, chunk_frames: int) -> torch.Tensor:
    """Spread values [B, chunks] over the frames of each chunk, [B, F, 1, 1, 1]."""
    return values.repeat_interleave(chunk_frames, dim=1)[:, :, None, None, None]


def spoil_context(latents: torch.Tensor) -> torch.Tensor:
    """Add a little noise to the clean half of some clips."""
    level = CONTEXT_NOISE * torch.rand(len(latents), 1, 1, 1, 1, device=latents.device)
    level = level * (torch.rand_like(level) < 0.5)
    return (1 - level) * latents + level * torch.randn_like(latents)


def drop_prompts(embeds: torch.Tensor, no_prompt: torch.Tensor) -> torch.Tensor:
    """Replace some prompts by the empty one."""
    dropped = torch.rand(len(embeds), 1, 1, device=embeds.device) < NO_PROMPT_SHARE
    return torch.where(dropped, no_prompt, embeds)


def flow_matching_loss(
    student: TeacherForcing, batch: Batch, no_prompt: torch.Tensor, chunk_frames: int
) -> torch.Tensor:
    """Return the mean square error of the flow, noise minus latent, at a random noise level for each chunk."""
    x0 = batch.latents
    noise = torch.randn_like(x0)
    sigma = per_chunk(shifted(torch.rand(len(x0), LATENT_FRAMES // chunk_frames, device=x0.device)), chunk_frames)
    flow = student(
        (1 - sigma) * x0 + sigma * noise,
        spoil_context(x0),
        1000 * sigma.flatten(1),
        drop_prompts(batch.prompt_embeds, no_prompt),
        batch.positions,
        chunk_frames,
    )
    return (flow.float() - (noise - x0)).square().mean()


def consistency_loss(
    student: TeacherForcing,
    target: TeacherForcing,
    teacher: TeacherForcing,
    batch: Batch,
    no_prompt: torch.Tensor,
    chunk_frames: int,
) -> torch.Tensor:
    """Return how far the student's clean estimates at neighbouring noise levels of the teacher's path are apart."""
    x0, positions = batch.latents, batch.positions
    clean = spoil_context(x0)
    level = torch.randint(1, LEVELS + 1, (len(x0), LATENT_FRAMES // chunk_frames), device=x0.device)
    sigma, next_sigma = (per_chunk(shifted(place / LEVELS), chunk_frames) for place in (level, level - 1))
    noisy = (1 - sigma) * x0 + sigma * torch.randn_like(x0)
    with torch.no_grad():
        twice = torch.cat((batch.prompt_embeds, no_prompt.expand_as(batch.prompt_embeds)))
        flows = teacher(
            noisy.repeat(2, 1, 1, 1, 1),
            clean.repeat(2, 1, 1, 1, 1),
            1000 * sigma.flatten(1).repeat(2, 1),
            twice,
            positions.repeat(2, 1),
            chunk_frames,
        )
        guided, free = flows.float().chunk(2)
        flow = free + GUIDANCE * (guided - free)
        nearer = noisy + (next_sigma - sigma) * flow
        goal = (
            nearer
            - next_sigma
            * target(nearer, clean, 1000 * next_sigma.flatten(1), batch.prompt_embeds, positions, chunk_frames).float()
        )
    estimate = (
        noisy
        - sigma * student(noisy, clean, 1000 * sigma.flatten(1), batch.prompt_embeds, positions, chunk_frames).float()
    )
    # Pseudo-Huber over each frame: few clips that went another way must not outweigh the rest.
    error = (estimate - goal).square().mean(dim=(2, 3, 4))
    return ((error + 1e-4).sqrt() - 1e-2).mean()


Denoise = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


@torch.no_grad()
def sample(
    model: TeacherForcing,
    embeds: torch.Tensor,
    chunk_frames: int,
    steps: Sequence[int],
    *,
    no_prompt: torch.Tensor | None,
) -> torch.Tensor:
    """Generate latents [B, 9, C, h, w]: with few steps as the engine does, or, given the empty prompt, along the path.

    Args:
        model: The denoiser.
        embeds: [B, text_len, text_dim].
        chunk_frames: Frames denoised together.
        steps: Unwarped timesteps.
        no_prompt: The empty prompt's embedding, for guidance; None samples as a distilled model does.
    """
    channels, size = MODEL.dit.latent_channels, 16
    clean = torch.zeros(len(embeds), LATENT_FRAMES, channels, size, size, device=DEVICE)
    positions = torch.arange(LATENT_FRAMES, device=DEVICE).repeat(len(embeds), 1)
    schedule = FlowMatchSchedule(SHIFT)
    sigmas = [*(schedule.warp(steps) / 1000).tolist(), 0.0]
    for start in range(0, LATENT_FRAMES, chunk_frames):
        own = slice(start, start + chunk_frames)
        x = torch.randn_like(clean[:, own])
        for sigma, next_sigma in itertools.pairwise(sigmas):
            noisy = clean.clone()
            noisy[:, own] = x
            times = torch.full((len(embeds), LATENT_FRAMES), 1000 * sigma, device=DEVICE)
            flow = model(noisy, clean, times, embeds, positions, chunk_frames)[:, own].float()
            if no_prompt is not None:
                free = model(noisy, clean, times, no_prompt.expand_as(embeds), positions, chunk_frames)[:, own].float()
                x = x + (next_sigma - sigma) * (free + GUIDANCE * (flow - free))
            else:
                x0 = x - sigma * flow
                x = (1 - next_sigma) * x0 + next_sigma * torch.randn_like(x0)
        clean[:, own] = x
    return clean


def held_out_scenes(count: int) -> list[Scene]:
    """Return scenes that training never shows."""
    rng = np.random.default_rng(7)
    things = all_things(held_out=True)
    rng.shuffle(things)  # type: ignore[arg-type]
    return [
        Scene(
            things=(Thing(colour=t.colour, shape=t.shape, motion=t.motion, size=list(SIZES)[index % 3]),),
            background=BACKGROUNDS[index % 4],
        )
        for index, t in enumerate(things[:count])
    ]


def draw_sheets(model: TeacherForcing, data: Dataset, path: Path, *, many_steps: bool) -> None:
    """Write clips of held-out prompts, with chunks of three frames and of one."""
    embeds = data.embed([plain_caption(scene) for scene in held_out_scenes(12)])
    steps = tuple(range(1000, 0, -1000 // LEVELS)) if many_steps else FOUR_STEPS
    for chunk_frames in CHUNKS:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"), torch.inference_mode():
            latents = sample(model, embeds, chunk_frames, steps, no_prompt=data.no_prompt if many_steps else None)
            video = data.codec.decode(latents)
        write_sheet(video, path.with_name(f"{path.name}-{chunk_frames}.png"))
        assert math.isfinite(float(video.float().abs().max())), "training diverged"


if __name__ == "__main__":
    typer.run(main)
