"""The training form of the DiT against the networks that engines are made from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from causal_forcing.build_engines.models.dit import CausalDiT, DiTContext, DiTStep, PromptKV, TimestepModulation
from causal_forcing.build_engines.random_weights import randomise
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.model_spec import TINY
from causal_forcing.runtime.rope import RopePhases
from causal_forcing.runtime.schedule import timestep_embedding

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "shapes"))
from teacher_forcing import TeacherForcing

FRAMES = 6


@pytest.mark.parametrize("chunk_frames", [1, 3])
@torch.inference_mode()
def test_training_sees_what_the_cached_engine_computes(chunk_frames: int) -> None:
    dit = CausalDiT(TINY.dit)
    randomise(dit, seed=0)
    geometry = Geometry(chunk_frames=chunk_frames, pixel_height=32, pixel_width=48, window_frames=FRAMES)
    generator = torch.Generator().manual_seed(1)
    noisy, clean = torch.randn(2, 1, FRAMES, 16, 4, 6, generator=generator)
    embeds = torch.randn(1, TINY.dit.text_len, TINY.dit.text_dim, generator=generator)
    timesteps = torch.linspace(50, 1000, FRAMES // chunk_frames).repeat_interleave(chunk_frames)[None]
    positions = torch.tensor([[0, 1, 2, 9, 10, 11]])

    flow = TeacherForcing(dit)(noisy, clean, timesteps, embeds, positions, chunk_frames)

    cross = PromptKV(dit)(embeds)
    shape = (1, TINY.dit.num_heads, geometry.cache_slots, TINY.dit.head_dim)
    caches: tuple[torch.Tensor, ...] = tuple(torch.zeros(shape) for _ in range(2 * TINY.dit.num_layers))
    cos, sin = torch.zeros(2, geometry.chunk_tokens, TINY.dit.head_dim // 2)
    rope = RopePhases(cos, sin, frames=chunk_frames, rows=geometry.token_rows, columns=geometry.token_columns)
    for start in range(0, FRAMES, chunk_frames):
        own = slice(start, start + chunk_frames)
        rope.place(int(positions[0, start]))
        slots = torch.arange(start, start + chunk_frames, dtype=torch.int32) * geometry.tokens_per_frame
        valid = torch.tensor([own.stop * geometry.tokens_per_frame], dtype=torch.int32)
        times = torch.stack((timesteps[0, start], torch.zeros(())))
        layers, head = TimestepModulation(dit)(timestep_embedding(times, TINY.dit.freq_dim).float())
        placed = (cos, sin, slots, valid)
        expected, *_ = DiTStep(dit)(noisy[:, own], layers[0], head[0], *placed, *cross, *caches)
        torch.testing.assert_close(flow[:, own], expected, rtol=1e-4, atol=1e-5)
        caches = DiTContext(dit)(clean[:, own], layers[1], *placed, *cross[:-2], *caches)
