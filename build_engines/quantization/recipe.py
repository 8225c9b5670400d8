"""What is quantised, and with which scales: the part of a calibration that a graph is made from, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from causal_forcing.build_engines.models.dit import CausalDiT
from causal_forcing.build_engines.models.dit_layers import CacheAttention
from causal_forcing.build_engines.quantization.fp8_attention import AttentionScales, QuantizedCacheAttention
from causal_forcing.build_engines.quantization.fp8_linear import QuantizedLinear
from causal_forcing.build_engines.quantization.head_scales import CodeCacheAttention, HeadScales
from causal_forcing.runtime.errors import EngineDamagedError

RECIPE_FILE = "quantization.safetensors"
"""File of an engine directory that holds its recipe: what verification quantises its modules with."""

SENSITIVE_ERROR = 0.08
"""Relative error of a layer's output above which it stays in the carrier type.

Rounding both factors to e4m3's three bits of mantissa gives about 0.037 where errors are independent; more means that
what is added up cancels, or that inputs lie below e4m3's range.
"""

SENSITIVE_ATTENTION_ERROR = 0.03
"""The same for attention over the cache, where less is tolerated: it carries from chunk to chunk what a clip shows.

Layers of `shapes` whose error lies between 0.03 and 0.05 take 2 to 3 dB of PSNR from its clips together, more than all
linear layers at 0.02 to 0.05; and of 24 clips of two steps, 16 keep their objects with them, 20 without them and in
fp32.
"""

HEADROOM = 2.0
"""Factor on the largest magnitude seen: calibration sees few prompts, and a value out of range is cut off."""

LINEAR_GROUPS = (
    ("self_attn.q", "self_attn.k", "self_attn.v"),
    ("self_attn.o",),
    ("cross_attn.q",),
    ("cross_attn.o",),
    ("ffn.0",),
    ("ffn.2",),
)
"""Linear layers of a transformer layer that passes run, grouped by their input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputScaling:
    """How a linear layer's inputs are quantised."""

    scale: float
    """Static scale of the whole tensor, a power of two."""
    multiplier: torch.Tensor | None = None
    """[in] fp32 powers of two that even the channels out; None is 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The quantised layers of a DiT; what is not named stays in the carrier type."""

    linears: Mapping[str, InputScaling]
    """Name of a linear layer, such as `blocks.0.ffn.2`, to its scaling."""
    attention: Mapping[str, AttentionScales | HeadScales] = field(default_factory=dict)
    """Name of an attention module, such as `blocks.0.cache_attention`, to its scales."""

    def apply(self, dit: CausalDiT) -> None:
        """Replace the named modules by quantised ones."""
        for name, module in self.modules(dit).items():
            dit.set_submodule(name, module)

    def modules(self, dit: CausalDiT) -> dict[str, nn.Module]:
        """Make the quantised modules that take the places of a model's own; the model is unchanged."""
        quantised: dict[str, nn.Module] = {}
        for name, scaling in self.linears.items():
            linear = dit.get_submodule(name)
            assert isinstance(linear, nn.Linear), f"{name} is a linear layer that nobody has quantised yet"
            quantised[name] = QuantizedLinear(linear, scaling.scale, scaling.multiplier)
        for name, scales in self.attention.items():
            attention = dit.get_submodule(name)
            assert isinstance(attention, CacheAttention), f"{name} is attention that nobody has quantised yet"
            like = dit.patch_embedding.weight
            quantised[name] = (
                CodeCacheAttention(attention, scales, like)
                if isinstance(scales, HeadScales)
                else QuantizedCacheAttention(attention, scales, like)
            )
        return quantised

    def write(self, folder: Path) -> None:
        """Write `RECIPE_FILE` into a folder."""
        tensors = {f"{name}.scale": torch.tensor(scaling.scale) for name, scaling in self.linears.items()}
        for name, scaling in self.linears.items():
            if scaling.multiplier is not None:
                tensors[f"{name}.multiplier"] = scaling.multiplier.clone()  # layers of one input share it, files not
        for name, scales in self.attention.items():
            if isinstance(scales, HeadScales):
                tensors |= {f"{name}.heads": scales.scales, f"{name}.k_offset": scales.k_offset}
            else:
                tensors[f"{name}.qkv"] = torch.tensor([scales.q, scales.k, scales.v])
        save_file(tensors, folder / RECIPE_FILE)


def find_recipe(folder: Path) -> Recipe | None:
    """Return the recipe of an engine directory; None where nothing in it is quantised.

    Raises:
        EngineDamagedError: It is not readable.
    """
    path = folder / RECIPE_FILE
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors' own exception has no public base class
        raise EngineDamagedError(f"{path} cannot be read ({error}); rebuild the engine with cf-build") from error

    def names(ending: str) -> list[str]:
        return [name.removesuffix(ending) for name in tensors if name.endswith(ending)]

    attention: dict[str, AttentionScales | HeadScales] = {}
    for name in names(".qkv"):
        q, k, v = tensors[f"{name}.qkv"].tolist()
        attention[name] = AttentionScales(q=q, k=k, v=v)
    for name in names(".heads"):
        attention[name] = HeadScales(scales=tensors[f"{name}.heads"], k_offset=tensors[f"{name}.k_offset"])
    return Recipe(
        linears={
            name: InputScaling(scale=float(tensors[f"{name}.scale"]), multiplier=tensors.get(f"{name}.multiplier"))
            for name in names(".scale")
        },
        attention=attention,
    )


def linear_groups(layers: int) -> list[tuple[str, ...]]:
    """Return the names of all linear layers that may be quantised, grouped by their input, layer after layer."""
    return [tuple(f"blocks.{layer}.{name}" for name in group) for layer in range(layers) for group in LINEAR_GROUPS]
