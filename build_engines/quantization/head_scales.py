"""Self-attention over a cache of e4m3 codes, for GPUs whose kernels multiply them: scales a head, keys less an offset.

`fp8_attention` rounds in the carrier type, for graphs that a compiler quantises; here the cache itself holds codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from causal_forcing.build_engines.models.dit_layers import CacheAttention
from causal_forcing.build_engines.quantization.fp8_linear import fake_quantize, power_of_two_scale
from causal_forcing.plugins import reference
from causal_forcing.plugins.fp8_attention_ops import segmented_attention_fp8
from causal_forcing.plugins.token_ops import own_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadScales:
    """How an attention layer's inputs are quantised, head by head."""

    scales: torch.Tensor
    """[3, N] fp32 powers of two, of queries, keys and values."""
    k_offset: torch.Tensor
    """[N, D] fp32, taken off the keys: products of a query with all keys change by the same."""

    def fields(self) -> dict[str, Any]:
        """Return what the manifest records."""
        q, k, v = self.scales.tolist()
        return {"q": q, "k": k, "v": v, "k_offset_peak": round(float(self.k_offset.abs().max()), 4)}

    def attend(self, attention: CacheAttention, *args: torch.Tensor) -> torch.Tensor:
        """Return what attention gives for codes; arguments as of `CacheAttention`, caches written and left alone."""
        q, k, v, k_cache, v_cache, slots, valid_slots = args
        q_scale, k_scale, v_scale = (scale[:, None, None] for scale in self.scales.to(q.device))
        offset = self.k_offset.to(q.device)[:, None]

        def smooth(keys: torch.Tensor) -> torch.Tensor:
            return fake_quantize(keys.float() - offset, k_scale).to(q.dtype)

        return reference.kv_cache_attention(
            fake_quantize(q, q_scale),
            smooth(k),
            fake_quantize(v, v_scale),
            smooth(k_cache),
            fake_quantize(v_cache, v_scale),
            slots,
            valid_slots,
            attention.scale,
        )


class HeadObservation:
    """What was seen of the queries, keys and values of one layer, head by head."""

    def __init__(self) -> None:
        self._peaks: list[torch.Tensor] = []
        self._k_range: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Take note of one call's inputs; a forward pre-hook."""
        q, k, v = (tensor.float() for tensor in args[:3])
        peaks = [q.abs().amax(dim=(0, 2, 3)), v.abs().amax(dim=(0, 2, 3))]
        lowest, highest = k.amin(dim=(0, 2)), k.amax(dim=(0, 2))
        if self._k_range is not None:
            peaks = [torch.maximum(new, old) for new, old in zip(peaks, self._peaks, strict=True)]
            lowest, highest = torch.minimum(lowest, self._k_range[0]), torch.maximum(highest, self._k_range[1])
        self._peaks, self._k_range = peaks, (lowest, highest)

    def scales(self, attention: CacheAttention, headroom: float) -> HeadScales:
        """Return scales that fit what was seen, and offsets in the middle of every channel's range."""
        assert self._k_range is not None, "attention was observed for at least one pass"
        lowest, highest = (part.cpu() for part in self._k_range)
        offset, spread = (lowest + highest) / 2, ((highest - lowest) / 2).amax(dim=-1)
        q_peak, v_peak = (peak.cpu() for peak in self._peaks)
        scales = power_of_two_scale(headroom * torch.stack((q_peak, spread, v_peak)))
        return HeadScales(scales=scales, k_offset=offset)


class CodeCacheAttention(nn.Module):
    """Cache attention whose caches hold e4m3 codes, made from one in the carrier type.

    Args:
        attention: The module whose place it takes.
        scales: How its inputs are quantised.
        like: Any tensor on the device to be on.
    """

    def __init__(self, attention: CacheAttention, scales: HeadScales, like: torch.Tensor) -> None:
        super().__init__()
        self.scale = attention.scale
        self.ranks = attention.ranks
        self.head_scales: torch.Tensor
        self.k_offset: torch.Tensor
        self.register_buffer("head_scales", scales.scales.to(like.device))
        self.register_buffer("k_offset", scales.k_offset.to(like.device))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots: torch.Tensor,
        valid_slots: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the op as `CacheAttention` does, on caches as `segmented_attention_fp8` has them."""
        scales, offset = self.head_scales, self.k_offset
        if self.ranks > 1:
            scales, offset = own_heads(scales, self.ranks, 1), own_heads(offset, self.ranks, 0)
        attended = segmented_attention_fp8(q, k, v, k_cache, v_cache, slots, valid_slots, self.scale, scales, offset)
        return attended, k_cache, v_cache
