"""KVCacheAttention as torch custom ops: one that writes in place for running, one that is functional for export.

`torch.export` wants functions without side effects, a cache wants none of its 6 GB copied; so modules call
`kv_cache_attention` below, which picks the functional op while a graph is exported and the in-place one otherwise.
On a CUDA GPU both launch the kernel in `kernels/`, elsewhere both run the reference.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from causal_forcing.plugins import reference
from causal_forcing.plugins.custom_op import define_op

CacheAttentionOutputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _in_place(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    valid_slots: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return _run(q, k, v, k_cache, v_cache, slots, valid_slots, scale)


def _functional(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    valid_slots: torch.Tensor,
    scale: float,
) -> CacheAttentionOutputs:
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    return _run(q, k, v, k_cache, v_cache, slots, valid_slots, scale), k_cache, v_cache


def _fake_functional(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *rest: object
) -> CacheAttentionOutputs:
    return torch.empty_like(q), torch.empty_like(k_cache), torch.empty_like(v_cache)


kv_cache_attention_in_place = define_op(
    "kv_cache_attention_", _in_place, fake=lambda q, *rest: torch.empty_like(q), mutates=("k_cache", "v_cache")
)
"""The op in place; see `plugins.contract` for shapes. Returns [B, N, L, D]."""

kv_cache_attention_functional = define_op("kv_cache_attention", _functional, fake=_fake_functional)
"""The op on copies of the caches. Returns (out, k_cache, v_cache)."""


def kv_cache_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    valid_slots: torch.Tensor,
    scale: float,
) -> CacheAttentionOutputs:
    """Run the op; see `plugins.contract` for shapes.

    Returns:
        (out, k_cache, v_cache). Outside of export the caches are the tensors that came in, changed in place.
    """
    if torch.compiler.is_exporting():
        outputs: CacheAttentionOutputs = kv_cache_attention_functional(
            q, k, v, k_cache, v_cache, slots, valid_slots, scale
        )
        return outputs
    out = kv_cache_attention_in_place(q, k, v, k_cache, v_cache, slots, valid_slots, scale)
    return out, k_cache, v_cache


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    valid_slots: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Carry the op out in place, by the kernel where there is one for these tensors; returns [B, N, L, D]."""
    if q.is_cuda and _has_triton():
        from causal_forcing.plugins.kernels.launch import accepts, launch, shared_bytes_of

        if accepts(q, k, v, k_cache, v_cache, slots, valid_slots, scale):
            out = torch.empty_like(q)
            with torch.cuda.device(q.device):
                shared_bytes = shared_bytes_of(torch.cuda.current_device())
                launch(q, k, v, k_cache, v_cache, slots, valid_slots, out, scale=scale, shared_bytes=shared_bytes)
            return out
    return reference.kv_cache_attention(q, k, v, k_cache, v_cache, slots, valid_slots, scale)


@functools.cache
def _has_triton() -> bool:
    """Say whether Triton is installed: it comes with torch's CUDA builds for Linux."""
    return importlib.util.find_spec("triton") is not None


def write_caches_in_place(graph_module: torch.fx.GraphModule) -> None:
    """Make an exported graph write its caches in place again.

    Sound because the contract gives a cache no reader but its op. Changes `graph_module`.
    """
    functional = torch.ops.causal_forcing.kv_cache_attention.default
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target is functional:
            node.target = kv_cache_attention
    graph_module.recompile()
