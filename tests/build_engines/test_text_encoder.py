"""The UMT5 encoder against upstream's numbers, and its exported graph against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from causal_forcing.build_engines.checkpoint import StateDictMismatchError, read_state_dict, verify_state_dict
from causal_forcing.build_engines.models.text_encoder import (
    PositionBuckets,
    TextEncoder,
    TextEncoderPart,
    load_text_encoder,
    split_stages,
    stage_parameters,
    upstream_names,
    upstream_shapes,
)
from causal_forcing.build_engines.random_weights import randomise
from causal_forcing.runtime.model_spec import TINY, WAN21_T2V_1_3B, TextSpec

GOLDEN_SPEC = TextSpec(vocab_size=128, dim=32, attention_dim=32, ffn_dim=64, num_heads=4, num_layers=3)
SAFETENSORS = "text.weights.safetensors"
BF16_PTH = "wan_models/Wan2.1-T2V-1.3B/models_t5_umt5-xxl-enc-bf16.pth"
# Upstream's own noise floor is 4e-6 (see the golden manifest); an epsilon of 1e-5 for 1e-6 shows at 5e-5.
TOLERANCE = 2e-5


def golden_encoder(golden: Path, name: str = SAFETENSORS, dtype: torch.dtype = torch.float32) -> TextEncoder:
    return load_text_encoder(read_state_dict(golden / name), GOLDEN_SPEC, dtype=dtype)


def tiny_encoder(dtype: torch.dtype = torch.float32) -> TextEncoder:
    with torch.device("meta"):
        encoder = TextEncoder(TINY.text)
    randomise(encoder, 0, dtype=dtype)
    return encoder


def parameters_of(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def prompt(tokens: int, length: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask [1, T] of a prompt with that many tokens."""
    ids = torch.randint(3, 100, (1, length), generator=torch.Generator().manual_seed(tokens))
    mask = (torch.arange(length) < tokens).long()[None]
    return ids * mask, mask


@pytest.mark.parametrize("case", ["text_ids", "text_prompts"])
@pytest.mark.parametrize("weights", [SAFETENSORS, BF16_PTH])
def test_text_encoder_golden_prompt_embeds_are_upstreams(golden: Path, weights: str, case: str) -> None:
    encoder = golden_encoder(golden, weights)
    expected = load_file(golden / f"{case}.safetensors")
    with torch.no_grad():
        embeds = encoder(expected["input_ids"], expected["attention_mask"])
    torch.testing.assert_close(embeds, expected["prompt_embeds"], rtol=TOLERANCE, atol=TOLERANCE)


def test_text_encoder_golden_padding_rows_are_zero_and_padding_ids_unseen(golden: Path) -> None:
    encoder = golden_encoder(golden)
    ids, mask = prompt(40)
    with torch.no_grad():
        embeds = encoder(ids, mask)
        other = encoder(torch.where(mask == 1, ids, 77), mask)
    assert embeds[0, 40:].abs().max() == 0
    assert embeds[0, :40].abs().amax(dim=-1).min() > 0
    assert torch.equal(embeds, other)


def test_text_encoder_bf16_is_close_to_fp32(golden: Path) -> None:
    full, half = golden_encoder(golden), golden_encoder(golden, dtype=torch.bfloat16)
    ids, mask = prompt(100)
    with torch.no_grad():
        expected, embeds = full(ids, mask), half(ids, mask)
    assert embeds.dtype == torch.bfloat16
    # Three layers at 8 bits of mantissa: a few units in the last place of values up to 4.
    assert (embeds.float() - expected).abs().max() < 0.1


def test_position_buckets_equal_transformers_at_every_offset() -> None:
    encoder: Any = TextEncoder(GOLDEN_SPEC).encoder
    theirs: Any = UMT5Attention._relative_position_bucket
    position = torch.arange(512)
    relative = position[None, :] - position[:, None]
    expected = theirs(encoder.block[0].layer[0].SelfAttention, relative)
    assert torch.equal(PositionBuckets(GOLDEN_SPEC, 512)(relative), expected)


def test_upstream_shapes_fit_the_golden_files(golden: Path) -> None:
    for name in (SAFETENSORS, BF16_PTH):
        verify_state_dict(read_state_dict(golden / name), upstream_shapes(GOLDEN_SPEC), what="text")


def test_upstream_shapes_of_the_real_encoder_cost_no_memory() -> None:
    shapes = upstream_shapes(WAN21_T2V_1_3B.text)
    assert len(shapes) == 2 + 24 * 10
    assert shapes["token_embedding.weight"] == (256384, 4096)
    assert shapes["blocks.23.ffn.fc2.weight"] == (4096, 10240)
    assert shapes["blocks.0.pos_embedding.embedding.weight"] == (32, 64)


