"""The UMT5 encoder of transformers, loaded from upstream's files and shaped for export."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from causal_forcing.build_engines.checkpoint import StateDict, load_into
from causal_forcing.runtime.model_spec import TextSpec

# transformers' name of each tensor of a layer, by upstream's.
_LAYER_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


class TextEncoder(nn.Module):
    """Turns token ids into the prompt embedding that the DiT attends to.

    Args:
        spec: Sizes.
        max_tokens: Longest prompt T, padding included.
    """

    def __init__(self, spec: TextSpec, *, max_tokens: int = 512) -> None:
        super().__init__()
        config = UMT5Config(
            vocab_size=spec.vocab_size,
            d_model=spec.dim,
            d_kv=spec.attention_dim // spec.num_heads,
            d_ff=spec.ffn_dim,
            num_layers=spec.num_layers,
            num_heads=spec.num_heads,
            relative_attention_num_buckets=spec.num_buckets,
            relative_attention_max_distance=spec.max_distance,
            layer_norm_epsilon=spec.eps,
            dropout_rate=0.0,
            pad_token_id=spec.pad_id,
        )
        # The stack alone: the model around it only holds the token embedding a second time.
        encoder: Any = UMT5EncoderModel(config).encoder
        # Plain matrix products: a fused attention operator with T5's bias is not one that every backend takes.
        encoder.set_attn_implementation("eager")
        self.encoder = encoder
        buckets = PositionBuckets(spec, max_tokens)
        for layer in encoder.block:
            layer.layer[0].SelfAttention._relative_position_bucket = buckets

    def forward(self, token_ids: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        """Encode prompts.

        Args:
            token_ids: [B, T] int64.
            token_mask: [B, T] int64, 1 for tokens and 0 for padding.

        Returns:
            prompt_embeds: [B, T, dim] in the weights' dtype, rows of padding zero.
        """
        is_token = token_mask != 0
        # Ready-made and 4-D, the mask passes transformers' mask code untouched, which would branch on its values.
        bias = _attention_bias(is_token, self.encoder.embed_tokens.weight.dtype)
        hidden = self.encoder(input_ids=token_ids, attention_mask=bias).last_hidden_state
        return _without_padding(hidden, is_token)


class TextEncoderPart(nn.Module):
    """Some consecutive stages of an encoder, for machines that cannot compile it whole; chained, the parts are it.

    Its tensors are named as the whole encoder's, so that weights are found by the same names.

    Args:
        whole: The encoder, whose modules the part shares.
        stages: Which of them; see `stage_parameters`.
    """

    def __init__(self, whole: TextEncoder, stages: range) -> None:
        super().__init__()
        stack, last = whole.encoder, len(whole.encoder.block)
        layers = {str(stage - 1): stack.block[stage - 1] for stage in stages if stage > 0}
        self.encoder = nn.ModuleDict({"block": nn.ModuleDict(layers)})
        self.takes_tokens, self.gives_embeds = 0 in stages, last in stages
        if self.takes_tokens:
            self.encoder["embed_tokens"] = stack.embed_tokens
        if self.gives_embeds:
            self.encoder["final_layer_norm"] = stack.final_layer_norm

    def forward(self, given: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        """Run the part.

        Args:
            given: What the part before gave, [B, T, dim] in the weights' dtype; to the first part, token ids [B, T]
                int64.
            token_mask: [B, T] int64, 1 for tokens and 0 for padding.

        Returns:
            Hidden states [B, T, dim] in the weights' dtype; of the last part, prompt_embeds, rows of padding zero.
        """
        is_token = token_mask != 0
        hidden: torch.Tensor = self.encoder["embed_tokens"](given) if self.takes_tokens else given
        bias = _attention_bias(is_token, hidden.dtype)
        layers: Any = self.encoder["block"]
        for layer in layers.values():
            hidden = layer(hidden, bias)
        return _without_padding(self.encoder["final_layer_norm"](hidden), is_token) if self.gives_embeds else hidden


def _attention_bias(is_token: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what to add to attention scores so that none falls on padding: [B, 1, 1, T] of a mask [B, T]."""
    return torch.where(is_token, 0.0, torch.finfo(dtype).min).to(dtype)[:, None, None, :]


