"""Two ranks make the clip that one makes: stores and collectives in captured graphs, and the kernels between them.

Each on a GPU of its own, or both on the only one, where NCCL sends through sockets.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.runtime.rank_process import ClipCase, make_clip, run_ranks
from tests.runtime.test_gpu_cuda_engine import LEEWAY, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SMALL = {"pixel_height": 64, "pixel_width": 96, "window_frames": 9}
FP32 = ClipCase(slug="tiny", blocks=5, geometry=SMALL, backend="cuda")
BF16 = ClipCase(slug="tiny", blocks=4, geometry=SMALL, backend="cuda", precision="bf16", wide=True)
CASES = {
    "fp32, outgrowing the window": FP32,
    "fp32, from an image": replace(FP32, slug="tiny-i2v", blocks=4, image=True),
    "bf16, heads as wide as the model's": BF16,
    "fp32, exchanged by stores": replace(FP32, stores=True),
    "bf16, exchanged by stores": replace(BF16, stores=True),
}
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2}
"""Relative to the norm of what one rank makes. In bf16 products of fewer rows round elsewhere: what two ranks make is
also as far from fp32 as what one makes, within `LEEWAY`."""


def test_two_ranks_make_the_clip_that_one_makes(tmp_path: Path) -> None:
    by_rank = run_ranks(list(CASES.values()), 2, tmp_path, on_gpus=True)
    for index, (name, case) in enumerate(CASES.items()):
        one = make_clip(case, 1, device="cuda")
        exact = make_clip(replace(case, precision="fp32"), 1, device="cuda") if case.precision == "bf16" else None
        for clips in by_rank:
            for kind in ("latents", "pixels"):
                got = clips[index][kind]
                error = relative_error(got, one[kind])
                assert error < TOLERANCES[case.precision], f"{name}: {kind} are {error:.1e} off"
                if exact is not None:
                    error, limit = relative_error(got, exact[kind]), LEEWAY * relative_error(one[kind], exact[kind])
                    assert error <= limit, f"{name}: {kind} are {error:.1e} from fp32, {limit:.1e} allowed"
