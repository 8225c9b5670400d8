"""What is quantised, and with which scales: the part of a calibration that a graph is made from, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from causal_forcing.build_engines.models.dit import CausalDiT
from causal_forcing.build_engines.quantization.fp8_linear import QuantizedLinear
from causal_forcing.runtime.errors import EngineDamagedError

RECIPE_FILE = "quantization.safetensors"
"""File of an engine directory that holds its recipe: what verification quantises its modules with."""

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
    """Layer name, such as `blocks.0.ffn.2`, to its scaling."""

    def apply(self, dit: CausalDiT) -> None:
        """Replace the named linear layers by quantised ones."""
        for name, scaling in self.linears.items():
            linear = dit.get_submodule(name)
            assert isinstance(linear, nn.Linear), f"{name} is a linear layer that nobody has quantised yet"
            dit.set_submodule(name, QuantizedLinear(linear, scaling.scale, scaling.multiplier))

    def write(self, folder: Path) -> None:
        """Write `RECIPE_FILE` into a folder."""
        tensors = {f"{name}.scale": torch.tensor(scaling.scale) for name, scaling in self.linears.items()}
        for name, scaling in self.linears.items():
            if scaling.multiplier is not None:
                tensors[f"{name}.multiplier"] = scaling.multiplier.clone()  # layers of one input share it, files not
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
    names = [name.removesuffix(".scale") for name in tensors if name.endswith(".scale")]
    return Recipe(
        linears={
            name: InputScaling(scale=float(tensors[f"{name}.scale"]), multiplier=tensors.get(f"{name}.multiplier"))
            for name in names
        }
    )


def linear_names(layers: int) -> list[tuple[str, ...]]:
    """Return the names of all linear layers that may be quantised, grouped by their input, layer after layer."""
    return [tuple(f"blocks.{layer}.{name}" for name in group) for layer in range(layers) for group in LINEAR_GROUPS]
