"""The GPU kernel without a GPU: through Triton's interpreter against the reference, and compiled ahead of time."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from causal_forcing.plugins import reference
from causal_forcing.plugins.contract import INPUTS, OUTPUTS
from causal_forcing.plugins.kernels.tiles import PLAIN_SHARED_BYTES, find_tile
from tests.triton_interpreter import interpret

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

H100_SHARED_BYTES = 232448
# Sums of at most 128 products, in another order; fp16 rounds the weights and the result to 11 bits. bf16 is for the
# GPU: the interpreter multiplies its bits as if they were integers.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3}


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A call of the op."""

    scale: float
    tensors: list[torch.Tensor]


def make_case(seed: int) -> Case:
    """Draw any geometry: frames in any order, anywhere in the cache, and lengths that may end inside of them."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = draw.choice(list(TOLERANCES))
    batch, heads, head_dim = draw.randint(1, 2), draw.randint(1, 2), draw.choice([1, 8, 16, 32, 48, 64, 80, 128])
    frames, tokens_per_frame = draw.randint(1, 4), draw.randint(1, 30)
    places = frames + draw.randint(0, 5)
    spare = draw.randint(0, 3)
    offset, cache_slots = draw.randint(0, spare), places * tokens_per_frame + spare

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    # Queries, keys and values as the model hands them over: views of [B, L, N, D].
    chunk = [rand(batch, frames * tokens_per_frame, heads, head_dim).transpose(1, 2) for _ in range(3)]
    caches = [rand(batch, heads, cache_slots, head_dim) for _ in range(2)]
    slots = [offset + tokens_per_frame * place for place in draw.sample(range(places), frames)]
    valid_slots = [draw.randint(1, cache_slots + 1) for _ in range(batch)]
    indices = [torch.tensor(numbers, dtype=torch.int32) for numbers in (slots, valid_slots)]
    return Case(scale=draw.uniform(0.05, 0.5), tensors=[*chunk, *caches, *indices])


RANDOM = [make_case(seed) for seed in range(40)]


def poisoned(case: Case) -> Case:
    """Hold NaN wherever nothing may be read: beyond the valid length, and where the chunk is to be written."""
    q, k, v, k_cache, v_cache, slots, valid_slots = (tensor.clone() for tensor in case.tensors)
    tokens_per_frame = q.shape[2] // slots.shape[0]
    for cache in (k_cache, v_cache):
        for clip, length in zip(cache, valid_slots.tolist(), strict=True):
            clip[:, length:] = torch.nan
        for slot in slots.tolist():
            cache[:, :, slot : slot + tokens_per_frame] = torch.nan
    return Case(scale=case.scale, tensors=[q, k, v, k_cache, v_cache, slots, valid_slots])


def with_indices(case: Case, *, slots: list[int], valid_slots: list[int]) -> Case:
    indices = [torch.tensor(numbers, dtype=torch.int32) for numbers in (slots, valid_slots)]
    return Case(scale=case.scale, tensors=[*(tensor.clone() for tensor in case.tensors[:5]), *indices])


LONG = next(case for case in RANDOM if case.tensors[5].shape[0] == 3 and case.tensors[0].shape[0] == 1)
CHANCE = [
    with_indices(LONG, slots=[-1000, 10**9, -(2**31)], valid_slots=[2**31 - 1]),
    with_indices(LONG, slots=[0, 1, 2], valid_slots=[10**6]),
    with_indices(LONG, slots=[2**31 - 1] * 3, valid_slots=[-7]),
]
EMPTY = with_indices(LONG, slots=LONG.tensors[5].tolist(), valid_slots=[0])
CASES = [*RANDOM, *(poisoned(case) for case in RANDOM), *CHANCE, EMPTY]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """What the interpreted kernel gives for `CASES`."""
    script, cases = Path(__file__).with_name("interpreted_kernel.py"), [(case.scale, case.tensors) for case in CASES]
    loaded: list[Result] = interpret(script, cases, tmp_path_factory.mktemp("kernel"))
    return loaded


def referred(case: Case) -> Result:
    """Return what the reference gives in fp64."""
    q, k, v, k_cache, v_cache, slots, valid_slots = (
        tensor.double() if tensor.is_floating_point() else tensor for tensor in case.tensors
    )
    out = reference.kv_cache_attention(q, k, v, k_cache, v_cache, slots, valid_slots, case.scale)
    return out, k_cache, v_cache


@pytest.mark.parametrize("index", range(len(RANDOM)))
def test_kernel_for_any_geometry_equals_the_reference(index: int, results: list[Result]) -> None:
    case = RANDOM[index]
    out, k_cache, v_cache = results[index]
    want, want_k, want_v = referred(case)
    tolerance = TOLERANCES[out.dtype]
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
    assert torch.equal(k_cache.double(), want_k)
    assert torch.equal(v_cache.double(), want_v)


def test_random_cases_cover_what_is_hard() -> None:
    """Lengths that end before, inside and behind the chunk's own slots; frames out of order; caches that are full."""
    kinds = set()
    for case in RANDOM:
        q, *_, slots, valid_slots = case.tensors
        tokens_per_frame = q.shape[2] // slots.shape[0]
        kinds |= {"shuffled"} if slots.tolist() != sorted(slots.tolist()) else set()
        for length in valid_slots.tolist():
            kinds |= {"full"} if length >= case.tensors[3].shape[2] else set()
            kinds |= {"unseen"} if length <= int(slots.max()) else {"seen"}
            kinds |= {"cut"} if any(slot < length < slot + tokens_per_frame for slot in slots.tolist()) else set()
    assert kinds == {"shuffled", "full", "unseen", "seen", "cut"}
    assert {case.tensors[0].dtype for case in RANDOM} == set(TOLERANCES)
    assert {case.tensors[5].shape[0] for case in RANDOM} == {1, 2, 3, 4}


