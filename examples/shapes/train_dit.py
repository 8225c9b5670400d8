"""Train the denoiser of `shapes`, in two stages.

`diffusion`: autoregressive flow matching with teacher forcing; every chunk has its own noise level, shifted by 5.
`distil`: causal ODE distillation: from the noise levels of a four-step clip straight to where the teacher's path ends,
which classifier-free guidance has sharpened.

    python examples/shapes/train_dit.py diffusion --output runs/shapes --minutes 8
    python examples/shapes/train_dit.py distil --output runs/shapes --minutes 8

Chunks of three frames and of one take turns, so that one set of weights serves the chunkwise and framewise variants.
A stage goes on from its own averaged weights where there are some.

The stages are those of Causal Forcing (arXiv 2602.02214), without its last one.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
import typer
from dataset import Batch, Dataset
from teacher_forcing import TeacherForcing
from torch import nn
from training import DEVICE, AveragedWeights, Optimizer, Run, write_sheet

from causal_forcing.build_engines.models.dit import CausalDiT
from causal_forcing.build_engines.shapes.evaluation import held_out_cases
from causal_forcing.build_engines.shapes.world import TRAINED_LATENT_FRAMES
from causal_forcing.runtime.model_spec import SHAPES as MODEL
from causal_forcing.runtime.schedule import shift_sigma
from causal_forcing.runtime.variant import find_variant

VARIANT = find_variant("shapes")
FOUR_STEPS = VARIANT.denoising_steps
CHUNKS = (3, 1)
"""Latent frames denoised together, in turn."""

NO_PROMPT_SHARE = 0.1
"""Share of clips whose prompt is empty, for the teacher's guidance."""

CONTEXT_NOISE = 0.1
"""Largest noise level of the clean half, in half of the clips: a generated past is not perfect either."""

GUIDANCE = 2.5
PATH_STEPS = 16
"""Euler steps of the teacher's path."""

UPDATES_PER_PATH = 6

EVEN_SHARE = 0.3
"""Share of noise levels that are drawn evenly, not shifted: outlines are a matter of the low ones."""

PEAK_LEARNING_RATE = {"diffusion": 2e-3, "distil": 1e-3}

Stage = Literal["diffusion", "distil"]
Result = TypeVar("Result")
Place = TypeVar("Place", float, torch.Tensor)


