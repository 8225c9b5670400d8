"""The kernels around matrix products without a GPU: by Triton's interpreter, against the bodies of the fused ops.

The interpreter converts in its own way. To bf16 it truncates, where a GPU rounds. To e4m3 it rounds ties away from 0,
truncates subnormals, and drops the carry of what rounds up to a power of two, which becomes half of it: such values are
for the tests on a GPU.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from causal_forcing.plugins import dit_ops, fp8_ops
from tests.triton_interpreter import interpret

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

EPS = 1e-6
DTYPES = (torch.float32, torch.bfloat16)
# fp32: sums of at most 160 squares in another order. bf16: one truncation, of which the last bit is 2⁻⁷.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-7 + 1e-5}

Case = tuple[str, dict[str, Any]]
Result = tuple[torch.Tensor, ...]


def rand(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def add_norm_case(
    dtype: torch.dtype,
    *,
    batch: int = 1,
    tokens: int = 6,
    dim: int = 96,
    segments: int = 0,
    parts: str = "branch gate shift scale",
    norm: str = "layer",
    **others: Any,
) -> Case:
    """Make a call of `run_add_norm` with the named tensors, modulation by segment where there are any."""
    arguments: dict[str, Any] = {"x": 2 * rand(batch, tokens, dim, seed=0, dtype=dtype), "eps": EPS, "norm": norm}
    for seed, part in enumerate(parts.split(), start=1):
        shape: tuple[int, ...] = (dim,)
        if part == "branch":
            shape = (batch, tokens, dim)
        elif part in ("gate", "shift", "scale") and segments:
            shape = (segments, dim)
        arguments[part] = rand(*shape, seed=seed, dtype=dtype)
    return "add_norm", arguments | others


def with_views(case: Case) -> Case:
    """Hand modulation over as the model does: rows of a table of six."""
    kind, arguments = case
    names = [name for name in ("gate", "shift", "scale") if name in arguments]
    table = torch.stack([arguments[name] for name in names], dim=-2)
    return kind, arguments | dict(zip(names, table.unbind(-2), strict=True))


ADD_NORMS = [
    case
    for dtype in DTYPES
    for case in (
        *(add_norm_case(dtype, dim=dim) for dim in (1, 8, 64, 96, 160)),
        add_norm_case(dtype, batch=2, tokens=4, segments=2),
        add_norm_case(dtype, batch=2, tokens=6, segments=3, dim=160),
        add_norm_case(dtype, tokens=3, segments=3),
        with_views(add_norm_case(dtype, batch=2, tokens=6, segments=3)),
        with_views(add_norm_case(dtype)),
        add_norm_case(dtype, parts="branch weight bias"),
        add_norm_case(dtype, parts="branch gate", batch=2, segments=2, norm="none"),
        add_norm_case(dtype, parts="shift scale", batch=2, segments=3),
        add_norm_case(dtype, parts="weight", norm="rms", dim=160),
        add_norm_case(dtype, parts="branch gate weight bias", segments=2),
    )
]
QUANTISED = [
    case
    for dtype in DTYPES
    for case in (
        add_norm_case(dtype, quantised_scale=2**-6),
        add_norm_case(dtype, dim=160, parts="branch gate shift scale multiplier", segments=3, quantised_scale=2**-6),
        add_norm_case(dtype, parts="branch weight bias multiplier", quantised_scale=2**-7),
        add_norm_case(dtype, parts="shift scale", quantised_scale=2**-10),  # most of it beyond the largest code
    )
]
QUANTIZES: list[Case] = [
    ("quantize", {"x": 3 * rand(*shape, seed=0, dtype=dtype), "multiplier": multiplier, "scale": scale, "gelu": gelu})
    for dtype in DTYPES
    for shape, scale in (((2, 3, 96), 2**-6), ((5, 2500), 2**-5), ((4, 160), 2**-9))
    for gelu in (False, True)
    for multiplier in (None, rand(shape[-1], seed=1, dtype=dtype))
]


def place_case(
    dtype: torch.dtype,
    *,
    batch: int,
    heads: int,
    depth: int,
    tokens_per_frame: int,
    slots: list[int] | None,
    cache_slots: int,
    frames: int = 1,
    with_values: bool = True,
) -> Case:
    """Make a call of `place_projections`; queries, keys and values are slices of one product, as the model's."""
    tokens, dim = tokens_per_frame * (frames if slots is None else len(slots)), heads * depth
    q, k, v = rand(batch, tokens, 3 * dim, seed=0, dtype=dtype).chunk(3, dim=-1)
    angle = rand(tokens, depth // 2, seed=1, dtype=torch.float32)
    q_weight, k_weight = rand(2, dim, seed=2, dtype=dtype)
    k_cache, v_cache = rand(2, batch, heads, cache_slots, depth, seed=3, dtype=dtype)
    return "place", {
        **{"q": q, "k": k, "v": v, "eps": EPS, "norms": (q_weight, k_weight, angle.cos(), angle.sin())},
        "queries": torch.full((batch, tokens, heads, depth), torch.nan, dtype=dtype),
        "k_cache": k_cache,
        "v_cache": v_cache if with_values else None,
        "slots": None if slots is None else torch.tensor(slots, dtype=torch.int32),
    }


PLACES = [
    case
    for dtype in DTYPES
    for case in (
        place_case(dtype, batch=1, heads=2, depth=32, tokens_per_frame=4, slots=[0, 4, 8], cache_slots=12),
        place_case(dtype, batch=2, heads=3, depth=32, tokens_per_frame=3, slots=[9, 0, 4], cache_slots=13),
        place_case(dtype, batch=2, heads=2, depth=80, tokens_per_frame=2, slots=[7, 1], cache_slots=9),
        place_case(dtype, batch=1, heads=1, depth=128, tokens_per_frame=5, slots=[2], cache_slots=7),
        place_case(dtype, batch=1, heads=2, depth=48, tokens_per_frame=2, slots=[5, 0, 3, 8], cache_slots=10),
        place_case(dtype, batch=2, heads=2, depth=48, tokens_per_frame=6, slots=None, cache_slots=6, with_values=False),
    )
]
CHANCE = [
    place_case(torch.float32, batch=1, heads=2, depth=32, tokens_per_frame=4, slots=slots, cache_slots=12)
    for slots in ([-100, 10**9, -(2**31)], [2**31 - 4, 12, -4], [10, -2, 100])
]


def without(case: Case, *names: str) -> Case:
    return case[0], {**case[1], **dict.fromkeys(names)}


ROTATED = [
    without(
        place_case(dtype, batch=2, heads=3, depth=32, tokens_per_frame=3, slots=[9, 0, 4], cache_slots=13),
        *("norms", "queries"),
    )
    for dtype in DTYPES
]
"""The write to the caches alone: what ranks have received is normalised and rotated."""


def blocks_case(dtype: torch.dtype, *, ranks: int, batch: int, tokens: int, heads: int, depth: int) -> Case:
    """Make a call that writes what ranks are sent: a block each, with its heads' queries, keys and values."""
    kind, given = place_case(
        dtype, batch=batch, heads=heads, depth=depth, tokens_per_frame=tokens, slots=None, cache_slots=tokens
    )
    blocks = torch.full((ranks, batch, tokens, 3, heads // ranks * depth), torch.nan, dtype=dtype)
    queries, keys, values = blocks.permute(3, 1, 2, 0, 4).unbind()
    places = {"queries": queries, "k_cache": keys.transpose(1, 2), "v_cache": values.transpose(1, 2)}
    return kind, {**given, **places, "head_dim": depth}


BLOCKS = [
    case
    for dtype in DTYPES
    for case in (
        blocks_case(dtype, ranks=2, batch=1, tokens=5, heads=4, depth=32),
        blocks_case(dtype, ranks=3, batch=2, tokens=3, heads=3, depth=80),
    )
]

CASES: list[Case] = [*ADD_NORMS, *QUANTISED, *QUANTIZES, *PLACES, *CHANCE, *ROTATED, *BLOCKS]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Result]:
    """What the interpreted kernels give, by the identity of the case."""
    script = Path(__file__).with_name("interpreted_norms.py")
    loaded = interpret(script, CASES, tmp_path_factory.mktemp("kernels"))
    return {id(case): result for case, result in zip(CASES, loaded, strict=True)}


def exact(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments in fp64."""
    return {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    """Compare with fp64, relative to each value and, since norms subtract, to its row's largest."""
    limit = TOLERANCES[got.dtype] * want.abs() + TOLERANCES[torch.float32] * want.abs().amax(-1, keepdim=True)
    assert got.isfinite().all()
    assert bool(((got.double() - want).abs() <= limit).all()), (
        f"off by {((got.double() - want).abs() - limit).max():.1e}"
    )


def normed(total: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    """Normalise the sum as the bodies do, in fp64."""
    if given["norm"] == "rms":
        weighted: torch.Tensor = total * (total.square().mean(-1, keepdim=True) + EPS).rsqrt() * given["weight"]
        return weighted
    zero = torch.zeros_like(total)
    weight, bias, shift, scale = (given.get(name) for name in ("weight", "bias", "shift", "scale"))
    return dit_ops.add_norm(total, zero, None, weight, bias, shift, scale, EPS)[1]


@pytest.mark.parametrize("index", range(len(ADD_NORMS)))
def test_add_norm_kernel_equals_the_bodies(index: int, results: dict[int, Result]) -> None:
    case = ADD_NORMS[index]
    total, out = results[id(case)]
    given = exact(case[1])
    x, branch, gate = given["x"], given.get("branch"), given.get("gate")
    want = x if branch is None else x + branch if gate is None else dit_ops.gated_add(x, branch, gate)
    limit = TOLERANCES[total.dtype] * want.abs() + 1e-6
    assert bool(((total.double() - want).abs() <= limit).all())
    assert (total.dtype, out.dtype) == (case[1]["x"].dtype,) * 2
    if given["norm"] == "none":
        assert torch.equal(out, total)
    else:  # the sum is rounded before it is normalised, as it is by the bodies
        assert_near(out, normed(total.double(), given))


def assert_codes(got: torch.Tensor, values: torch.Tensor, multiplier: torch.Tensor | None, scale: float) -> None:
    """Compare codes with those of fp64 values, but for values beside a tie and those the interpreter gets wrong."""
    assert got.dtype == fp8_ops.E4M3
    values = values if multiplier is None else values * multiplier
    want, below, above = (fp8_ops.to_e4m3(values * near, None, scale).double() for near in (1.0, 1 - 1e-5, 1 + 1e-5))
    carried = (want.abs().frexp().mantissa == 0.5) & (values.abs() / scale < want.abs())
    small = (values.abs() / scale < 2**-6) & ~carried
    compared = (below == above) & ~carried & ~small
    assert compared.double().mean() > 0.7
    assert torch.equal(got.double()[compared], want[compared])
    assert bool(((got.double() - want).abs() <= 2**-9)[small].all())
    beside_tie = (below != above) & ~carried & ~small
    assert ((got.double() == below) | (got.double() == above))[beside_tie].all()


@pytest.mark.parametrize("index", range(len(QUANTISED)))
def test_add_norm_kernel_gives_the_codes_of_what_it_normalises(index: int, results: dict[int, Result]) -> None:
    case = QUANTISED[index]
    total, codes = results[id(case)]
    given = exact(case[1])
    assert total.dtype == case[1]["x"].dtype
    assert_codes(codes, normed(total.double(), given), given.get("multiplier"), given["quantised_scale"])


@pytest.mark.parametrize("index", range(len(QUANTIZES)))
def test_quantize_kernel_gives_the_codes_of_its_input_or_of_its_gelu(index: int, results: dict[int, Result]) -> None:
    case = QUANTIZES[index]
    (codes,) = results[id(case)]
    given = exact(case[1])
    values = torch.nn.functional.gelu(given["x"], approximate="tanh") if given["gelu"] else given["x"]
    assert codes.shape == given["x"].shape
    assert_codes(codes, values, given["multiplier"], given["scale"])


def test_cases_of_codes_reach_the_largest_one_and_smallest_ones(results: dict[int, Result]) -> None:
    codes = torch.cat([results[id(case)][-1].double().flatten() for case in (*QUANTISED, *QUANTIZES)]).abs()
    assert codes.max() == fp8_ops.E4M3_MAX
    assert ((codes > 0) & (codes < 2**-6)).any(), "of the smallest exponent"


@pytest.mark.parametrize("index", range(len(PLACES)))
def test_projections_are_placed_as_the_bodies_place_them(index: int, results: dict[int, Result]) -> None:
    case = PLACES[index]
    queries, k_cache, *values = results[id(case)]
    given = exact(case[1])
    heads, depth = given["queries"].shape[2:]
    tokens = given["q"].shape[1]
    *weights, cos, sin = case[1]["norms"]
    want_q, want_k = (
        dit_ops.norm_rope(given[name].float(), weight.float(), cos, sin, heads, EPS).double()
        for name, weight in zip("qk", weights, strict=True)
    )
    assert_near(queries, want_q.transpose(1, 2))
    slots = given["slots"]
    if slots is None:
        place = torch.arange(tokens)
    else:
        place = (slots[:, None].long() + torch.arange(tokens // slots.shape[0])).flatten()
    assert_near(k_cache[:, :, place], want_k)
    others = torch.ones(k_cache.shape[2], dtype=torch.bool).index_fill(0, place, False)
    assert torch.equal(k_cache[:, :, others], case[1]["k_cache"][:, :, others])
    assert bool(values) is (given["v_cache"] is not None)
    for v_cache in values:
        want = case[1]["v_cache"].index_copy(2, place, dit_ops.split_heads(case[1]["v"], heads))
        assert torch.equal(v_cache, want), "values are copied to the last bit"
    assert depth * heads == given["q"].shape[2]


@pytest.mark.parametrize("index", range(len(CHANCE)))
def test_projections_with_slots_of_chance_stay_inside_the_caches(index: int, results: dict[int, Result]) -> None:
    case = CHANCE[index]
    _, k_cache, v_cache = results[id(case)]
    inside = [
        slot + token for slot in case[1]["slots"].tolist() for token in range(4) if 0 <= slot + token < 12
    ]  # fmt: skip
    others = torch.tensor([slot for slot in range(12) if slot not in inside])
    assert torch.equal(k_cache[:, :, others], case[1]["k_cache"][:, :, others])
    assert torch.equal(v_cache[:, :, others], case[1]["v_cache"][:, :, others])


@pytest.mark.parametrize("index", range(len(ROTATED)))
def test_keys_and_values_that_are_rotated_already_are_copied(index: int, results: dict[int, Result]) -> None:
    case = ROTATED[index]
    given, got = case[1], results[id(case)]
    heads = given["k_cache"].shape[1]
    place = (given["slots"][:, None].long() + torch.arange(3)).flatten()
    for name, cache in zip("kv", got, strict=True):
        want = given[f"{name}_cache"].index_copy(2, place, dit_ops.split_heads(given[name], heads))
        assert torch.equal(cache, want), "keys and values are copied to the last bit"


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_rows_go_into_the_blocks_of_the_ranks_that_have_their_heads(index: int, results: dict[int, Result]) -> None:
    given, (queries, keys, values) = BLOCKS[index][1], results[id(BLOCKS[index])]
    depth = given["head_dim"]
    heads = given["q"].shape[2] // depth
    *weights, cos, sin = given["norms"]
    for name, weight, got in zip("qk", weights, (queries, keys.transpose(1, 2)), strict=True):
        want = dit_ops.norm_rope(given[name].float(), weight.float(), cos, sin, heads, EPS)
        assert_near(torch.unflatten(got.flatten(2), 2, (heads, depth)), want.double().transpose(1, 2))
    assert torch.equal(values.transpose(1, 2).flatten(2), given["v"]), "values are copied to the last bit"
