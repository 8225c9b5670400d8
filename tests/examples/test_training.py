"""The training of `shapes`: losses and samplers with a model that is right by construction, and the VAE's fold."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from causal_forcing.build_engines.models.vae import WanVAE
from causal_forcing.build_engines.random_weights import randomise
from causal_forcing.runtime.model_spec import TINY
from causal_forcing.runtime.schedule import plan_variant
from causal_forcing.runtime.variant import find_variant

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "shapes"))
from dataset import Batch
from teacher_forcing import TeacherForcing
from train_dit import FOUR_STEPS, distillation_loss, flow_matching_loss, sample, shifted, teacher_path
from train_vae import Codec, folded, measure_latents
from training import AveragedWeights, Run

SHAPE = (2, 9, 16, 16, 16)


class Knowing:
    """Stands in for a denoiser: its flow leads straight to the latents it knows."""

    def __init__(self, known: torch.Tensor) -> None:
        self.known = known

    def remember(self, clean: torch.Tensor, *_: Any) -> list[Any]:
        return []

    def denoise(self, noisy: torch.Tensor, _: Any, timesteps: torch.Tensor, *rest: Any) -> torch.Tensor:
        sigma = timesteps[:, :, None, None, None] / 1000
        return (noisy - self.known.repeat(len(noisy) // len(self.known), 1, 1, 1, 1)) / sigma

    def __call__(self, noisy: torch.Tensor, _: Any, timesteps: torch.Tensor, *rest: Any) -> torch.Tensor:
        return self.denoise(noisy, None, timesteps)


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        latents=torch.randn(SHAPE, generator=generator),
        positions=torch.arange(9).repeat(2, 1),
        prompt_embeds=torch.zeros(2, 4, 8),
    )


@pytest.fixture
def model(batch: Batch) -> TeacherForcing:
    return cast(TeacherForcing, Knowing(batch.latents))


NO_PROMPT = torch.zeros(1, 4, 8)


@pytest.mark.parametrize("chunk_frames", [1, 3])
def test_path_passes_the_four_steps_and_ends_where_the_teacher_leads(
    model: TeacherForcing, batch: Batch, chunk_frames: int
) -> None:
    path = teacher_path(model, batch, NO_PROMPT, chunk_frames)
    noise = path[0]
    for step, place in zip(FOUR_STEPS, path, strict=False):
        sigma = shifted(step / 1000)
        torch.testing.assert_close(place, (1 - sigma) * batch.latents + sigma * noise, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(path[-1], batch.latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk_frames", [1, 3])
def test_losses_are_nothing_for_a_model_that_knows_and_something_for_one_that_does_not(
    model: TeacherForcing, batch: Batch, chunk_frames: int
) -> None:
    torch.manual_seed(0)
    wrong = cast(TeacherForcing, Knowing(torch.zeros(SHAPE)))
    path = teacher_path(model, batch, NO_PROMPT, chunk_frames)
    assert float(distillation_loss(model, batch, path, chunk_frames)) < 1e-4
    assert float(distillation_loss(wrong, batch, path, chunk_frames)) > 0.5
    assert float(flow_matching_loss(model, batch, NO_PROMPT, chunk_frames)) < 1e-4
    assert float(flow_matching_loss(wrong, batch, NO_PROMPT, chunk_frames)) > 0.5


@pytest.mark.parametrize("no_prompt", [None, NO_PROMPT], ids=["few steps", "guided path"])
def test_samples_of_a_model_that_knows_are_what_it_knows(
    model: TeacherForcing, batch: Batch, no_prompt: torch.Tensor | None
) -> None:
    latents = sample(model, batch.prompt_embeds, 3, FOUR_STEPS, no_prompt=no_prompt)
    torch.testing.assert_close(latents, batch.latents, rtol=1e-4, atol=1e-4)


def test_noise_levels_of_training_are_those_of_the_slug() -> None:
    plan = plan_variant(find_variant("shapes"))
    assert [shifted(step / 1000) for step in FOUR_STEPS] == pytest.approx([step.sigma for step in plan.chunk])


@torch.inference_mode()
def test_folded_encoder_gives_normalised_latents() -> None:
    vae = WanVAE(dataclasses.replace(TINY.vae, latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16))
    randomise(vae, seed=0)
    codec = Codec(vae)
    videos = [torch.rand(2, 5, 3, 16, 16) * 2 - 1 for _ in range(3)]
    measure_latents(codec, videos)
    raw = torch.cat([codec.encode(video) for video in videos])
    folded(codec)
    latents = torch.cat([codec.encode(video) for video in videos])
    deviation, mean = torch.std_mean(latents, dim=(0, 1, 3, 4))
    assert not torch.allclose(raw, latents, atol=0.1)
    torch.testing.assert_close(deviation, torch.ones(16), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mean, torch.zeros(16), rtol=1e-3, atol=2e-3)


def test_a_run_goes_on_from_its_checkpoint_and_tells_both(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = Run(tmp_path, "stage", steps=3, minutes=60)
        assert (run.resume() is None) == (seed == 0)
        while run.advance():
            pass
        run.save(seed=seed, weights=torch.zeros(2))
    state = Run(tmp_path, "stage", steps=3, minutes=60).resume()
    assert state is not None
    assert [(one["seed"], one["steps"]) for one in state["runs"]] == [(0, 3), (1, 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["stage.pt"]


def test_learning_rate_rises_stays_and_falls(tmp_path: Path) -> None:
    run = Run(tmp_path, "stage", steps=100, minutes=60)
    rates = []
    while True:
        rates.append(run.learning_rate(1.0, warmup=10, decay_from=0.5, floor=0.1))
        if not run.advance():
            break
    assert rates[0] == pytest.approx(0.1)
    assert rates[20] == 1.0
    assert rates[75] == pytest.approx(0.55)
    assert len(rates) == 100


def test_average_follows_the_weights() -> None:
    module = torch.nn.Linear(2, 2)
    average = AveragedWeights(module, decay=0.9)
    start = module.weight.detach().clone()
    torch.nn.init.ones_(module.weight)
    for _ in range(200):
        average.update()
    assert not torch.allclose(start, module.weight)
    torch.testing.assert_close(average.tensors[0], torch.ones(2, 2))
