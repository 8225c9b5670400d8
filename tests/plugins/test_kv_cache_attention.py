"""All bodies of the op, driven chunk after chunk as a session does, against a model of upstream's shifting cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causal_forcing.plugins import reference
from causal_forcing.plugins.torch_op import kv_cache_attention_functional, kv_cache_attention_in_place
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.kv_cache import CacheRing

SCALE = 0.4
# fp32 against fp64: sums of at most a few dozen products.
TOLERANCE = 2e-5
# Large enough to drown any result that it leaks into; q·HUGE stays finite.
HUGE = 1e30

Body = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
OnnxSession = Callable[..., Any]

PROPERTY = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def run_reference(*tensors: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, k_cache, v_cache, slots, valid_slots = tensors
    return reference.kv_cache_attention(q, k, v, k_cache, v_cache, slots, valid_slots, SCALE), k_cache, v_cache


def run_in_place(*tensors: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return kv_cache_attention_in_place(*tensors, SCALE), tensors[3], tensors[4]


def run_functional(*tensors: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, k_cache, v_cache = kv_cache_attention_functional(*tensors, SCALE)
    return out, k_cache, v_cache


@pytest.fixture(params=["reference", "in_place", "functional", "onnx"])
def body(request: pytest.FixtureRequest, onnx_session: OnnxSession) -> Body:
    """One body of the op; each takes the tensors and returns (out, k_cache, v_cache)."""

    def run_onnx(*tensors: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        writes = 1 if geometry.ring_is_chunk_aligned else geometry.chunk_frames
        session = onnx_session(writes=writes, scale=SCALE)
        names = [value.name for value in session.get_inputs()]
        outputs = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})
        out, k_cache, v_cache = (torch.from_numpy(output) for output in outputs)
        return out, k_cache, v_cache

    bodies = {"reference": run_reference, "in_place": run_in_place, "functional": run_functional, "onnx": run_onnx}
    return bodies[request.param]


class ShiftingCache:
    """Upstream's cache of one layer, its rules transcribed: a block's first call evicts by shifting, all calls write.

    Source: thu-ml/Causal-Forcing@1fc7bbc wan/modules/causal_model.py CausalWanSelfAttention.forward.
    """

    def __init__(self, *, slots: int, sink_tokens: int) -> None:
        self.slots, self.sink = slots, sink_tokens
        self.global_end = self.local_end = 0
        self.k: list[torch.Tensor | None] = [None] * slots
        self.v: list[torch.Tensor | None] = [None] * slots

    def update(self, k: torch.Tensor, v: torch.Tensor, current_start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a call's keys and values [B, N, n, D]; returns those that it attends to."""
        n = k.shape[2]
        current_end = current_start + n
        local_end = self.local_end + current_end - self.global_end
        if current_end > self.global_end and n + self.local_end > self.slots:
            evicted = n + self.local_end - self.slots
            rolled = self.local_end - evicted - self.sink
            for cache in (self.k, self.v):
                cache[self.sink : self.sink + rolled] = cache[self.sink + evicted : self.sink + evicted + rolled]
            local_end -= evicted
        self.k[local_end - n : local_end] = k.unbind(2)
        self.v[local_end - n : local_end] = v.unbind(2)
        self.global_end, self.local_end = current_end, local_end
        held_k = [token for token in self.k[:local_end] if token is not None]
        held_v = [token for token in self.v[:local_end] if token is not None]
        return torch.stack(held_k, dim=2), torch.stack(held_v, dim=2)


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend without any cache or mask, in fp64 and without torch's own attention."""
    weights = torch.softmax(SCALE * q.double() @ k.double().transpose(2, 3), dim=-1)
    return weights @ v.double()


