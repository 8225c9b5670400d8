"""Attention for Hopper GPUs on one, against softmax attention in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from causal_forcing.plugins.kernels import hopper_launch

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")]

HEADS, HEAD_DIM = 12, 128
# ‖got - want‖ / ‖want‖. Weights and results are rounded to 8 and 11 bits; e4m3's weights to 4, by 2.5 % of their size.
TOLERANCES = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float8_e4m3fn: 4e-2}


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """Inputs on the GPU, and where the result goes: NaN until then."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor
    out: torch.Tensor
    workspace: torch.Tensor
    key_scales: torch.Tensor
    value_scales: torch.Tensor

    def launcher(self) -> Callable[[], None]:
        """Return what attends, after asking whether it may."""
        fp8 = self.q.dtype == torch.float8_e4m3fn
        v_cache = hopper_launch.split_v(self.values) if fp8 else self.values
        arguments = (self.q, self.keys, v_cache, self.valid, self.out)
        assert hopper_launch.accepts(*arguments, capability=torch.cuda.get_device_capability())
        if not fp8:
            return lambda: hopper_launch.attend(*arguments, self.workspace, scale=HEAD_DIM**-0.5)
        factors = self.key_scales * (HEAD_DIM**-0.5 * hopper_launch.LOG2_E)
        return lambda: hopper_launch.attend_fp8(
            *arguments, self.workspace, factors=factors, value_scales=self.value_scales
        )

    def expected(self) -> torch.Tensor:
        """Return the result in fp32."""
        segments = []
        for chunk, valid in zip(self.q.chunk(len(self.valid), dim=2), self.valid.tolist(), strict=True):
            heads = []
            for head in range(chunk.shape[1]):
                keys, values = (cache[0, head, :valid].double() for cache in (self.keys, self.values))
                logits = chunk[0, head].double() @ keys.T * (HEAD_DIM**-0.5 * self.key_scales[head].item())
                heads.append(logits.softmax(-1) @ values * self.value_scales[head].item())
            segments.append(torch.stack(heads))
        return torch.cat(segments, dim=1)[None].float()

    def assert_right(self) -> None:
        want = self.expected()
        assert self.out.isfinite().all(), "rows are missing"
        assert ((self.out.float() - want).norm() / want.norm()).item() <= TOLERANCES[self.q.dtype]


def make_case(
    *,
    tokens: int,
    slots: int,
    valid: list[int],
    dtype: torch.dtype = torch.bfloat16,
    merged: bool = False,
    heads: int = HEADS,
    seed: int = 0,
) -> Case:
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    fp8 = dtype == torch.float8_e4m3fn
    scales = torch.linspace(0.5, 1.5, heads, device="cuda") if fp8 else torch.ones(heads, device="cuda")
    out = torch.full((1, tokens, heads, HEAD_DIM), torch.nan, device="cuda", dtype=torch.bfloat16 if fp8 else dtype)
    programs = hopper_launch.count_programs(torch.cuda.current_device())
    return Case(
        q=rand(1, tokens, 3 if merged else 1, heads, HEAD_DIM)[:, :, 0].transpose(1, 2),
        keys=rand(1, heads, slots, HEAD_DIM),
        values=rand(1, heads, slots, HEAD_DIM),
        valid=torch.tensor(valid, dtype=torch.int32, device="cuda"),
        out=out.transpose(1, 2),
        workspace=torch.full((hopper_launch.workspace_bytes(programs),), 255, dtype=torch.uint8, device="cuda"),
        key_scales=scales,
        value_scales=scales.flip(0),
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("tokens", "slots", "valid"),
    [
        (1560, 32760, [32760]),
        (1560, 4680, [1]),
        (300, 1000, [777]),
        (128, 512, [512]),  # fewer blocks than programs
        (64, 6240, [6240]),
        (4680, 9360, [9360]),
        (600, 3000, [1200, 1500]),
        (3120, 6240, [4680, 6240]),
        (3120, 6240, [6240, 1]),
        (9360, 9360, [4680, 9360]),
    ],
)
def test_attention_of_any_length_equals_softmax_attention(
    dtype: torch.dtype, tokens: int, slots: int, valid: list[int]
) -> None:
    case = make_case(tokens=tokens, slots=slots, valid=valid, dtype=dtype, merged=len(valid) == 2)
    case.launcher()()
    case.assert_right()


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_attention_with_growing_logits_equals_softmax_attention(dtype: torch.dtype) -> None:
    """Keys that matter more and more towards the first slot, which comes last: every block has a new maximum."""
    case = make_case(tokens=200, slots=2000, valid=[1999], dtype=dtype)
    growth = torch.linspace(4, 0.1, 2000, device="cuda")[:, None]
    case.keys.copy_((case.keys.float() * growth).to(dtype))
    case.launcher()()
    case.assert_right()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_captured_attention_replayed_over_other_lengths_gives_their_result(dtype: torch.dtype) -> None:
    case = make_case(tokens=1560, slots=6240, valid=[6240], dtype=dtype)
    attend = case.launcher()
    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    for valid in (6240, 1, 127, 128, 129, 1560, 4000):
        case.valid.fill_(valid)
        case.out.fill_(torch.nan)
        graph.replay()
        case.assert_right()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("heads", "tokens", "valid"),
    [
        (12, 1560, 3100),
        (12, 1560, 1560),  # a chunk of one frame
        (6, 4680, 4680),  # a chunk of three frames, heads of one of two ranks: pieces of one block
    ],
)
def test_attention_repeated_gives_the_same_bits(dtype: torch.dtype, heads: int, tokens: int, valid: int) -> None:
    case = make_case(heads=heads, tokens=tokens, slots=valid + 20, valid=[valid], dtype=dtype)
    attend = case.launcher()
    attend()
    case.assert_right()
    first, wrong = case.out.clone(), torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(500):
        case.workspace.fill_(255)
        attend()
        wrong += (case.out != first).any()
    assert not wrong, f"{int(wrong)} of 500 launches gave something else"
