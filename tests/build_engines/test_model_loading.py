"""Weights into models: released files, seeds, and none at all."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from causal_forcing.build_engines.model_loading import HollowModels, ModelSource, RandomModels, ReleasedModels
from causal_forcing.build_engines.weights import WeightFiles
from causal_forcing.runtime.errors import CheckpointError
from causal_forcing.runtime.model_spec import TINY, DiTSpec, ModelSpec, TextSpec
from causal_forcing.runtime.variant import Variant


def golden_model(golden: Path) -> ModelSpec:
    """Return the specification of the golden weights."""
    weights = json.loads((golden / "manifest.json").read_text())["weights"]
    dit, text = weights["dit_b"]["model_config"], weights["text"]["model_config"]
    names = ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "text_len", "eps")
    return ModelSpec(
        name="golden",
        dit=DiTSpec(**{name: dit[name] for name in names}),
        vae=TINY.vae,
        text=TextSpec(
            vocab_size=text["vocab_size"],
            dim=text["dim"],
            attention_dim=text["dim_attn"],
            ffn_dim=text["dim_ffn"],
            num_heads=text["num_heads"],
            num_layers=text["encoder_layers"],
        ),
    )


def released(
    golden: Path,
    *,
    dit: str = "dit_b.checkpoint.pt",
    dtype: torch.dtype = torch.float32,
    use_ema: bool = False,
) -> ReleasedModels:
    """Stand for a release whose files are the golden ones."""
    variant = Variant(slug="golden", summary="", model=golden_model(golden), chunk_frames=3, use_ema=use_ema)
    files = WeightFiles(
        dit=golden / dit,
        vae=golden / "vae.weights.safetensors",
        text_encoder=golden / "text.weights.safetensors",
        tokenizer=golden / "wan_models/Wan2.1-T2V-1.3B/google/umt5-xxl",
    )
    return ReleasedModels(variant=variant, files=files, dtype=dtype)


def test_released_dit_takes_the_set_that_the_variant_names(golden: Path) -> None:
    expected = load_file(golden / "dit_b.weights.safetensors")
    plain = released(golden, use_ema=False).dit().state_dict()
    ema = released(golden, use_ema=True).dit().state_dict()
    assert set(plain) == set(ema) == {name.removeprefix("model.") for name in expected}
    for name, tensor in plain.items():
        assert torch.equal(tensor, expected[f"model.{name}"]), name
        # The fixture's EMA weights are 1.01 times the plain ones, kept in bf16.
        torch.testing.assert_close(ema[name], (1.01 * tensor).bfloat16().float(), rtol=2**-7, atol=1e-6)
    assert any(not torch.equal(ema[name], plain[name]) for name in plain)


def test_released_models_pass_their_check_and_load_whole_in_the_wanted_dtype(golden: Path) -> None:
    models = released(golden, dtype=torch.bfloat16)
    models.check()
    for module in (models.dit(), models.vae(), models.text_encoder()):
        assert not module.training
        for name, parameter in module.named_parameters():
            assert not parameter.is_meta, name
            assert parameter.dtype == torch.bfloat16, name
            assert not parameter.requires_grad, name


def test_released_dit_of_another_model_is_refused_with_the_slug(golden: Path) -> None:
    other = released(golden, dit="dit_a.weights.safetensors")
    for load in (other.check, other.dit):
        with pytest.raises(CheckpointError, match=r"does not fit the DiT of golden.*--checkpoint or --wan-folder"):
            load()


def test_random_models_of_one_seed_are_the_same_and_of_another_are_not() -> None:
    def first(seed: int) -> torch.Tensor:
        dit = RandomModels(model=TINY, seed=seed, dtype=torch.float32).dit()
        return torch.cat([parameter.flatten() for parameter in dit.parameters()])

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_random_models_leave_no_parameter_hollow() -> None:
    models = RandomModels(model=TINY, seed=0, dtype=torch.float16)
    for module in (models.dit(), models.vae(), models.taehv(), models.text_encoder()):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            assert not tensor.is_meta, name
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float16}
        assert not module.training


@pytest.mark.parametrize("kind", ["released", "random"])
def test_parts_of_a_text_encoder_hold_what_the_whole_one_holds(golden: Path, kind: str) -> None:
    models: ModelSource
    if kind == "released":
        whole, models = released(golden).text_encoder(), released(golden)
    else:
        random = RandomModels(model=TINY, seed=0, dtype=torch.float32)
        whole, models = random.text_encoder(), random
    for max_parameters, count in ((1, len(whole.encoder.block) + 1), (10**9, 1)):
        parts = list(models.text_encoder_parts(max_parameters))
        assert len(parts) == count
        tensors = {name: tensor for part in parts for name, tensor in part.state_dict().items()}
        assert tensors.keys() == whole.state_dict().keys()
        assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in tensors.items())


def test_random_text_encoder_is_drawn_a_part_at_a_time() -> None:
    parts = RandomModels(model=TINY, seed=0, dtype=torch.float32).text_encoder_parts(1)
    first = weakref.ref(next(parts))
    next(parts)
    assert first() is None


def test_random_and_hollow_models_have_the_parameters_of_the_released_ones() -> None:
    hollow = HollowModels(model=TINY, dtype=torch.float32)
    random = RandomModels(model=TINY, seed=0, dtype=torch.float32)
    for left, right in (
        (hollow.dit(), random.dit()),
        (hollow.vae(), random.vae()),
        (hollow.taehv(), random.taehv()),
        (hollow.text_encoder(), random.text_encoder()),
    ):
        shapes = [{n: tuple(p.shape) for n, p in module.named_parameters()} for module in (left, right)]
        assert shapes[0] == shapes[1]
        assert all(parameter.is_meta for parameter in left.parameters())