@dataclass(frozen=True, kw_only=True)
class Drive:
    """A clip's worth of calls of the op."""

    geometry: Geometry
    heads: int
    head_dim: int
    passes: tuple[int, ...]
    """Calls of each chunk: its denoising passes and its context pass."""
    seed: int

    def calls(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield (start frame, q, k, v) of each call."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.geometry.batch, self.heads, self.geometry.chunk_tokens, self.head_dim)
        for chunk, passes in enumerate(self.passes):
            for _ in range(passes):
                q, k, v = torch.randn(3, *shape, generator=generator)
                yield chunk * self.geometry.chunk_frames, q, k, v

    def caches(self, value: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.geometry.batch, self.heads, self.geometry.cache_slots, self.head_dim)
        return torch.full(shape, value), torch.full(shape, value)


@st.composite
def drives(draw: st.DrawFn) -> Drive:
    chunk_frames = draw(st.integers(1, 4))
    sink_frames = draw(st.integers(0, 4))
    window_frames = sink_frames + chunk_frames + draw(st.integers(0, 6))
    geometry = Geometry(
        chunk_frames=chunk_frames,
        pixel_height=16,
        pixel_width=16 * draw(st.integers(1, 4)),
        window_frames=window_frames,
        sink_frames=sink_frames,
        batch=draw(st.integers(1, 2)),
    )
    # Half of the drives go around the ring; the others may end before it is full.
    chunks = draw(st.integers(1, 3 + 2 * window_frames // chunk_frames))
    passes = draw(st.lists(st.integers(1, 3), min_size=chunks, max_size=chunks))
    return Drive(
        geometry=geometry,
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([1, 2, 3, 8, 16])),
        passes=tuple(passes),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def placement(geometry: Geometry, start_frame: int) -> tuple[torch.Tensor, torch.Tensor]:
    ring = CacheRing(geometry)
    slots = torch.tensor(ring.slots(start_frame), dtype=torch.int32)
    return slots, torch.full((geometry.batch,), ring.valid_slots(start_frame), dtype=torch.int32)


@PROPERTY
@given(drive=drives())
def test_every_body_for_any_ring_attends_to_what_upstream_keeps(body: Body, drive: Drive) -> None:
    geometry = drive.geometry
    tokens = geometry.tokens_per_frame
    upstream = ShiftingCache(slots=geometry.cache_slots, sink_tokens=geometry.sink_frames * tokens)
    k_cache, v_cache = drive.caches()
    for start_frame, q, k, v in drive.calls():
        want = plain_attention(q, *upstream.update(k, v, start_frame * tokens))
        slots, valid_slots = placement(geometry, start_frame)
        out, k_cache, v_cache = body(q, k, v, k_cache, v_cache, slots, valid_slots, geometry=geometry)
        torch.testing.assert_close(out.double(), want, atol=TOLERANCE, rtol=TOLERANCE)


@PROPERTY
@given(drive=drives())
def test_every_body_for_slots_beyond_the_valid_length_changes_nothing(body: Body, drive: Drive) -> None:
    """Huge, not NaN: in every body a masked NaN leaks as 0 · NaN, which is why a session zeroes its caches."""
    clean_k, clean_v = drive.caches()
    dirty_k, dirty_v = drive.caches(HUGE)
    for start_frame, q, k, v in drive.calls():
        where = placement(drive.geometry, start_frame)
        clean, clean_k, clean_v = body(q, k, v, clean_k, clean_v, *where, geometry=drive.geometry)
        dirty, dirty_k, dirty_v = body(q, k, v, dirty_k, dirty_v, *where, geometry=drive.geometry)
        torch.testing.assert_close(dirty, clean, atol=1e-6, rtol=1e-6)


@PROPERTY
@given(drive=drives())
def test_every_body_for_any_ring_writes_its_slots_and_no_others(body: Body, drive: Drive) -> None:
    geometry = drive.geometry
    k_cache, v_cache = drive.caches()
    for start_frame, q, k, v in drive.calls():
        slots, valid_slots = placement(geometry, start_frame)
        want_k, want_v = k_cache.clone(), v_cache.clone()
        for frame, slot in enumerate(slots.tolist()):
            tokens = slice(frame * geometry.tokens_per_frame, (frame + 1) * geometry.tokens_per_frame)
            want_k[:, :, slot : slot + geometry.tokens_per_frame] = k[:, :, tokens]
            want_v[:, :, slot : slot + geometry.tokens_per_frame] = v[:, :, tokens]
        _, k_cache, v_cache = body(q, k, v, k_cache, v_cache, slots, valid_slots, geometry=geometry)
        assert torch.equal(k_cache, want_k)
        assert torch.equal(v_cache, want_v)


SMALL = Drive(
    geometry=Geometry(chunk_frames=2, pixel_height=16, pixel_width=48, window_frames=6, batch=2),
    heads=2,
    head_dim=8,
    passes=(1,),
    seed=3,
)


def filled(drive: Drive) -> list[torch.Tensor]:
    """A call into the middle of caches that are full of other frames."""
    _, q, k, v = next(drive.calls())
    generator = torch.Generator().manual_seed(drive.seed + 1)
    k_cache, v_cache = (torch.randn(cache.shape, generator=generator) for cache in drive.caches())
    slots = torch.tensor([6, 9], dtype=torch.int32)
    return [q, k, v, k_cache, v_cache, slots]


def test_every_body_for_each_clip_of_a_batch_uses_its_own_valid_length(body: Body) -> None:
    def out(lengths: list[int]) -> torch.Tensor:
        valid_slots = torch.tensor(lengths, dtype=torch.int32)
        return body(*filled(SMALL), valid_slots, geometry=SMALL.geometry)[0]

    mixed, short, long = out([12, 18]), out([12, 12]), out([18, 18])
    torch.testing.assert_close(mixed[0], short[0])
    torch.testing.assert_close(mixed[1], long[1])
    assert not torch.allclose(mixed[0], long[0], atol=1e-3)
    assert not torch.allclose(mixed[1], short[1], atol=1e-3)


def test_every_body_for_another_valid_length_gives_another_result(body: Body) -> None:
    tensors = filled(SMALL)
    outputs = []
    for length in range(12, 19):
        valid_slots = torch.full((2,), length, dtype=torch.int32)
        out, k_cache, v_cache = body(*(t.clone() for t in tensors), valid_slots, geometry=SMALL.geometry)
        want = plain_attention(tensors[0], k_cache[:, :, :length], v_cache[:, :, :length])
        torch.testing.assert_close(out.double(), want, atol=TOLERANCE, rtol=TOLERANCE)
        outputs.append(out)
    for shorter, longer in itertools.pairwise(outputs):
        assert not torch.allclose(shorter, longer, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("run", [run_reference, run_in_place, run_functional])
def test_torch_bodies_in_half_precision_stay_near_fp32(run: Body, dtype: torch.dtype) -> None:
    tensors = filled(SMALL)
    valid_slots = torch.full((2,), 15, dtype=torch.int32)
    want, *_ = run_reference(*(t.clone() for t in tensors), valid_slots, geometry=SMALL.geometry)
    half = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    got, k_cache, v_cache = run(*half, valid_slots, geometry=SMALL.geometry)
    assert {got.dtype, k_cache.dtype, v_cache.dtype} == {dtype}
    # Eight bits of mantissa, values up to about 3.
    torch.testing.assert_close(got.float(), want, atol=3e-2, rtol=3e-2)


def test_every_body_with_noncontiguous_inputs_gives_the_same_result(body: Body) -> None:
    """The model hands over transposed views of [B, L, N, D]."""
    tensors = filled(SMALL)
    valid_slots = torch.full((2,), 15, dtype=torch.int32)
    want, *_ = body(*(t.clone() for t in tensors), valid_slots, geometry=SMALL.geometry)
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors[:3]]
    assert not views[0].is_contiguous()
    got, *_ = body(*views, *(t.clone() for t in tensors[3:]), valid_slots, geometry=SMALL.geometry)
    torch.testing.assert_close(got, want)
