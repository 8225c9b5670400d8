"""Attention in fp8: rounding before the cache is rounding at its reader, and the factor on q·k is split exactly."""

from __future__ import annotations

import math

import pytest
import torch

from causal_forcing.build_engines.models.dit_layers import CacheAttention
from causal_forcing.build_engines.quantization.fp8_attention import (
    AttentionScales,
    QuantizedCacheAttention,
    query_factor,
)
from causal_forcing.build_engines.quantization.fp8_linear import fake_quantize
from causal_forcing.plugins import reference

SCALES = AttentionScales(q=2.0**-5, k=2.0**-6, v=2.0**-6)
SLOTS, VALID = torch.tensor([4, 8], dtype=torch.int32), torch.tensor([12], dtype=torch.int32)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_query_factor_leaves_a_power_of_two(head_dim: int) -> None:
    scale = head_dim**-0.5
    factor = query_factor(scale)
    assert 0.7 < factor < 1.42
    assert math.frexp(scale / factor)[0] == 0.5


def test_attention_in_chunks_equals_attention_over_a_cache_that_is_rounded_when_read() -> None:
    torch.manual_seed(0)
    attention = CacheAttention(32**-0.5)
    quantised = QuantizedCacheAttention(attention, SCALES, like=torch.zeros(()))
    caches = [torch.zeros(1, 2, 16, 32) for _ in range(2)]
    plain = [torch.zeros(1, 2, 16, 32) for _ in range(2)]
    first, second = ([torch.randn(1, 2, 8, 32) for _ in range(3)] for _ in range(2))
    slots = torch.tensor([0, 4], dtype=torch.int32)
    quantised(*first, *caches, slots, torch.tensor([8], dtype=torch.int32))
    attention(*first, *plain, slots, torch.tensor([8], dtype=torch.int32))
    got, *_ = quantised(*second, *caches, SLOTS, VALID)
    want, *_ = attention(*second, *plain, SLOTS, VALID)

    k_cache, v_cache = fake_quantize(plain[0], torch.tensor(SCALES.k)), fake_quantize(plain[1], torch.tensor(SCALES.v))
    factor = query_factor(attention.scale)
    at_reader = reference.kv_cache_attention(
        fake_quantize(second[0] * factor, torch.tensor(SCALES.q)),
        fake_quantize(second[1], torch.tensor(SCALES.k)),
        fake_quantize(second[2], torch.tensor(SCALES.v)),
        k_cache,
        v_cache,
        SLOTS,
        VALID,
        attention.scale / factor,
    )
    assert torch.equal(got, at_reader)
    assert torch.equal(caches[0], fake_quantize(plain[0], torch.tensor(SCALES.k)))
    error = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert 0.001 < error < 0.08


def test_attention_in_bf16_leaves_the_caches_in_bf16() -> None:
    quantised = QuantizedCacheAttention(CacheAttention(128**-0.5), SCALES, like=torch.zeros((), dtype=torch.bfloat16))
    inputs = [torch.randn(1, 2, 8, 32).bfloat16() for _ in range(3)]
    caches = [torch.zeros(1, 2, 16, 32, dtype=torch.bfloat16) for _ in range(2)]
    out, *written = quantised(*inputs, *caches, SLOTS, VALID)
    assert {tensor.dtype for tensor in (out, *written)} == {torch.bfloat16}
    assert torch.equal(fake_quantize(written[0], torch.tensor(SCALES.k)), written[0])