@pytest.mark.parametrize("index", range(len(RANDOM)))
def test_kernel_reads_neither_what_is_not_valid_nor_what_it_writes(index: int, results: list[Result]) -> None:
    """What another program of the launch may be writing must not be read, or the result would depend on their order."""
    assert torch.equal(results[len(RANDOM) + index][0], results[index][0])


@pytest.mark.parametrize("index", range(len(CHANCE)))
def test_kernel_over_indices_of_chance_stays_inside_the_caches(index: int, results: list[Result]) -> None:
    """TensorRT may time a plugin over inputs that hold anything."""
    out, k_cache, v_cache = results[2 * len(RANDOM) + index]
    assert out.isfinite().all()
    if index != 1:  # the slots of the other lie inside
        assert torch.equal(k_cache, CHANCE[index].tensors[3])
        assert torch.equal(v_cache, CHANCE[index].tensors[4])


def test_kernel_without_a_valid_slot_gives_zeros(results: list[Result]) -> None:
    assert not results[CASES.index(EMPTY)][0].any()


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile for real, and leave the user's cache alone."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("shared_bytes", [PLAIN_SHARED_BYTES, H100_SHARED_BYTES])
@pytest.mark.parametrize(("element", "head_dim"), [("bf16", 128), ("fp16", 64), ("fp32", 128)])
def test_kernel_compiled_for_h100_takes_the_memory_that_its_tile_says(
    element: str, head_dim: int, shared_bytes: int
) -> None:
    from triton.backends.compiler import GPUTarget

    from causal_forcing.plugins.kernels.ahead_of_time import compile_ahead_of_time

    kernel = compile_ahead_of_time(
        chunk=(1, 12, 4680, head_dim),
        frames=3,
        cache_slots=32760,
        element=element,
        scale=head_dim**-0.5,
        shared_bytes=shared_bytes,
        target=GPUTarget("cuda", 90, 32),
    )
    tile = find_tile(element_bytes=4 if element == "fp32" else 2, head_dim=head_dim, shared_bytes=shared_bytes)
    assert kernel.shared_bytes <= tile.shared_bytes <= shared_bytes
    assert kernel.grid == (-(-4680 // tile.queries), 12, 1)
    assert kernel.threads == 32 * tile.warps
    if element != "fp32":
        assert "wgmma.mma_async" in kernel.ptx, "the tensor cores are used"


@pytest.mark.usefixtures("fresh_cache")
def test_kernel_compiled_ahead_of_time_has_the_parameters_that_a_plan_passes() -> None:
    from triton.backends.compiler import GPUTarget

    from causal_forcing.plugins.kernels import ahead_of_time
    from causal_forcing.plugins.kernels.kv_cache_attention import kv_cache_attention_kernel

    names = [*INPUTS, *OUTPUTS]
    assert list(kv_cache_attention_kernel.arg_names)[: len(names)] == [f"{name}_ptr" for name in names]
    kernel = ahead_of_time.compile_ahead_of_time(
        chunk=(2, 3, 32, 32),
        frames=2,
        cache_slots=64,
        element="bf16",
        scale=0.5,
        target=GPUTarget("cuda", 90, 32),
    )
    entry = kernel.ptx[kernel.ptx.index(".entry") :]
    parameters = entry[entry.index("(") + 1 : entry.index(")")].strip().split(",\n")
    assert len(parameters) == len(names)
    assert all(parameter.split()[:2] == [".param", ".u64"] for parameter in parameters)
    assert f".entry {kernel.name}(" in kernel.ptx
    for index in range(len(names)):
        assert f"[{kernel.name}_param_{index}]" in entry, f"{names[index]} is used"


@pytest.mark.usefixtures("fresh_cache")
def test_kernel_compiled_ahead_of_time_is_ptx_that_assembles(tmp_path: Path) -> None:
    """Without the hidden parameters too."""
    import triton
    from triton.backends.compiler import GPUTarget

    from causal_forcing.plugins.kernels.ahead_of_time import compile_ahead_of_time

    kernel = compile_ahead_of_time(
        chunk=(1, 2, 48, 64), frames=3, cache_slots=96, element="fp16", scale=0.5, target=GPUTarget("cuda", 90, 32)
    )
    (tmp_path / "kernel.ptx").write_text(kernel.ptx, encoding="utf-8")
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [str(assembler), "--gpu-name", "sm_90a", "--output-file", os.devnull, str(tmp_path / "kernel.ptx")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


PTX = ".visible .entry f(\n\t.param .u64 f_param_0,\n\t.param .u64 f_param_1\n)\n.reqntid 128\n{{\n{body}\n}}\n"


def test_hidden_parameters_that_a_kernel_does_not_use_are_taken_off() -> None:
    from causal_forcing.plugins.kernels.ahead_of_time import keep_parameters

    body = "ld.param.b64 %rd1, [f_param_0];"
    assert keep_parameters(PTX.format(body=body), 1) == PTX.format(body=body).replace(",\n\t.param .u64 f_param_1", "")


def test_hidden_parameters_that_a_kernel_uses_are_refused() -> None:
    from causal_forcing.plugins.kernels.ahead_of_time import keep_parameters

    with pytest.raises(AssertionError, match="uses its hidden parameter f_param_1"):
        keep_parameters(PTX.format(body="ld.param.b64 %rd1, [f_param_1];"), 1)
