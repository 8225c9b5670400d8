"""The kernel on a GPU: through the torch op, the plugin and the driver alone, against the reference in fp64."""

from __future__ import annotations

import ctypes
import enum
import importlib
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from causal_forcing.plugins import reference, torch_op
from causal_forcing.plugins.contract import INPUTS
from causal_forcing.plugins.torch_op import kv_cache_attention_functional, kv_cache_attention_in_place

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# ‖got - want‖ / ‖want‖ over fp64 of the same inputs. bf16 and fp16 round weights and results to 8 and 11 bits, each by
# about 1e-3 and 2e-4 of their size; fp32 rounds sums. A single row, where less averages out, may be off 4 times as far.
TOLERANCES = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """A call of the op, on the GPU."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slots: torch.Tensor
    valid_slots: torch.Tensor
    scale: float

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in INPUTS]

    def on_copies_of_the_caches(self) -> Call:
        return replace(self, k_cache=self.k_cache.clone(), v_cache=self.v_cache.clone())


def make_call(
    *,
    batch: int = 1,
    heads: int = 2,
    head_dim: int = 64,
    tokens_per_frame: int = 40,
    places: int = 6,
    frames: list[int],
    valid_slots: list[int],
    dtype: torch.dtype = torch.bfloat16,
    views: bool = True,
    seed: int = 0,
) -> Call:
    """Fill a call whose frames take these places of the cache; `views` are [B, L, N, D] in memory, as the model's."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    tokens, cache_slots = len(frames) * tokens_per_frame, places * tokens_per_frame

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    if views:
        q, k, v = (rand(batch, tokens, heads, head_dim).transpose(1, 2) for _ in range(3))
    else:
        q, k, v = (rand(batch, heads, tokens, head_dim) for _ in range(3))
    return Call(
        q=q,
        k=k,
        v=v,
        k_cache=rand(batch, heads, cache_slots, head_dim),
        v_cache=rand(batch, heads, cache_slots, head_dim),
        slots=torch.tensor([place * tokens_per_frame for place in frames], dtype=torch.int32, device="cuda"),
        valid_slots=torch.tensor(valid_slots, dtype=torch.int32, device="cuda"),
        scale=head_dim**-0.5,
    )


def random_call(seed: int) -> Call:
    draw = random.Random(seed)
    batch, frame_count, tokens_per_frame = draw.randint(1, 2), draw.randint(1, 4), draw.randint(1, 300)
    places = frame_count + draw.randint(0, 6)
    if draw.random() < 0.5:  # a ring: frames follow each other, around its end if need be
        first = draw.randrange(places)
        frames = [(first + frame) % places for frame in range(frame_count)]
    else:
        frames = draw.sample(range(places), frame_count)
    cache_slots = places * tokens_per_frame
    return make_call(
        batch=batch,
        heads=draw.randint(1, 12),
        head_dim=draw.choice([32, 64, 128]),
        tokens_per_frame=tokens_per_frame,
        places=places,
        frames=frames,
        valid_slots=[draw.choice([cache_slots, draw.randint(1, cache_slots)]) for _ in range(batch)],
        dtype=list(TOLERANCES)[seed % 3],
        views=draw.random() < 0.7,
        seed=seed,
    )


