"""A recipe in its file and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from causal_forcing.build_engines.quantization.fp8_attention import AttentionScales
from causal_forcing.build_engines.quantization.recipe import RECIPE_FILE, InputScaling, Recipe, find_recipe
from causal_forcing.runtime.errors import EngineDamagedError


def test_recipe_written_and_found_is_the_same(tmp_path: Path) -> None:
    shared = torch.tensor([1.0, 2.0, 0.25])
    recipe = Recipe(
        linears={
            "blocks.0.self_attn.q": InputScaling(scale=0.125, multiplier=shared),
            "blocks.0.self_attn.k": InputScaling(scale=0.125, multiplier=shared),
            "blocks.0.ffn.2": InputScaling(scale=2.0**-9),
        },
        attention={"blocks.0.cache_attention": AttentionScales(q=0.5, k=0.25, v=2.0)},
    )
    recipe.write(tmp_path)
    found = find_recipe(tmp_path)
    assert found is not None
    assert found.attention == recipe.attention
    assert found.linears.keys() == recipe.linears.keys()
    for name, scaling in recipe.linears.items():
        assert found.linears[name].scale == scaling.scale
        multiplier = found.linears[name].multiplier
        assert (multiplier is None) == (scaling.multiplier is None)
        assert multiplier is None or torch.equal(multiplier, shared)


def test_recipe_of_an_engine_that_is_not_quantised_is_none(tmp_path: Path) -> None:
    assert find_recipe(tmp_path) is None


def test_recipe_that_is_damaged_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / RECIPE_FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(EngineDamagedError, match=RECIPE_FILE):
        find_recipe(tmp_path)
