"""The schedule: facts about upstream's numbers that hold without any golden file."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_forcing.runtime.schedule import (
    FlowMatchSchedule,
    add_noise_,
    flow_to_x0_,
    plan_denoising,
    timestep_embedding,
)
from causal_forcing.runtime.variant import VARIANTS

FOUR = (1000, 750, 500, 250)
WARPED = (1000.0, 937.5, 833.33331, 625.0)


@pytest.fixture(scope="module")
def schedule() -> FlowMatchSchedule:
    return FlowMatchSchedule(5.0)


def test_schedule_at_shift_5_runs_from_1000_down_to_just_above_0(schedule: FlowMatchSchedule) -> None:
    assert schedule.timesteps.dtype == schedule.sigmas.dtype == torch.float32
    assert schedule.timesteps.shape == (1000,)
    assert schedule.timesteps[0] == 1000
    assert schedule.timesteps[-1].item() == pytest.approx(4.98008, abs=1e-5)
    assert (schedule.timesteps.diff() < 0).all()


def test_schedule_at_shift_1_is_linear() -> None:
    linear = torch.arange(1000, 0, -1, dtype=torch.float32)
    torch.testing.assert_close(FlowMatchSchedule(1.0).timesteps, linear, atol=1e-3, rtol=0)


def test_warp_of_the_four_steps_gives_upstreams_float32_values(schedule: FlowMatchSchedule) -> None:
    warped = schedule.warp(FOUR)
    assert warped.dtype == torch.float32
    assert torch.equal(warped, torch.tensor(WARPED))


def test_warp_of_0_gives_exactly_0(schedule: FlowMatchSchedule) -> None:
    assert schedule.warp([0]).tolist() == [0.0]


def test_sigma_of_timestep_0_is_the_tables_last_and_not_0(schedule: FlowMatchSchedule) -> None:
    sigma = schedule.sigma(torch.tensor([0.0]))
    assert sigma.item() == pytest.approx(0.00498008, abs=1e-7)
    assert sigma.item() == schedule.sigmas[-1].item()


def test_sigma_of_a_table_entry_is_that_entry_in_any_shape(schedule: FlowMatchSchedule) -> None:
    wanted = schedule.sigmas[::10].reshape(4, 25)
    assert torch.equal(schedule.sigma(schedule.timesteps[::10].reshape(4, 25)), wanted)
    assert torch.equal(schedule.sigma(schedule.timesteps[::10].reshape(4, 25).double()), wanted)


def test_sigma_halfway_between_two_entries_is_the_first(schedule: FlowMatchSchedule) -> None:
    table = schedule.timesteps
    middle = (table[:-1] + table[1:]) / 2
    ties = ((table[:-1] - middle).abs() == (table[1:] - middle).abs()).nonzero().flatten()
    assert len(ties) > 10
    assert torch.equal(schedule.sigma(middle[ties]), schedule.sigmas[:-1][ties])


def test_timestep_embedding_is_cos_then_sin_of_fp64_angles() -> None:
    timesteps = torch.tensor([0.0, 937.5, 833.33331])
    embedding = timestep_embedding(timesteps, 6)
    assert embedding.dtype == torch.float64
    angles = [[t * 10000 ** (-i / 3) for i in range(3)] for t in timesteps.double().tolist()]
    want = [[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles]
    torch.testing.assert_close(embedding, torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=0)


def test_timestep_embedding_of_a_timestep_that_bf16_cannot_hold_is_not_rounded() -> None:
    exact = timestep_embedding(torch.tensor([937.5]), 256)
    rounded = timestep_embedding(torch.tensor([937.5]).bfloat16().float(), 256)
    assert (exact - rounded).abs().max() > 0.1


def test_plan_of_four_steps_has_a_row_for_each_timestep_and_one_for_the_clean_passes() -> None:
    plan = plan_denoising(shift=5.0, steps=FOUR, first_chunk_steps=None, context_timestep=0.0)
    assert plan.timesteps == pytest.approx((*WARPED, 0.0), abs=1e-5)
    assert plan.first_chunk == plan.chunk
    assert [step.table_index for step in plan.chunk] == [0, 1, 2, 3]
    assert (plan.context_index, plan.initial_index) == (4, 4)
    assert plan.max_steps == 4


def test_plan_of_any_variant_leads_each_step_to_the_next_ones_sigma() -> None:
    for variant in VARIANTS.values():
        plan = plan_denoising(
            shift=variant.timestep_shift,
            steps=variant.denoising_steps,
            first_chunk_steps=variant.first_chunk_denoising_steps,
            context_timestep=variant.context_timestep,
        )
        schedule = FlowMatchSchedule(variant.timestep_shift)
        assert len(set(plan.timesteps)) == len(plan.timesteps)
        for steps in (plan.first_chunk, plan.chunk):
            assert steps[0].sigma == 1.0
            assert steps[-1].next_sigma is None
            assert [step.next_sigma for step in steps[:-1]] == [step.sigma for step in steps[1:]]
            for step in steps:
                timestep = torch.tensor([plan.timesteps[step.table_index]])
                assert schedule.sigma(timestep).item() == step.sigma


@pytest.mark.parametrize("steps", [(1000, 500), (1000,)])
def test_plan_of_few_steps_shares_the_rows_of_its_four_step_first_chunk(steps: tuple[int, ...]) -> None:
    plan = plan_denoising(shift=5.0, steps=steps, first_chunk_steps=FOUR, context_timestep=0.0)
    assert len(plan.chunk) == len(steps)
    assert len(plan.first_chunk) == plan.max_steps == 4
    assert sorted(plan.timesteps) == pytest.approx([0.0, 625.0, 833.33331, 937.5, 1000.0], abs=1e-5)
    assert [plan.timesteps[step.table_index] for step in plan.first_chunk] == pytest.approx(WARPED, abs=1e-5)
    warped = dict(zip(FOUR, WARPED, strict=True))
    assert [plan.timesteps[step.table_index] for step in plan.chunk] == pytest.approx([warped[s] for s in steps])


def test_plan_with_a_noisy_context_keeps_initial_latents_at_timestep_0() -> None:
    plan = plan_denoising(shift=5.0, steps=FOUR, first_chunk_steps=None, context_timestep=100)
    assert plan.timesteps[plan.context_index] == 100.0
    assert plan.timesteps[plan.initial_index] == 0.0
    assert len(plan.timesteps) == 6


def test_plan_with_a_context_timestep_of_the_schedule_shares_its_row() -> None:
    plan = plan_denoising(shift=5.0, steps=FOUR, first_chunk_steps=None, context_timestep=625.0)
    assert plan.context_index == plan.chunk[3].table_index


def test_plan_without_warping_takes_the_steps_as_they_are() -> None:
    plan = plan_denoising(shift=5.0, steps=FOUR, first_chunk_steps=None, context_timestep=0.0, warp=False)
    assert plan.timesteps == (1000.0, 750.0, 500.0, 250.0, 0.0)
    assert plan.chunk[1].sigma == pytest.approx(0.75, abs=1e-3)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(sigma=st.floats(2**-8, 1.0, width=32), seed=st.integers(0, 2**31))
def test_flow_to_x0_of_a_noised_latent_gives_the_latent_back(sigma: float, seed: int) -> None:
    clean, noise = torch.randn(2, 1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    latent = clean.clone()
    add_noise_(latent, noise, sigma)
    torch.testing.assert_close(latent, (1 - sigma) * clean + sigma * noise, atol=1e-6, rtol=1e-5)
    flow_to_x0_(latent, noise - clean, sigma, torch.empty_like(latent, dtype=torch.float64))
    torch.testing.assert_close(latent, clean, atol=2e-6, rtol=1e-5)


def test_steps_with_a_tensor_of_sigmas_broadcast_it() -> None:
    clean, noise = torch.ones(2, 3), torch.zeros(2, 3)
    sigma = torch.tensor([[0.25], [1.0]])
    add_noise_(clean, noise, sigma)
    assert torch.equal(clean, torch.tensor([[0.75], [0.0]]).expand(2, 3))
    flow_to_x0_(clean, torch.ones(2, 3), sigma, torch.empty(2, 3, dtype=torch.float64))
    assert torch.equal(clean, torch.tensor([[0.5], [-1.0]]).expand(2, 3))


def test_flow_to_x0_of_bf16_latents_rounds_once_at_the_end() -> None:
    latent, flow = torch.tensor([1.0078125]).bfloat16(), torch.tensor([2.984375]).bfloat16()
    want = (latent.double() - 0.3337 * flow.double()).bfloat16()
    flow_to_x0_(latent, flow, 0.3337, torch.empty(1, dtype=torch.float64))
    assert torch.equal(latent, want)
