"""Upstream's golden clips, made by two processes: each has the clip that upstream's one has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.parity import adapter
from tests.parity.test_golden import FP16_TOLERANCE, GOLDEN, MANIFEST
from tests.runtime.rank_process import spawn

NAMES = ["dit_b_local6_sink1_chunkwise", "pipeline_framewise_i2v"]
"""Passes over a window with a sink, and a clip from a given latent to pixels."""

RANKS = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """What each rank made."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(make_clips, RANKS, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def make_clips(rank: int, folder: Path) -> None:
    """Make all clips as one of the ranks; tapes, whose ops run their plain bodies on a CPU."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    clips = {}
    for name in NAMES:
        case = MANIFEST["cases"][name]
        chunks, _ = adapter.generate_clip(case, MANIFEST["weights"], GOLDEN, "cuda-on-cpu", ranks=RANKS)
        latents, pixels = (torch.cat([getattr(c, kind) for c in chunks], dim=1) for kind in ("latents", "pixels"))
        clips[name] = (latents, pixels)
    torch.save(clips, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("name", NAMES)
def test_golden_clip_is_reproduced_by_every_rank(
    name: str, rank: int, made: list[dict[str, tuple[torch.Tensor, torch.Tensor]]]
) -> None:
    case = MANIFEST["cases"][name]
    want = load_file(GOLDEN / case["file"])
    latents, pixels = made[rank][name]
    torch.testing.assert_close(latents, want["latents"], **case["tolerance"])
    if "pixels_fp16" in want:
        stored = want["pixels_fp16"].float()
        torch.testing.assert_close(pixels, stored, atol=FP16_TOLERANCE, rtol=case["tolerance"]["rtol"])