def referred(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (out, k_cache, v_cache) of the reference in fp64, a head at a time: scores of a full window are large."""
    outputs = []
    for head in range(call.q.shape[1]):
        q, k, v, k_cache, v_cache = (tensor[:, head : head + 1].double() for tensor in call.tensors[:5])
        out = reference.kv_cache_attention(q, k, v, k_cache, v_cache, call.slots, call.valid_slots, call.scale)
        outputs.append((out, k_cache, v_cache))
    out, k_cache, v_cache = (torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))
    return out, k_cache.to(call.q.dtype), v_cache.to(call.q.dtype)


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = TOLERANCES[got.dtype]
    error = got.double() - want
    assert (error.norm() / want.norm()).item() <= tolerance
    assert (error.norm(dim=-1) / want.norm(dim=-1)).max().item() <= 4 * tolerance


def assert_right(call: Call) -> None:
    """Run the op in place on the call; its caches must end up exact."""
    want, want_k, want_v = referred(call)
    ran = call.on_copies_of_the_caches()
    out = kv_cache_attention_in_place(*ran.tensors, call.scale)
    assert out.shape == call.q.shape
    assert_near(out, want)
    assert torch.equal(ran.k_cache, want_k)
    assert torch.equal(ran.v_cache, want_v)


@pytest.fixture(autouse=True)
def no_reference_on_the_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the op would fall back to the reference instead of launching the kernel."""
    if "falls_back" not in request.node.name:
        monkeypatch.setattr(torch_op, "reference", None)


@pytest.mark.parametrize("seed", range(48))
def test_op_for_any_geometry_equals_the_reference(seed: int) -> None:
    assert_right(random_call(seed))


@pytest.mark.parametrize("head_dim", [24, 80, 96])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_op_for_a_head_dim_that_is_no_power_of_two_equals_the_reference(dtype: torch.dtype, head_dim: int) -> None:
    assert_right(make_call(head_dim=head_dim, dtype=dtype, frames=[5, 0, 1], valid_slots=[240]))


@pytest.mark.parametrize("valid_slots", [120, 121, 160, 200, 239, 240, 10**6])
def test_op_at_every_fill_level_equals_the_reference(valid_slots: int) -> None:
    assert_right(make_call(frames=[0, 1, 2], valid_slots=[valid_slots]))


def test_op_with_a_last_cache_tile_of_its_own_slots_alone_equals_the_reference() -> None:
    """A first chunk: nothing is cached, everything is read from the inputs."""
    assert_right(make_call(tokens_per_frame=128, places=3, frames=[0, 1, 2], valid_slots=[384], head_dim=128))


def test_op_with_slices_of_one_projection_equals_the_reference() -> None:
    """Queries, keys and values that share a buffer have strides of their own."""
    call = make_call(frames=[1, 2], valid_slots=[240])
    merged = torch.cat([tensor.transpose(1, 2) for tensor in (call.q, call.k, call.v)], dim=3)
    q, k, v = (part.transpose(1, 2) for part in merged.chunk(3, dim=3))
    assert q.stride()[2] == 3 * 2 * 64
    assert_right(replace(call, q=q, k=k, v=v))


def test_op_neither_reads_what_it_writes_nor_what_is_not_valid() -> None:
    call = make_call(tokens_per_frame=200, frames=[5, 0, 3], valid_slots=[1100], head_dim=128)
    clean = kv_cache_attention_in_place(*call.on_copies_of_the_caches().tensors, call.scale)
    dirty = call.on_copies_of_the_caches()
    for cache in (dirty.k_cache, dirty.v_cache):
        cache[:, :, 1100:] = torch.nan
        for slot in dirty.slots.tolist():
            cache[:, :, slot : slot + 200] = torch.nan
    assert torch.equal(kv_cache_attention_in_place(*dirty.tensors, call.scale), clean)


@pytest.mark.parametrize("slots", [[-10000, 10**9, -(2**31)], [0, 1, 2], [230, 231, 232]])
def test_op_over_indices_of_chance_stays_inside_the_caches(slots: list[int]) -> None:
    """TensorRT may time a plugin over inputs that hold anything."""
    call = make_call(frames=[0, 1, 2], valid_slots=[2**31 - 1])
    guarded = torch.full((3, *call.k_cache.shape), 7.0, dtype=torch.bfloat16, device="cuda")
    k_cache, v_cache = torch.full_like(guarded, 7.0)[1:2], guarded[1:2]
    call = replace(call, k_cache=k_cache[0], v_cache=v_cache[0], slots=torch.tensor(slots, device="cuda").int())
    out = kv_cache_attention_in_place(*call.tensors, call.scale)
    assert out.isfinite().all()
    assert bool((guarded[0] == 7.0).all())
    assert bool((guarded[2] == 7.0).all())


def test_functional_op_leaves_its_inputs_alone() -> None:
    call = make_call(frames=[2, 3], valid_slots=[200])
    before = call.on_copies_of_the_caches()
    out, k_cache, v_cache = kv_cache_attention_functional(*call.tensors, call.scale)
    want, want_k, want_v = referred(call)
    assert_near(out, want)
    assert torch.equal(k_cache, want_k)
    assert torch.equal(v_cache, want_v)
    assert torch.equal(call.k_cache, before.k_cache)
    assert torch.equal(call.v_cache, before.v_cache)


def test_ops_on_gpu_pass_opcheck() -> None:
    call = make_call(frames=[2, 3], valid_slots=[200])
    torch.library.opcheck(torch.ops.causal_forcing.kv_cache_attention_.default, (*call.tensors, call.scale))
    torch.library.opcheck(torch.ops.causal_forcing.kv_cache_attention.default, (*call.tensors, call.scale))


@pytest.mark.parametrize("frames", [[0, 1, 2, 3, 4]])
def test_op_with_more_frames_than_the_kernel_takes_falls_back(frames: list[int]) -> None:
    assert_right(make_call(frames=frames, valid_slots=[240]))


def test_op_in_fp64_falls_back() -> None:
    call = make_call(frames=[0, 1], valid_slots=[240], dtype=torch.float64)
    want, *_ = referred(call)
    torch.testing.assert_close(kv_cache_attention_in_place(*call.tensors, call.scale), want)


@pytest.mark.parametrize("wrapped", [False, True])
def test_op_at_full_size_equals_the_reference(wrapped: bool) -> None:
    """Wan 2.1 1.3B at 480×832, chunks of 3 frames, a full window of 21."""
    frames = [20, 0, 1] if wrapped else [18, 19, 20]
    call = make_call(heads=12, head_dim=128, tokens_per_frame=1560, places=21, frames=frames, valid_slots=[32760])
    assert call.k_cache.shape == (1, 12, 32760, 128)
    assert_right(call)


def captured(call: Call) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Capture one run of the op over the call's tensors; their caches are as before."""
    kept = call.on_copies_of_the_caches()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kv_cache_attention_in_place(*call.tensors, call.scale)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kv_cache_attention_in_place(*call.tensors, call.scale)
    call.k_cache.copy_(kept.k_cache)
    call.v_cache.copy_(kept.v_cache)
    return graph, out


def test_captured_op_replayed_over_other_slots_and_lengths_gives_their_result() -> None:
    call = make_call(tokens_per_frame=130, places=7, frames=[0, 1, 2], valid_slots=[390], head_dim=128)
    graph, out = captured(call)
    for frames, valid_slots in [([0, 1, 2], 390), ([3, 4, 5], 780), ([6, 1, 2], 910), ([4, 3, 6], 555), ([5, 6, 0], 1)]:
        call.slots.copy_(torch.tensor([130 * place for place in frames]))
        call.valid_slots.copy_(torch.tensor([valid_slots]))
        call.q.normal_()
        call.k.normal_()
        want, want_k, want_v = referred(call)
        graph.replay()
        assert_near(out, want)
        assert torch.equal(call.k_cache, want_k)
        assert torch.equal(call.v_cache, want_v)


def test_op_after_its_first_run_waits_for_nothing() -> None:
    call = make_call(frames=[0, 1, 2], valid_slots=[240])
    kv_cache_attention_in_place(*call.tensors, call.scale)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kv_cache_attention_in_place(*call.tensors, call.scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the IPluginV3, over as much of TensorRT as its enqueue touches."""
    tensorrt = ModuleType("tensorrt")
    for name in ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuildV2", "IPluginV3OneRuntime", "IPluginCreatorV3One"):
        setattr(tensorrt, name, type(name, (), {}))
    DataType = enum.Enum("DataType", "BF16 HALF FLOAT INT32")
    tensorrt.__dict__["DataType"] = DataType
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    monkeypatch.delitem(sys.modules, "causal_forcing.plugins.v3_plugin", raising=False)
    yield importlib.import_module("causal_forcing.plugins.v3_plugin")
    sys.modules.pop("causal_forcing.plugins.v3_plugin", None)


def test_plugin_enqueue_while_capturing_allocates_nothing_and_uses_the_given_stream(plugin: Any) -> None:
    call = make_call(tokens_per_frame=130, frames=[5, 0, 1], valid_slots=[780], head_dim=128, views=False)
    want, want_k, want_v = referred(call)
    out = torch.empty_like(call.q)
    types = plugin.trt.DataType
    described = [
        SimpleNamespace(type=types.INT32 if tensor.dtype == torch.int32 else types.BF16, dims=tuple(tensor.shape))
        for tensor in (*call.tensors, out, call.k_cache, call.v_cache)
    ]
    addresses = [tensor.data_ptr() for tensor in (*call.tensors, out, call.k_cache, call.v_cache)]
    enqueue = plugin.KVCacheAttentionPlugin(call.scale).enqueue
    before = call.on_copies_of_the_caches()
    stream, other_stream = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def run() -> None:
        enqueue(described[:7], described[7:], addresses[:7], addresses[7:], 0, stream.cuda_stream)

    torch.cuda.synchronize()
    run()
    torch.cuda.synchronize()
    call.k_cache.copy_(before.k_cache)
    call.v_cache.copy_(before.v_cache)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # In the strict mode of capture, a wait or an allocation by the driver ends it with an error.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="global"):
        allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
        with torch.cuda.stream(other_stream):  # the current stream is not the one to be used
            run()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations
    out.fill_(torch.nan)
    assert torch.equal(call.k_cache, before.k_cache), "a capture runs nothing"
    graph.replay()
    assert_near(out, want)
    assert torch.equal(call.k_cache, want_k)
    assert torch.equal(call.v_cache, want_v)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_kernel_compiled_ahead_of_time_runs_as_a_plan_runs_it(dtype: torch.dtype) -> None:
    """By the driver alone: PTX, ten pointers, the plain limit of shared memory."""
    from causal_forcing.plugins.kernels.ahead_of_time import compile_ahead_of_time

    call = make_call(
        batch=2, heads=3, tokens_per_frame=130, frames=[5, 0, 1], valid_slots=[780, 555], head_dim=128, dtype=dtype,
        views=False,
    )  # fmt: skip
    want, want_k, want_v = referred(call)
    out = torch.full_like(call.q, torch.nan)
    kernel = compile_ahead_of_time(
        chunk=(2, 3, 390, 128),
        frames=3,
        cache_slots=780,
        element={torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype],
        scale=call.scale,
    )
    driver = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuModuleLoadData(ctypes.byref(module), kernel.ptx.encode()) == 0
    assert driver.cuModuleGetFunction(ctypes.byref(function), module, kernel.name.encode()) == 0
    tensors = (*call.tensors, out, call.k_cache, call.v_cache)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    parameters = (ctypes.c_void_p * len(pointers))(*(ctypes.addressof(pointer) for pointer in pointers))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    size = (*kernel.grid, kernel.threads, 1, 1, kernel.shared_bytes)
    assert driver.cuLaunchKernel(function, *size, stream, parameters, None) == 0
    torch.cuda.synchronize()
    assert_near(out, want)
    assert torch.equal(call.k_cache, want_k)
    assert torch.equal(call.v_cache, want_v)
