"""The causal Wan DiT, shaped for export: caches, slots, modulation and RoPE phases are inputs.

One set of parameters (`CausalDiT`, upstream's key names) serves all exported networks: `TimestepModulation` (once, the
schedule is fixed), `PromptKV` (once a prompt), `DiTStep` (every denoising pass), `DiTContext` (once a chunk), and
`DiTContextStep`, which is both.

Source of the maths: thu-ml/Causal-Forcing@1fc7bbc wan/modules/causal_model.py and wan/modules/model.py. We differ in
form only: the timestep's modulation, the prompt's keys and values and the RoPE phases are computed outside the pass,
and the cache is a ring that nothing shifts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from causal_forcing.build_engines.models.dit_layers import Attention, Head, Layer
from causal_forcing.build_engines.models.token_split import TokenSplit
from causal_forcing.runtime.model_spec import DiTSpec

Tensors = tuple[torch.Tensor, ...]


class CausalDiT(nn.Module):
    """All parameters of the causal Wan DiT under upstream's names (without its `model.` prefix)."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.spec = spec
        self.split: TokenSplit | None = None
        patch = (1, spec.patch_size, spec.patch_size)
        self.patch_embedding = nn.Conv3d(spec.latent_channels, spec.dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(spec.text_dim, spec.dim), nn.GELU(approximate="tanh"), nn.Linear(spec.dim, spec.dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(spec.freq_dim, spec.dim), nn.SiLU(), nn.Linear(spec.dim, spec.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(spec.dim, 6 * spec.dim))
        self.blocks = nn.ModuleList(Layer(spec) for _ in range(spec.num_layers))
        self.head = Head(spec)

    @property
    def layers(self) -> list[Layer]:
        """The transformer layers, in order."""
        return [layer for layer in self.blocks if isinstance(layer, Layer)]

    @property
    def ranks(self) -> int:
        """How many ranks share a pass."""
        return 1 if self.split is None else self.split.ranks

    def split_over(self, ranks: int, tokens: int) -> None:
        """Let several ranks run passes together; once attention is quantised, where it is.

        Args:
            ranks: A divisor of the heads.
            tokens: L of a chunk.
        """
        assert self.spec.num_heads % ranks == 0, "a rank has whole heads"
        self.split = TokenSplit(ranks=ranks, tokens=tokens)
        for layer in self.layers:
            layer.split, layer.cache_attention.ranks = self.split, ranks

    def embed(self, latent: torch.Tensor) -> torch.Tensor:
        """Turn latent chunks [B, F, C, h, w] into tokens [B, L, dim]: frame, row, column; this rank's, where split."""
        tokens: torch.Tensor = self.patch_embedding(latent.transpose(1, 2))
        tokens = tokens.flatten(2).transpose(1, 2)
        return tokens if self.split is None else self.split.own(tokens)

    def phases(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the RoPE phases [L, D/2] of the tokens that `embed` gives."""
        if self.split is None:
            return cos, sin
        cos, sin = self.split.own(torch.stack((cos, sin))).unbind()
        return cos, sin

    def unpatchify(self, patches: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """Arrange patches [B, L, p·p·C], channel fastest, in the shape of `latent` [B, F, C, h, w]; on every rank."""
        if self.split is not None:
            patches = self.split.whole(patches)
        batch, frames, channels, height, width = latent.shape
        p = self.spec.patch_size
        grid = patches.reshape(batch, frames, height // p, width // p, p, p, channels)
        return grid.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, frames, channels, height, width)


class TimestepModulation(nn.Module):
    """Timesteps to the modulation of every layer and of the head."""

    def __init__(self, dit: CausalDiT) -> None:
        super().__init__()
        self.time_embedding, self.time_projection = dit.time_embedding, dit.time_projection
        self.layer_modulation = nn.ParameterList(layer.modulation for layer in dit.layers)
        self.head_modulation = dit.head.modulation

    def forward(self, timestep_embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the modulation tables.

        Args:
            timestep_embedding: [timesteps, freq_dim] fp32, from `runtime.schedule.timestep_embedding`.

        Returns:
            Layers [timesteps, layers, 6, dim] (shift, scale, gate of self-attention, then of the feed-forward) and head
            [timesteps, 2, dim] (shift, scale).
        """
        embedding = self.time_embedding(timestep_embedding.to(self.head_modulation.dtype))
        projection = self.time_projection(embedding).reshape(embedding.shape[0], 1, 6, -1)
        return torch.cat(list(self.layer_modulation)) + projection, self.head_modulation + embedding[:, None]


class PromptKV(nn.Module):
    """A prompt embedding to every layer's cross-attention keys and values."""

    def __init__(self, dit: CausalDiT) -> None:
        super().__init__()
        self.text_embedding = dit.text_embedding
        self.cross_attn = nn.ModuleList(layer.cross_attn for layer in dit.layers)

    def forward(self, prompt_embeds: torch.Tensor) -> Tensors:
        """Project [B, text_len, text_dim] to (k, v) of each layer in turn, each [B, N, text_len, D]."""
        text = self.text_embedding(prompt_embeds)
        outputs: list[torch.Tensor] = []
        for attention in self.cross_attn:
            assert isinstance(attention, Attention), "cross_attn holds the layers' attention modules"
            outputs += attention.keys_values(text)
        return tuple(outputs)


def run_layers(
    layers: Sequence[Layer],
    x: torch.Tensor,
    layer_modulation: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    cross: Sequence[tuple[torch.Tensor, torch.Tensor]],
    caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    slots: torch.Tensor,
    valid_slots: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run the first layers of a pass; returns the residual stream [B, L, dim] and their caches in order."""
    caches_out: list[torch.Tensor] = []
    for index, layer in enumerate(layers):
        modulation = layer_modulation[index]
        attention, *written = layer.attend_self(x, modulation, rope, caches[index], slots, valid_slots)
        x = layer.finish(x, attention, modulation, cross[index])
        caches_out += written
    return x, caches_out


class DiTStep(nn.Module):
    """One denoising pass: a noisy chunk to its flow; leaves the chunk's keys and values in the cache."""

    def __init__(self, dit: CausalDiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(
        self,
        latent: torch.Tensor,
        layer_modulation: torch.Tensor,
        head_modulation: torch.Tensor,
        rope_cos: torch.Tensor,
        rope_sin: torch.Tensor,
        slots: torch.Tensor,
        valid_slots: torch.Tensor,
        *cross_and_caches: torch.Tensor,
    ) -> Tensors:
        """Run the pass.

        Args:
            latent: [B, F, C, h, w].
            layer_modulation: [layers, 6, dim], of the pass's timestep.
            head_modulation: [2, dim], of the pass's timestep.
            rope_cos: [L, D/2] fp32.
            rope_sin: [L, D/2] fp32.
            slots: [F] int32, first cache slot of each frame.
            valid_slots: [B] int32, slots attended to.
            *cross_and_caches: Cross-attention k, v of each layer in turn, each [B, N, text_len, D]; then k_cache,
                v_cache of each layer in turn, each [B, N, S, D].

        Returns:
            Flow [B, F, C, h, w], then the caches in their order.
        """
        layers = self.dit.layers
        cross, caches = _pairs(cross_and_caches[: 2 * len(layers)]), _pairs(cross_and_caches[2 * len(layers) :])
        rope = self.dit.phases(rope_cos, rope_sin)
        x, written = run_layers(
            layers, self.dit.embed(latent), layer_modulation, rope, cross, caches, slots, valid_slots
        )
        return (self.dit.unpatchify(self.dit.head(x, head_modulation), latent), *written)


class DiTContext(nn.Module):
    """The context pass: a clean chunk's keys and values into the cache, and nothing after the last layer's."""

    def __init__(self, dit: CausalDiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(
        self,
        latent: torch.Tensor,
        layer_modulation: torch.Tensor,
        rope_cos: torch.Tensor,
        rope_sin: torch.Tensor,
        slots: torch.Tensor,
        valid_slots: torch.Tensor,
        *cross_and_caches: torch.Tensor,
    ) -> Tensors:
        """Run the pass; arguments as in `DiTStep`, but no cross-attention of the last layer. Returns the caches."""
        *layers, last = self.dit.layers
        cross, caches = _pairs(cross_and_caches[: 2 * len(layers)]), _pairs(cross_and_caches[2 * len(layers) :])
        rope = self.dit.phases(rope_cos, rope_sin)
        x, written = run_layers(
            layers, self.dit.embed(latent), layer_modulation, rope, cross, caches, slots, valid_slots
        )
        _, *last_written = last.attend_self(x, layer_modulation[-1], rope, caches[-1], slots, valid_slots)
        return (*written, *last_written)


class DiTContextStep(nn.Module):
    """The context pass of a chunk and the first denoising pass of the next one, as one pass of two segments.

    Exact: in every layer the noisy segment attends to the clean segment's keys, which the same pass has just written,
    and the clean one does not see the noisy one's slots. The clean segment ends with the last layer's attention.
    """

    def __init__(self, dit: CausalDiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(
        self,
        latent: torch.Tensor,
        next_latent: torch.Tensor,
        layer_modulation: torch.Tensor,
        head_modulation: torch.Tensor,
        rope_cos: torch.Tensor,
        rope_sin: torch.Tensor,
        slots: torch.Tensor,
        valid_slots: torch.Tensor,
        *cross_and_caches: torch.Tensor,
    ) -> Tensors:
        """Run the pass.

        Args:
            latent: [1, F, C, h, w], the clean chunk.
            next_latent: [1, F, C, h, w], the noisy chunk.
            layer_modulation: [layers, 2, 6, dim], of the context's timestep and of the noisy chunk's.
            head_modulation: [2, dim], of the noisy chunk's timestep.
            rope_cos: [2·L, D/2] fp32, of both chunks.
            rope_sin: [2·L, D/2] fp32.
            slots: [2·F] int32, first cache slot of each frame.
            valid_slots: [2] int32, slots that each chunk attends to.
            *cross_and_caches: As in `DiTStep`.

        Returns:
            Flow of the noisy chunk [1, F, C, h, w], then the caches in their order.
        """
        *layers, last = self.dit.layers
        pairs = _pairs(cross_and_caches)
        cross, caches = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
        rope = self.dit.phases(rope_cos, rope_sin)
        x = self.dit.embed(torch.cat((latent, next_latent), dim=1))
        x, written = run_layers(layers, x, layer_modulation, rope, cross, caches, slots, valid_slots)
        modulation, noisy = layer_modulation[-1], x.shape[1] // 2
        attention, *last_written = last.attend_self(x, modulation, rope, caches[-1], slots, valid_slots)
        x = last.finish(x[:, noisy:], attention[:, :, noisy:], modulation[1], cross[-1])
        return (self.dit.unpatchify(self.dit.head(x, head_modulation), next_latent), *written, *last_written)


def _pairs(tensors: Tensors) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(tensors[0::2], tensors[1::2], strict=True))
