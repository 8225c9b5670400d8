"""The causal DiT over whole clips, as training needs it: every chunk is denoised behind the clean chunks before it.

A clip goes through clean at timestep 0, which leaves the keys and values that the engine's context passes would leave
in the cache, and noisy: each chunk attends to those of earlier chunks and to itself (teacher forcing, Causal-Forcing
wan/modules/causal_model.py). There is no mask: each chunk is one attention over exactly the keys that it sees.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from causal_forcing.build_engines.models.dit import CausalDiT, TimestepModulation
from causal_forcing.build_engines.models.dit_layers import Layer
from causal_forcing.plugins.dit_ops import rotate
from causal_forcing.runtime.rope import BASE, axis_dims
from causal_forcing.runtime.schedule import timestep_embedding

Past = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]
"""A layer's keys and values, chunk by chunk, each [B, N, L, D]."""


class TeacherForcing(nn.Module):
    """Runs a `CausalDiT` over clips.

    Args:
        dit: Its parameters are used, not copied.
        compiled: Whether torch.compile fuses the parts around the attention.
    """

    def __init__(self, dit: CausalDiT, *, compiled: bool = False) -> None:
        super().__init__()
        self.dit = dit
        self.tables = TimestepModulation(dit)
        self._before: Any = torch.compile(before_attention, dynamic=False) if compiled else before_attention
        self._after: Any = torch.compile(after_attention, dynamic=False) if compiled else after_attention

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
        past = self.remember(clean, prompt_embeds, positions, chunk_frames)
        return self.denoise(noisy, past, timesteps, prompt_embeds, positions, chunk_frames)

    def remember(
        self, clean: torch.Tensor, prompt_embeds: torch.Tensor, positions: torch.Tensor, chunk_frames: int
    ) -> list[Past]:
        """Return each layer's keys and values of clean chunks; arguments as of `forward`."""
        x, text, rope, tokens = self._enter(clean, prompt_embeds, positions)
        modulation, _ = self._modulation(torch.zeros_like(positions))
        past: list[Past] = []
        for layer, rows in zip(self.dit.layers, modulation, strict=True):
            q, k, v = self._before(layer, x, rows, *rope)
            past.append((k.split(chunk_frames * tokens, dim=2), v.split(chunk_frames * tokens, dim=2)))
            if len(past) < len(self.dit.layers):
                x = self._after(layer, x, attend(q, *past[-1], past[-1]), rows, text)
        return past

    def denoise(
        self,
        noisy: torch.Tensor,
        past: list[Past],
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        positions: torch.Tensor,
        chunk_frames: int,
    ) -> torch.Tensor:
        """Return the flow of noisy chunks behind what `remember` gave; the other arguments as of `forward`."""
        x, text, rope, tokens = self._enter(noisy, prompt_embeds, positions)
        modulation, head = self._modulation(timesteps)
        for layer, rows, clean in zip(self.dit.layers, modulation, past, strict=True):
            q, k, v = self._before(layer, x, rows, *rope)
            own = k.split(chunk_frames * tokens, dim=2), v.split(chunk_frames * tokens, dim=2)
            x = self._after(layer, x, attend(q, *own, clean), rows, text)
        shift, scale = head.unbind(2)
        patches = self.dit.head.head(modulate(normalise(x, self.dit.head.eps), shift, scale))
        return self.dit.unpatchify(patches, noisy)

    def _enter(
        self, latents: torch.Tensor, prompt_embeds: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor], int]:
        """Return tokens [B, F·L, dim], text [B, text_len, dim], RoPE phases, and the tokens of a frame."""
        spec = self.dit.spec
        rows, columns = latents.shape[-2] // spec.patch_size, latents.shape[-1] // spec.patch_size
        rope = rope_phases(positions, rows, columns, spec.head_dim)
        return self.dit.embed(latents), self.dit.text_embedding(prompt_embeds), rope, rows * columns

    def _modulation(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the modulation of each layer, [layers, B, F, 6, dim], and of the head, [B, F, 2, dim]."""
        embedding = timestep_embedding(timesteps.flatten(), self.dit.spec.freq_dim)
        layers, head = self.tables(embedding.float())
        return layers.unflatten(0, timesteps.shape).permute(2, 0, 1, 3, 4), head.unflatten(0, timesteps.shape)


def before_attention(
    layer: Layer, x: torch.Tensor, modulation: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries and keys with their phases, and values, each [B, N, F·L, D], for x [B, F·L, dim]."""
    normed = modulate(normalise(x, layer.eps), modulation[:, :, 0], modulation[:, :, 1])
    q, (k, v) = layer.self_attn.queries(normed), layer.self_attn.keys_values(normed)
    return rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v


def normalise(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise tokens over their last axis."""
    return F.layer_norm(x, (x.shape[-1],), eps=eps)


def attend(
    q: torch.Tensor, own_k: tuple[torch.Tensor, ...], own_v: tuple[torch.Tensor, ...], past: Past
) -> torch.Tensor:
    """Attend from each chunk of q [B, N, F·L, D] to the clean chunks before it and to its own keys and values."""
    outputs = []
    for index, queries in enumerate(q.split(own_k[0].shape[2], dim=2)):
        keys = torch.cat((*past[0][:index], own_k[index]), dim=2)
        values = torch.cat((*past[1][:index], own_v[index]), dim=2)
        outputs.append(F.scaled_dot_product_attention(queries, keys, values))
    return torch.cat(outputs, dim=2)


def after_attention(
    layer: Layer, x: torch.Tensor, attention: torch.Tensor, modulation: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """Add self-attention, cross-attention and feed-forward to x [B, F·L, dim]."""
    _, _, gate, shift, scale, gate_ffn = modulation.unbind(2)
    x = x + _gated(layer.self_attn.o(layer.self_attn.merge_heads(attention)), gate)
    k, v = layer.cross_attn.keys_values(text)
    queries = layer.cross_attn.queries(layer.norm3(x)).to(v.dtype)
    attended = F.scaled_dot_product_attention(queries, k.to(v.dtype), v)
    x = x + layer.cross_attn.o(layer.cross_attn.merge_heads(attended))
    return x + _gated(layer.ffn(modulate(normalise(x, layer.eps), shift, scale)), gate_ffn)


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


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scale and shift the tokens x [B, F·L, dim] of each frame by its row of [B, F, dim]."""
    frames = x.unflatten(1, (shift.shape[1], -1))
    return (frames * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def _gated(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (x.unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]).flatten(1, 2)