def main(
    stage: Annotated[Stage, typer.Argument(help="Which stage.")],
    output: Annotated[Path, typer.Option(help="Folder of this run.")] = Path("runs/shapes"),
    minutes: Annotated[float, typer.Option(help="Time that this run may take, preparation included.")] = 8.0,
    steps: Annotated[int, typer.Option(help="Most optimizer steps.")] = 1_000_000,
    batch: Annotated[int, typer.Option(help="Clips a step.")] = 128,
    scenes: Annotated[int, typer.Option(help="Different scenes to encode first.")] = 24_576,
    is_captured: Annotated[bool, typer.Option("--graphs/--no-graphs", help="Whether GPU work is replayed.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of weights, scenes and noise.")] = 0,
) -> None:
    """Train, and write `diffusion.pt` or `distil.pt`, and a sheet of clips of held-out prompts."""
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
    data = Dataset(output, scenes=scenes, seed=seed + 1)
    print(f"{scenes} scenes encoded in {run.seconds:.0f} s", flush=True)
    student = TeacherForcing(dit, compiled=DEVICE.type == "cuda")
    run.preparation_ends()
    turns = [Turn(chunk_frames, student, teacher, data, batch, is_captured=is_captured) for chunk_frames in CHUNKS]
    while True:
        turn = turns[run.step // UPDATES_PER_PATH % len(turns)]
        if run.step % UPDATES_PER_PATH == 0:
            turn.prepare()
        loss = turn.backward()
        norm = optimizer.step(run.learning_rate(PEAK_LEARNING_RATE[stage]))
        average.update()
        run.log(**{f"loss_{turn.chunk_frames}": loss.detach()}, gradient=norm, every=52)
        if not run.advance():
            break
    average.copy_to(averaged)
    run.save(average=averaged.state_dict(), seed=seed)
    draw_sheet(averaged, data, output / f"{stage}.png", is_distilled=stage == "distil")


class Turn:
    """The work of a few steps with one chunk size; replayed on a GPU, where launches take longer than the kernels.

    Args:
        chunk_frames: Frames denoised together.
        student: What is trained.
        teacher: What it is distilled from; None trains on the data itself.
        data: Where batches come from.
        batch: Clips.
        is_captured: Whether the work becomes a graph.
    """

    def __init__(
        self,
        chunk_frames: int,
        student: TeacherForcing,
        teacher: TeacherForcing | None,
        data: Dataset,
        batch: int,
        *,
        is_captured: bool,
    ) -> None:
        self.chunk_frames = chunk_frames
        self._student, self._teacher, self._data, self._batch = student, teacher, data, batch
        once = replayed if is_captured and DEVICE.type == "cuda" else as_it_is
        self.prepare = once(self._follow_path) if teacher is not None else lambda: None
        self.backward = once(self._descend)

    def _follow_path(self) -> None:
        assert self._teacher is not None, "there is a path where there is a teacher"
        self._drawn = self._data.draw(self._batch)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"), torch.no_grad():
            self._path = teacher_path(self._teacher, self._drawn, self._data.no_prompt, self.chunk_frames)

    def _descend(self) -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            if self._teacher is None:
                drawn = self._data.draw(self._batch)
                loss = flow_matching_loss(self._student, drawn, self._data.no_prompt, self.chunk_frames)
            else:
                loss = distillation_loss(self._student, self._drawn, self._path, self.chunk_frames)
        loss.backward()
        return loss


def as_it_is(work: Callable[[], Result]) -> Callable[[], Result]:
    """Return `work`."""
    return work


def replayed(work: Callable[[], Result]) -> Callable[[], Result]:
    """Return what repeats `work` as a captured graph, with fresh random numbers; results stay in place."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Result:
        graph.replay()
        return result

    return replay


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


def shifted(place: Place) -> Place:
    """Return the noise level of a place in the schedule, both in [0, 1]."""
    return shift_sigma(place, VARIANT.timestep_shift)


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
    place, choice = torch.rand(2, len(x0), TRAINED_LATENT_FRAMES // chunk_frames, device=x0.device)
    sigma = per_chunk(torch.where(choice < EVEN_SHARE, place, shifted(place)), chunk_frames)
    flow = student(
        (1 - sigma) * x0 + sigma * noise,
        spoil_context(x0),
        1000 * sigma.flatten(1),
        drop_prompts(batch.prompt_embeds, no_prompt),
        batch.positions,
        chunk_frames,
    )
    return (flow.float() - (noise - x0)).square().mean()


def teacher_path(teacher: TeacherForcing, batch: Batch, no_prompt: torch.Tensor, chunk_frames: int) -> torch.Tensor:
    """Follow the guided teacher from noise to latents behind clean chunks.

    Returns:
        [5, B, F, C, h, w] fp32: where the path is at each of the four steps' noise levels, and its end.
    """
    x = torch.randn_like(batch.latents)
    embeds = torch.cat((batch.prompt_embeds, no_prompt.expand_as(batch.prompt_embeds)))
    positions = batch.positions.repeat(2, 1)
    past = teacher.remember(batch.latents.repeat(2, 1, 1, 1, 1), embeds, positions, chunk_frames)
    seen = []
    for step in range(PATH_STEPS):
        if 1000 - 1000 * step // PATH_STEPS in FOUR_STEPS:
            seen.append(x)
        sigma, next_sigma = (shifted(1 - place / PATH_STEPS) for place in (step, step + 1))
        times = torch.full(positions.shape, 1000 * sigma, device=x.device)
        flows = teacher.denoise(x.repeat(2, 1, 1, 1, 1), past, times, embeds, positions, chunk_frames)
        guided, free = flows.float().chunk(2)
        x = x + (next_sigma - sigma) * (free + GUIDANCE * (guided - free))
    return torch.stack((*seen, x))


def distillation_loss(student: TeacherForcing, batch: Batch, path: torch.Tensor, chunk_frames: int) -> torch.Tensor:
    """Return how far the student's estimates are off, from one of the four steps for each chunk.

    From the first three steps it shall come to where the teacher's path ends; from the last one, at which little is
    open any more, to the clip itself, of which the teacher is only a copy.
    """
    latents, last = batch.latents, len(FOUR_STEPS) - 1
    step = torch.randint(last + 1, (len(latents), TRAINED_LATENT_FRAMES // chunk_frames), device=latents.device)
    step = per_chunk(step, chunk_frames)
    sigmas = torch.stack([torch.full((), shifted(place / 1000), device=latents.device) for place in FOUR_STEPS])
    sigma = sigmas[step]
    on_path = path[:-1].gather(0, step.expand_as(latents)[None])[0]
    noisy = torch.where(step == last, (1 - sigma) * latents + sigma * torch.randn_like(latents), on_path)
    goal = torch.where(step == last, latents, path[-1])
    flow = student(
        noisy, spoil_context(latents), 1000 * sigma.flatten(1), batch.prompt_embeds, batch.positions, chunk_frames
    )
    # Pseudo-Huber over each frame: the few that went another way must not outweigh the rest.
    error = (noisy - sigma * flow.float() - goal).square().mean(dim=(2, 3, 4))
    return ((error + 1e-4).sqrt() - 1e-2).mean()


@torch.no_grad()
def sample(
    model: TeacherForcing,
    embeds: torch.Tensor,
    chunk_frames: int,
    steps: Sequence[int],
    *,
    no_prompt: torch.Tensor | None,
) -> torch.Tensor:
    """Generate latents [B, 9, C, h, w]: in few steps as the engine does, or, given the empty prompt, along the path.

    Args:
        model: The denoiser.
        embeds: [B, text_len, text_dim].
        chunk_frames: Frames denoised together.
        steps: Unwarped timesteps.
        no_prompt: The empty prompt's embedding, for guidance; None samples as a distilled model does.
    """
    latents = torch.randn(len(embeds), TRAINED_LATENT_FRAMES, MODEL.dit.latent_channels, 16, 16, device=DEVICE)
    positions = torch.arange(TRAINED_LATENT_FRAMES, device=DEVICE).repeat(len(embeds), 1)
    sigmas = [*(shifted(step / 1000) for step in steps), 0.0]
    for start in range(0, TRAINED_LATENT_FRAMES, chunk_frames):
        own = slice(start, start + chunk_frames)
        pasts = [
            (prompt, model.remember(latents, prompt, positions, chunk_frames))
            for prompt in (embeds, *(() if no_prompt is None else (no_prompt.expand_as(embeds),)))
        ]
        for sigma, next_sigma in itertools.pairwise(sigmas):
            times = torch.full(positions.shape, 1000 * sigma, device=DEVICE)
            flow, *free = (
                model.denoise(latents, past, times, prompt, positions, chunk_frames)[:, own].float()
                for prompt, past in pasts
            )
            x = latents[:, own]
            if free:
                latents[:, own] = x + (next_sigma - sigma) * (free[0] + GUIDANCE * (flow - free[0]))
            else:
                latents[:, own] = (1 - next_sigma) * (x - sigma * flow) + next_sigma * torch.randn_like(x)
    return latents


def draw_sheet(dit: CausalDiT, data: Dataset, path: Path, *, is_distilled: bool) -> None:
    """Write chunkwise clips of held-out prompts."""
    model = TeacherForcing(dit)
    embeds = data.embed([case.prompt for case in held_out_cases(12)])
    steps = FOUR_STEPS if is_distilled else tuple(range(1000, 0, -50))
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"), torch.inference_mode():
        latents = sample(model, embeds, CHUNKS[0], steps, no_prompt=None if is_distilled else data.no_prompt)
        video = data.codec.decode(latents)
    write_sheet(video, path)


if __name__ == "__main__":
    typer.run(main)
