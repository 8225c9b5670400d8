"""Noise: a function of (seed, chunk, pass) alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from causal_forcing.runtime.errors import UsageError
from causal_forcing.runtime.noise import GivenNoise, SeededNoise

SHAPE = (4, 1, 3, 16, 4, 6)
SMALL = (3, 1, 2, 1, 1, 1)


def drawn(seed: int, chunk: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    noise = torch.full(shape, float("nan"))
    SeededNoise(seed).fill(chunk, noise)
    return noise


def test_seeded_noise_for_chunks_in_any_order_is_the_same() -> None:
    source = SeededNoise(5)
    forwards = {chunk: torch.empty(SHAPE) for chunk in (0, 1, 2)}
    for chunk, noise in forwards.items():
        source.fill(chunk, noise)
    for chunk in (2, 0, 1):
        assert torch.equal(drawn(5, chunk), forwards[chunk])


def test_seeded_noise_for_fewer_passes_is_the_same_in_each_pass() -> None:
    assert torch.equal(drawn(5, 3, (2, *SHAPE[1:])), drawn(5, 3)[:2])


def test_seeded_noise_of_other_chunks_passes_and_seeds_differs() -> None:
    streams = [drawn(seed, chunk)[index] for seed in (0, 1, 2**64 - 1) for chunk in (0, 1, 10**6) for index in range(4)]
    for index, stream in enumerate(streams):
        for other in streams[:index]:
            correlation = torch.corrcoef(torch.stack((stream.flatten(), other.flatten())))[0, 1]
            assert correlation.abs() < 0.15


def test_seeded_noise_is_unit_normal() -> None:
    noise = drawn(0, 0, (4, 1, 3, 16, 30, 52))
    assert noise.dtype == torch.float32
    assert noise.mean().abs() < 0.01
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert noise.abs().max() > 4
    assert (noise.abs() < 1).double().mean().item() == pytest.approx(0.6827, abs=0.005)


def test_seeded_noise_in_any_process_and_with_any_numpy_is_the_same() -> None:
    """NumPy does not promise its streams: a clip's record would no longer repeat the clip if these numbers changed."""
    want = [0.4908353, -0.3427288, 0.2264095, 0.4140315, 1.7623352, 0.6839198]
    torch.testing.assert_close(drawn(42, 1, SMALL).flatten(), torch.tensor(want), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeded_noise_with_a_seed_out_of_range_names_the_range(seed: int) -> None:
    with pytest.raises(UsageError, match=f"seed {seed} is out of range.*from 0 to {2**64 - 1}"):
        SeededNoise(seed)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_seeded_noise_with_a_seed_at_an_end_of_the_range_is_finite(seed: int) -> None:
    assert drawn(seed, 0).isfinite().all()


def given() -> tuple[torch.Tensor, dict[tuple[int, int], torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    initial = torch.randn(1, 4, 1, 1, 1, generator=generator)
    renoise = {(chunk, step): torch.randn(1, 2, 1, 1, 1, generator=generator) for chunk in (0, 1) for step in (0, 1)}
    return initial, renoise


def test_given_noise_for_each_chunk_takes_its_frames_and_its_passes() -> None:
    initial, renoise = given()
    noise = torch.zeros(SMALL)
    GivenNoise(initial, renoise).fill(1, noise)
    assert torch.equal(noise[0], initial[:, 2:4])
    assert torch.equal(noise[1], renoise[1, 0])
    assert torch.equal(noise[2], renoise[1, 1])


def test_given_noise_for_a_pass_without_a_draw_does_not_keep_an_earlier_chunks() -> None:
    initial, renoise = given()
    del renoise[1, 1]
    source, noise = GivenNoise(initial, renoise), torch.zeros(SMALL)
    source.fill(0, noise)
    source.fill(1, noise)
    assert torch.equal(noise[1], renoise[1, 0])
    assert noise[2].isnan().all()


def test_given_noise_for_a_chunk_beyond_its_end_says_what_it_holds() -> None:
    with pytest.raises(UsageError, match="holds 4 latent frames, chunk 2 needs 4 to 5: ask for fewer blocks"):
        GivenNoise(*given()).fill(2, torch.zeros(SMALL))


def test_given_noise_of_another_shape_says_both_shapes() -> None:
    initial, renoise = given()
    with pytest.raises(UsageError, match=r"pass 0 is \(1, 2, 1, 1, 1\), expected \(1, 2, 1, 1, 5\)"):
        GivenNoise(initial, renoise).fill(0, torch.zeros(3, 1, 2, 1, 1, 5))
    renoise[0, 1] = renoise[0, 1][..., :0]
    with pytest.raises(UsageError, match=r"pass 2 is \(1, 2, 1, 1, 0\), expected \(1, 2, 1, 1, 1\)"):
        GivenNoise(initial, renoise).fill(0, torch.zeros(SMALL))


def test_given_noise_from_a_file_is_what_the_file_holds(tmp_path: Path) -> None:
    initial, renoise = given()
    path = tmp_path / "noise.safetensors"
    steps = {f"renoise.block{chunk:02}.step{step}": tensor for (chunk, step), tensor in renoise.items()}
    save_file({"noise": initial, **steps, "other": torch.zeros(1)}, path)
    for chunk in (0, 1):
        want, got = torch.zeros(SMALL), torch.zeros(SMALL)
        GivenNoise(initial, renoise).fill(chunk, want)
        GivenNoise.from_file(path).fill(chunk, got)
        assert torch.equal(got, want)


def test_given_noise_from_a_file_without_noise_says_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "noise.safetensors"
    save_file({"latents": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match="holds no tensor named noise but latents"):
        GivenNoise.from_file(path)
