"""Two ranks make the clip that one makes: stores and collectives in captured graphs, and the kernels between them.

Each on a GPU of its own, or both on the only one, where NCCL sends through sockets.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runtime.rank_process import ClipCase, make_clip, run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SMALL = {"pixel_height": 64, "pixel_width": 96, "window_frames": 9}
CASES = {
    "fp32, outgrowing the window": (ClipCase(slug="tiny", blocks=5, geometry=SMALL, backend="cuda"), 1e-4),
    "fp32, from an image": (ClipCase(slug="tiny-i2v", blocks=4, geometry=SMALL, backend="cuda", image=True), 1e-4),
    # Products of fewer rows round elsewhere; full-size latents on two GPUs were 0.7 % off.
    "bf16, heads as wide as the model's": (
        ClipCase(slug="tiny", blocks=4, geometry=SMALL, backend="cuda", precision="bf16", wide=True),
        3e-2,
    ),
    "fp32, exchanged by stores": (ClipCase(slug="tiny", blocks=5, geometry=SMALL, backend="cuda", stores=True), 1e-4),
    "bf16, exchanged by stores": (
        ClipCase(slug="tiny", blocks=4, geometry=SMALL, backend="cuda", precision="bf16", wide=True, stores=True),
        3e-2,
    ),
}
"""Clips, and the error allowed relative to the latents' norm."""


def test_two_ranks_make_the_clip_that_one_makes(tmp_path: Path) -> None:
    by_rank = run_ranks([case for case, _ in CASES.values()], 2, tmp_path, on_gpus=True)
    for index, (name, (case, tolerance)) in enumerate(CASES.items()):
        want = make_clip(case, 1, device="cuda")
        for clips in by_rank:
            for kind in ("latents", "pixels"):
                got = clips[index][kind]
                assert got.isfinite().all(), name
                error = (got - want[kind]).norm() / want[kind].norm()
                assert error < tolerance, f"{name}: {kind} are {error:.1e} off"