def _without_padding(hidden: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """Return hidden states [B, T, dim] with rows of padding zero, by a mask [B, T]."""
    return torch.where(is_token[:, :, None], hidden, torch.zeros((), dtype=hidden.dtype, device=hidden.device))


class PositionBuckets:
    """Relative-position buckets as constants, in the place of transformers' function of the same arguments.

    That function truncates a logarithm that is a whole number at distances 16, 32 and 64, so a device whose logarithm
    is off by one bit would move a bucket's edge; and an exported graph would hold a copy of it per layer.

    Args:
        spec: Number of buckets and the distance from which on all positions share the last one.
        max_tokens: Longest sequence T.
    """

    def __init__(self, spec: TextSpec, max_tokens: int) -> None:
        per_direction = spec.num_buckets // 2
        distances = [_bucket(distance, per_direction, spec.max_distance) for distance in range(max_tokens)]
        # Real even where the module around it is built on meta.
        position = torch.arange(max_tokens, device="cpu")
        offset = position[None, :] - position[:, None]
        by_distance = torch.tensor(distances, dtype=torch.int64, device="cpu")
        self._buckets = by_distance[offset.abs()] + per_direction * (offset > 0)

    def __call__(self, relative_position: torch.Tensor) -> torch.Tensor:
        """Return the bucket of key minus query: [T, T] int64, of which only the shape and device are read."""
        queries, keys = relative_position.shape
        return self._buckets[:queries, :keys].to(relative_position.device)


def _bucket(distance: int, count: int, max_distance: int) -> int:
    """Return the bucket of a distance: one each up to half the count, then logarithmically wider ones."""
    exact = count // 2
    if distance < exact:
        return distance
    # The margin keeps whole numbers whole; the next distance is at least 1e-3 away.
    steps = math.log(distance / exact) / math.log(max_distance / exact) * (count - exact)
    return min(count - 1, exact + math.floor(steps + 1e-9))


def stage_parameters(spec: TextSpec) -> list[int]:
    """Return the parameters of each stage of an encoder: token embedding, layer 1, …, last layer and final norm."""
    layer = 4 * spec.dim * spec.attention_dim + 3 * spec.dim * spec.ffn_dim
    layer += 2 * spec.dim + spec.num_buckets * spec.num_heads
    stages = [spec.vocab_size * spec.dim] + [layer] * spec.num_layers
    stages[-1] += spec.dim
    return stages


def split_stages(spec: TextSpec, max_parameters: int) -> list[range]:
    """Group the stages of an encoder into parts of at most that many parameters; a larger stage is a part alone."""
    parts, start, total = [], 0, 0
    for stage, parameters in enumerate(stage_parameters(spec)):
        if stage > start and total + parameters > max_parameters:
            parts.append(range(start, stage))
            start, total = stage, 0
        total += parameters
    return [*parts, range(start, spec.num_layers + 1)]


def upstream_names(spec: TextSpec) -> dict[str, str]:
    """Return `TextEncoder`'s name of each tensor of an upstream file."""
    names = {
        "token_embedding.weight": "encoder.embed_tokens.weight",
        "norm.weight": "encoder.final_layer_norm.weight",
    }
    for index in range(spec.num_layers):
        for theirs, ours in _LAYER_NAMES.items():
            names[f"blocks.{index}.{theirs}.weight"] = f"encoder.block.{index}.{ours}.weight"
    return names


def upstream_shapes(spec: TextSpec) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each tensor of an upstream file, for `checkpoint.verify_state_dict`."""
    with torch.device("meta"):
        own = TextEncoder(spec).state_dict()
    return {theirs: tuple(own[ours].shape) for theirs, ours in upstream_names(spec).items()}


def load_text_encoder(state: StateDict, spec: TextSpec, *, dtype: torch.dtype, max_tokens: int = 512) -> TextEncoder:
    """Make an encoder of an upstream-named state dict.

    Args:
        state: What `checkpoint.read_state_dict` gave.
        spec: Sizes that the state dict must have.
        dtype: Type of weights and activations.
        max_tokens: Longest prompt T, padding included.

    Raises:
        StateDictMismatchError: The state dict is not this encoder's.
    """
    with torch.device("meta"):
        encoder = TextEncoder(spec, max_tokens=max_tokens)
    load_into(encoder, state, dtype=dtype, what="the UMT5 text encoder", names=upstream_names(spec))
    return encoder