def test_upstream_names_cover_the_module_once() -> None:
    names = upstream_names(TINY.text)
    assert sorted(names.values()) == sorted(TextEncoder(TINY.text).state_dict())


def test_load_text_encoder_of_other_sizes_is_refused_with_upstreams_names(golden: Path) -> None:
    state = read_state_dict(golden / SAFETENSORS)
    with pytest.raises(StateDictMismatchError, match="the UMT5 text encoder") as caught:
        load_text_encoder(state, TINY.text, dtype=torch.float32)
    assert "extra: blocks.2.attn.k.weight" in caught.value.problems
    assert "misshapen: token_embedding.weight (got [128, 32], expected [259, 32])" in caught.value.problems


def test_text_encoder_exported_graph_is_static_and_runs_alike_in_onnx_runtime(tmp_path: Path) -> None:
    import onnxruntime

    encoder, path = tiny_encoder(), tmp_path / "text_encoder.onnx"
    names = ["token_ids", "token_mask"]
    program = torch.onnx.export(
        encoder, prompt(30), dynamo=True, opset_version=24, input_names=names, output_names=["prompt_embeds"]
    )
    assert program is not None
    program.save(path)
    operators = {node.op_type for node in program.model.graph}
    # No logarithm: buckets are constants. No shape arithmetic: nothing depends on the data.
    assert not operators & {"Log", "Shape", "NonZero", "If", "Loop", "Range"}
    constants = [value for value in program.model.graph.initializers.values() if list(value.shape or ()) == [512, 512]]
    assert len(constants) == 1, "all layers share one table of buckets"
    session = onnxruntime.InferenceSession(path)
    assert [value.shape for value in session.get_inputs()] == [[1, 512], [1, 512]]
    for tokens in (1, 30, 512):
        ids, mask = prompt(tokens)
        with torch.no_grad():
            expected = encoder(ids, mask)
        (embeds,) = session.run(None, dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)))
        assert (torch.from_numpy(embeds) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("spec", [TINY.text, WAN21_T2V_1_3B.text], ids=["tiny", "real"])
def test_stage_parameters_are_counted_as_the_module_has_them(spec: TextSpec) -> None:
    with torch.device("meta"):
        whole = TextEncoder(spec)
    stages = stage_parameters(spec)
    assert sum(stages) == parameters_of(whole)
    for stage, parameters in enumerate(stages):
        assert parameters == parameters_of(TextEncoderPart(whole, range(stage, stage + 1))), stage


def test_stages_of_the_real_encoder_make_four_parts_of_the_denoisers_size() -> None:
    parts = split_stages(WAN21_T2V_1_3B.text, 1_600_000_000)
    assert parts == [range(3), range(3, 11), range(11, 19), range(19, 25)]


@pytest.mark.parametrize("max_parameters", [1, 4_000, 20_000, 25_000, 45_000, 10**9])
def test_stages_are_split_in_order_into_parts_within_the_limit(max_parameters: int) -> None:
    stages = stage_parameters(GOLDEN_SPEC)
    parts = split_stages(GOLDEN_SPEC, max_parameters)
    assert [stage for part in parts for stage in part] == list(range(len(stages)))
    totals = [sum(stages[stage] for stage in part) for part in parts]
    assert all(total <= max_parameters or len(part) == 1 for total, part in zip(totals, parts, strict=True))
    # No part has room for the stage that follows it.
    followed = zip(totals, parts[1:], strict=False)
    assert all(total + stages[part.start] > max_parameters for total, part in followed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("max_parameters", [1, 25_000, 10**9])
def test_parts_in_a_row_are_the_encoder_to_the_last_bit(golden: Path, max_parameters: int, dtype: torch.dtype) -> None:
    whole = golden_encoder(golden, dtype=dtype)
    parts = [TextEncoderPart(whole, stages) for stages in split_stages(GOLDEN_SPEC, max_parameters)]
    assert len(parts) == {1: 4, 25_000: 2, 10**9: 1}[max_parameters]
    ids, mask = prompt(100)
    with torch.no_grad():
        expected = whole(ids, mask)
        given = ids
        for part in parts:
            given = part(given, mask)
            assert given.dtype == dtype
    assert torch.equal(given, expected)


def test_parts_have_each_tensor_of_the_encoder_once_and_under_its_name() -> None:
    whole = tiny_encoder()
    parts = [TextEncoderPart(whole, range(stage, stage + 1)) for stage in range(3)]
    tensors = [item for part in parts for item in part.state_dict().items()]
    assert sorted(name for name, _ in tensors) == sorted(whole.state_dict())
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in tensors)


def test_text_encoder_bf16_is_exported() -> None:
    program = torch.export.export(tiny_encoder(torch.bfloat16), prompt(30))
    ids, mask = prompt(12)
    assert program.module()(ids, mask).dtype == torch.bfloat16
