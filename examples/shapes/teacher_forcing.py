"""The causal DiT over whole clips, as training needs it: every chunk is denoised behind the clean chunks before it.

A clip goes through twice at once, clean at timestep 0 and noisy. The clean half leaves the keys and values that the
engine's context passes would leave in the cache; a noisy chunk attends to those of earlier chunks and to itself
(teacher forcing, Causal-Forcing wan/modules/causal_model.py `_prepare_teacher_forcing_mask`). There is no mask: each
chunk is one attention over exactly the keys that it sees.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from causal_forcing.build_engines.models.dit import CausalDiT, Layer, TimestepModulation, rotate
from causal_forcing.runtime.rope import BASE, axis_dims
from causal_forcing.runtime.schedule import timestep_embedding


class TeacherForcing(nn.Module):
    """Runs a `CausalDiT` over clips.

    Args:
        dit: Its parameters are used, not copied.
        compiled: Whether torch.compile fuses the parts around the attention.
    """

    def __init__(self, dit: CausalDiT, *, compiled: bool = False) -> None:
        super().__init__()
        self.dit = dit
        self.modulation = TimestepModulation(dit)
        self._before: Any = torch.compile(before_attention) if compiled else before_attention
        self._after: Any = torch.compile(after_attention) if compiled else after_attention

    def forward(
        self,
        noisy: torch.Tensor,
        clean: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        positions: torch.Tensor,
        chunk_frames: int,
    ) -> torch.Tensor:
        """Predict the flow of every noisy chunk.

        Args:
            noisy: [B, F, C, h, w].
            clean: [B, F, C, h, w]; its last chunk has no effect.
            timesteps: [B, F], 0 to 1000, of the noisy frames; the same within a chunk.
            prompt_embeds: [B, text_len, text_dim].
            positions: [B, F] int64, each frame's place in the clip.
            chunk_frames: Frames denoised together.

        Returns:
            Flow [B, F, C, h, w].
        """
        dit = self.dit
        batch, frames, _, height, width = noisy.shape
        tokens = (height // dit.spec.patch_size) * (width // dit.spec.patch_size)
        both = torch.cat((noisy, clean))
        x = dit.embed(both)
        embedding = timestep_embedding(torch.cat((timesteps, torch.zeros_like(timesteps))).flatten(), dit.spec.freq_dim)
        layers, head = self.modulation(embedding.float())
        # [layers, 2B, F, 6, dim]: a row for each frame, spread over its tokens where it is used.
        layers = layers.view(2 * batch, frames, dit.spec.num_layers, 6, -1).permute(2, 0, 1, 3, 4)
        cos, sin = rope_phases(
            positions, height // dit.spec.patch_size, width // dit.spec.patch_size, dit.spec.head_dim
        )
        cos, sin = torch.cat((cos, cos)), torch.cat((sin, sin))
        text = dit.text_embedding(prompt_embeds)
        for layer, modulation in zip(dit.layers, layers, strict=True):
            q, k, v = self._before(layer, x, modulation, cos, sin)
            attention = attend(q, k, v, chunk_frames * tokens)
            x = self._after(layer, x, attention, modulation, text)
        patches = dit.head.norm(x[:batch]).unflatten(1, (frames, tokens))
        shift, scale = head[: batch * frames].view(batch, frames, 2, 1, -1).unbind(2)
        flow = dit.head.head(patches * (1 + scale) + shift)
        return dit.unpatchify(flow.flatten(1, 2), noisy)


def before_attention(
    layer: Layer, x: torch.Tensor, modulation: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries and keys with their phases, and values, each [2B, N, F·L, D], for x [2B, F·L, dim]."""
    normed = _modulate(layer.norm1(x), modulation[:, :, 0], modulation[:, :, 1])
    q, (k, v) = layer.self_attn.queries(normed), layer.self_attn.keys_values(normed)
    return rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
    """Attend from each chunk to the clean chunks before it and to itself; noisy half first, [2B, N, F·L, D]."""
    batch = len(q) // 2
    outputs: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for start in range(0, q.shape[2], chunk_tokens):
        own = slice(start, start + chunk_tokens)
        keys = torch.cat((k[batch:, :, :start], k[:batch, :, own]), dim=2)
        values = torch.cat((v[batch:, :, :start], v[:batch, :, own]), dim=2)
        outputs[0].append(F.scaled_dot_product_attention(q[:batch, :, own], keys, values))
        end = own.stop
        outputs[1].append(F.scaled_dot_product_attention(q[batch:, :, own], k[batch:, :, :end], v[batch:, :, :end]))
    return torch.cat([torch.cat(half, dim=2) for half in outputs])


def after_attention(
    layer: Layer, x: torch.Tensor, attention: torch.Tensor, modulation: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """Add self-attention, cross-attention and feed-forward to x [2B, F·L, dim]."""
    _, _, gate, shift, scale, gate_ffn = modulation.unbind(2)
    x = x + _gated(layer.self_attn.o(layer.self_attn.merge_heads(attention)), gate)
    k, v = layer.cross_attn.keys_values(text)
    queries = layer.cross_attn.queries(layer.norm3(x)).to(v.dtype)
    k, v = torch.cat((k, k)).to(v.dtype), torch.cat((v, v))
    x = x + layer.cross_attn.o(layer.cross_attn.merge_heads(F.scaled_dot_product_attention(queries, k, v)))
    return x + _gated(layer.ffn(_modulate(layer.norm2(x), shift, scale)), gate_ffn)


def rope_phases(positions: torch.Tensor, rows: int, columns: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines [B, 1, F·L, D/2] for frames at `positions` [B, F] (see `runtime.rope`)."""
    device = positions.device
    grid = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    batch, frames = positions.shape
    shape = (batch, frames, rows, columns)
    places = (positions[:, :, None, None].expand(shape), grid[0].expand(shape), grid[1].expand(shape))
    angles = [
        place[..., None].double() * BASE ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
        for place, dim in zip(places, axis_dims(head_dim), strict=True)
    ]
    phases = torch.cat(angles, dim=-1).flatten(1, 3)[:, None]
    return phases.cos().float(), phases.sin().float()


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    frames = x.unflatten(1, (shift.shape[1], -1))
    return (frames * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def _gated(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (x.unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]).flatten(1, 2)
