"""Networks as tapes: what an engine plays is what the module computes, with every operator merged that can be."""

from __future__ import annotations

import collections
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from causal_forcing.build_engines.builder import has_pair, network_names
from causal_forcing.runtime.engine import IOTensors
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.engines.cuda_engine import CudaEngine, DeviceWeights
from causal_forcing.runtime.errors import EngineDamagedError
from causal_forcing.runtime.resolution import resolve_engine
from causal_forcing.runtime.variant import VARIANTS

CPU = torch.device("cpu")
DIT = ("timestep_modulation", "prompt_kv", "dit_step", "dit_context", "dit_context_step")
DECODER, ENCODER = ("vae_decoder_first", "vae_decoder"), ("vae_encoder_first", "vae_encoder")

CASES = [
    *(("tiny", precision, ("dit",), name) for precision in ("fp32", "bf16") for name in DIT),
    *(("tiny-i2v", precision, ("dit",), name) for precision in ("fp32", "bf16") for name in DIT),
    *(("tiny-i2v", "fp32", ("vae",), name) for name in (*DECODER, *ENCODER)),
    *(("tiny", "bf16", ("vae",), name) for name in DECODER),
    *(("tiny", precision, ("text_encoder",), "text_encoder") for precision in ("fp32", "bf16")),
]

Tape = Any
Recorded = Any
Record = Callable[..., Recorded]


def tolerance_of(name: str, precision: str) -> float:
    """Return the largest error, relative to the largest value.

    Only convolutions and matrix products of other shapes or memory layouts sum in another order: in fp32 that is a few
    units of 1e-7 a layer. In bf16 such a sum may round to the neighbour, 2⁻⁸ away, once or twice on the way out.
    """
    if precision == "bf16":
        return 4 * 2**-8
    return 1e-5 if name.startswith("vae") else 1e-6


@pytest.mark.parametrize(("slug", "precision", "parts", "name"), CASES, ids=lambda part: str(part))
def test_network_played_equals_its_module(
    slug: str, precision: str, parts: tuple[str, ...], name: str, record: Record
) -> None:
    recorded = record(slug, precision, parts=parts)
    got, want = recorded.played(name), recorded.expected(name)
    assert list(got) == list(want)
    for output, tensor in want.items():
        assert (got[output].shape, got[output].dtype) == (tensor.shape, tensor.dtype), output
        error = (got[output].double() - tensor.double()).abs().max()
        limit = tolerance_of(name, precision) * tensor.double().abs().max()  # 0 for a past that is none
        assert error <= limit, f"{output} is off by {error:.1e}, allowed {limit:.1e}"


@pytest.mark.parametrize("decoder", ["taehv", "lighttae"])
def test_tiny_decoder_played_equals_its_module(decoder: str, record: Record) -> None:
    recorded = record("tiny", "fp32", parts=("vae",), decoder=decoder)
    for name in DECODER:
        got, want = recorded.played(name), recorded.expected(name)
        for output, tensor in want.items():
            torch.testing.assert_close(got[output], tensor, atol=1e-5, rtol=1e-5, msg=f"{name} {output}")


def test_networks_written_are_those_that_the_build_announces(record: Record) -> None:
    recorded = record("tiny", "fp32", parts=("dit",))
    assert tuple(recorded.networks) == DIT == tuple(network_names(VARIANTS["tiny"], ("dit",), with_pair=True))
    assert recorded.artefacts == {name: f"{name}.tape.json" for name in DIT}


def test_network_played_again_on_the_same_inputs_gives_the_same(record: Record) -> None:
    """Nothing that a pass leaves in its buffers or weights changes the next one."""
    for parts, name in ((("dit",), "dit_step"), (("vae",), "vae_decoder")):
        recorded = record("tiny-i2v", "fp32", parts=parts)
        once, thrice = recorded.played(name), recorded.played(name, times=3)
        assert all(torch.equal(once[output], thrice[output]) for output in once), name


def test_caches_are_written_in_their_own_slots_alone(record: Record) -> None:
    recorded = record("tiny", "fp32", parts=("dit",))
    name, geometry = "dit_step", recorded.geometry
    spec, inputs = recorded.networks[name].spec, recorded.inputs(name)
    given = dict(zip((io.name for io in spec.inputs), inputs, strict=True))
    written = torch.zeros(geometry.cache_slots, dtype=torch.bool)
    for slot in given["slots"].tolist():
        written[slot : slot + geometry.tokens_per_frame] = True
    got = recorded.played(name)
    for output, cache in spec.states:
        assert torch.equal(got[output][:, :, ~written], given[cache][:, :, ~written])
        assert (got[output] != given[cache])[:, :, written].any(dim=3).all()


def test_decoder_played_twice_carries_its_caches_on(record: Record) -> None:
    """A chunk after a chunk: the second decodes from what the first has left, as the module does."""
    recorded = record("tiny-i2v", "fp32", parts=("vae",))
    name = "vae_decoder"
    network, engine = recorded.networks[name], recorded.engines[name]
    latents = [recorded.inputs(name, seed)[0] for seed in range(2)]
    caches = recorded.inputs(name)[1:]
    io_tensors = IOTensors([network.spec], CPU)
    engine.bind(io_tensors)
    for (_, cache), value in zip(network.spec.states, caches, strict=True):
        io_tensors[cache].copy_(value)
    for latent in latents:
        io_tensors["latent"].copy_(latent)
        engine.enqueue()
        with torch.inference_mode():
            pixels, *caches = network.module(latent, *caches)
        torch.testing.assert_close(io_tensors["pixels"], pixels, atol=1e-5, rtol=1e-5)


def operators(tape: Tape) -> collections.Counter[str]:
    """Count the calls of a tape by operator, without namespace and overload."""
    return collections.Counter(call.operator.split(".")[1] for call in tape.calls)


LAYERS = 2
"""Of the tiny DiT."""


@pytest.mark.parametrize("name", ["dit_step", "dit_context_step"])
def test_nothing_between_the_matrix_products_of_the_dit_is_left_by_itself(name: str, record: Record) -> None:
    """Each layer is five products, two attentions and what is fused with them; the rest only renames memory."""
    calls = operators(record("tiny", "bf16", parts=("dit",)).tape(name))
    assert calls["linear"] == 5 * LAYERS + 1, "q·k·v, o, cross q, cross o, ffn down; the head"
    assert calls["linear_gelu"] == LAYERS
    assert calls["projected_attention"] == calls["scaled_dot_product_attention"] == LAYERS
    assert calls["rms_norm"] == LAYERS, "of the cross-attention's queries"
    assert calls["modulated_norm"] == 1, "of the first layer, before which nothing is added"
    assert calls["add_norm"] == 3 * LAYERS, "two norms inside of each layer, and the next layer's or the head's"
    for unfused in ("layer_norm", "gelu", "gated_add", "add", "mul", "norm_rope", "segmented_attention", "to", "clone"):
        assert calls[unfused] == 0, unfused


def test_nothing_lies_between_what_ranks_exchange_and_the_matrix_products(record: Record) -> None:
    calls = operators(record("tiny", "bf16", parts=("dit",), ranks=2).tape("dit_step"))
    assert calls["projected_exchange"] == calls["segmented_attention"] == calls["exchange_to_tokens"] == LAYERS
    assert calls["linear"] == 5 * LAYERS + 1
    for unfused in ("norm_rope", "exchange_to_heads", "projected_attention", "clone", "contiguous"):
        assert calls[unfused] == 0, unfused


def test_context_pass_ends_with_the_last_layers_keys_and_values(record: Record) -> None:
    calls = operators(record("tiny", "bf16", parts=("dit",)).tape("dit_context"))
    assert calls["linear"] == 5 * (LAYERS - 1) + 1
    assert calls["add_norm"] == 3 * (LAYERS - 1)
    assert calls["scaled_dot_product_attention"] == calls["linear_gelu"] == LAYERS - 1
    assert calls["projected_attention"] == LAYERS


def test_prompts_keys_and_values_of_all_layers_are_one_product(record: Record) -> None:
    calls = operators(record("tiny", "bf16", parts=("dit",)).tape("prompt_kv"))
    assert (calls["linear_gelu"], calls["linear"], calls["rms_norm"]) == (1, 2, LAYERS)


def test_queries_keys_and_values_are_views_of_one_product(record: Record) -> None:
    tape = record("tiny", "bf16", parts=("dit",)).tape("dit_step")
    made = {name: call for call in tape.calls for name in call.results}
    attentions = [call for call in tape.calls if call.operator == "causal_forcing.projected_attention.default"]
    dim = VARIANTS["tiny"].model.dit.dim
    for attention in attentions:
        parts = [made[argument["tensor"]] for argument in attention.arguments[:3]]
        assert [part.operator for part in parts] == ["aten.slice.Tensor"] * 3
        assert len({json.dumps(part.arguments[0]) for part in parts}) == 1
        assert [part.arguments[1:] for part in parts] == [(-1, start, start + dim) for start in (0, dim, 2 * dim)]


def test_networks_that_run_every_chunk_or_prompt_are_captured(record: Record) -> None:
    tapes = [
        (name, recorded.tape(name))
        for parts in (("dit",), ("vae",), ("text_encoder",))
        for recorded in [record("tiny-i2v" if parts == ("vae",) else "tiny", "fp32", parts=parts)]
        for name in recorded.networks
    ]
    assert {name for name, tape in tapes if tape.captured} == {
        "prompt_kv", "dit_step", "dit_context", "dit_context_step", "vae_decoder_first", "vae_decoder",
    }  # fmt: skip


def test_pair_is_for_one_clip_and_a_window_of_two_chunks() -> None:
    options = EngineOptions(slug="tiny", backend="torch", precision="bf16", pixel_height=16, pixel_width=32)
    config = resolve_engine(options, weights="random:0", device="cpu")
    cuda = dataclasses.replace(config, backend="cuda")
    assert not has_pair(config)
    assert has_pair(cuda)
    for change, has in ({"batch": 2}, False), ({"window_frames": 6}, True), ({"window_frames": 5}, False):
        assert has_pair(dataclasses.replace(cuda, geometry=dataclasses.replace(cuda.geometry, **change))) is has


# --- weights --------------------------------------------------------------------------------------------------------


def test_networks_of_one_model_read_one_file_and_share_its_tensors(record: Record) -> None:
    recorded = record("tiny", "bf16", parts=("dit",))
    tapes = {name: recorded.tape(name) for name in DIT}
    assert {tape.weight_file for tape in tapes.values()} == {"dit.safetensors"}
    assert [path.name for path in recorded.folder.glob("*.safetensors")] == ["dit.safetensors"]
    keys = {name: {weight.key for weight in tape.weights.values()} for name, tape in tapes.items()}
    assert keys["dit_step"] == keys["dit_context_step"] > keys["dit_context"]
    assert not keys["prompt_kv"] & keys["dit_step"]
    with safe_open(recorded.folder / "dit.safetensors", framework="pt") as opened:
        assert set(opened.keys()) == set().union(*keys.values()), "the file holds nothing that no tape reads"


def test_weight_file_holds_every_parameter_of_the_model_once(record: Record) -> None:
    recorded = record("tiny", "fp32", parts=("dit",))
    parameters = dict(recorded.networks["dit_step"].module.dit.named_parameters())
    stored = sum(tensor.numel() for tensor in load_file(recorded.folder / "dit.safetensors").values())
    # Modulation tables are split on their way into the tape; nothing else is written in another form.
    assert stored == sum(parameter.numel() for parameter in parameters.values())


def test_engines_of_one_model_share_their_weights_in_memory(record: Record) -> None:
    recorded = record("tiny-i2v", "bf16", parts=("vae",))
    weights = DeviceWeights(recorded.folder, CPU)
    loaded = {
        name: weights.load(
            recorded.tape(name).weight_file,
            {weight.key: weight for weight in recorded.tape(name).weights.values()},
        )
        for name in (*DECODER, *ENCODER)
    }
    for one, other in (DECODER, ENCODER):
        shared = loaded[one].keys() & loaded[other].keys()
        assert len(shared) > 20
        assert all(loaded[one][key] is loaded[other][key] for key in shared)
    assert recorded.tape(DECODER[0]).weight_file != recorded.tape(ENCODER[0]).weight_file


def test_weights_go_with_the_last_engine_that_uses_them(record: Record) -> None:
    recorded = record("tiny", "bf16", parts=("dit",))
    weights = DeviceWeights(recorded.folder, CPU)
    step, context = (
        CudaEngine(weights, recorded.networks[name].spec, recorded.folder / recorded.artefacts[name])
        for name in ("dit_step", "dit_context")
    )
    both = len(weights._loaded)
    del context
    assert len(weights._loaded) == both, "all that the context pass reads, the step reads too"
    del step
    assert len(weights._loaded) == 0


def test_weights_of_convolutions_alone_lie_with_channels_innermost(record: Record) -> None:
    recorded = record("tiny", "fp32", parts=("dit",))
    tape = recorded.tape("dit_step")
    (name,) = (name for name, weight in tape.weights.items() if weight.channels_last)
    (conv,) = (call for call in tape.calls if call.operator == "aten.conv3d.default")
    assert conv.arguments[1] == {"tensor": name}


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(record: Record, tmp_path: Path) -> tuple[Recorded, Path]:
    """A folder of tapes and weights to be spoilt."""
    recorded = record("tiny", "fp32", parts=("dit",))
    return recorded, Path(shutil.copytree(recorded.folder, tmp_path / "engine"))


def load(recorded: Recorded, folder: Path, name: str = "dit_step") -> CudaEngine:
    return CudaEngine(DeviceWeights(folder, CPU), recorded.networks[name].spec, folder / recorded.artefacts[name])


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"weight_file": "dit.safetensors"}', None], ids=repr
)
def test_tape_that_is_none_says_to_rebuild(content: bytes | None, copied: tuple[Recorded, Path]) -> None:
    recorded, folder = copied
    path = folder / "dit_step.tape.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(EngineDamagedError, match=r"dit_step\.tape\.json is not a readable tape .*rebuild it with cf-b"):
        load(recorded, folder)


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "other"])
def test_weight_file_that_is_broken_says_to_rebuild(damage: str, copied: tuple[Recorded, Path]) -> None:
    recorded, folder = copied
    path = folder / "dit.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "other": b"not weights" * 9}[damage])
    with pytest.raises(EngineDamagedError, match=r"dit\.safetensors cannot be loaded .*rebuild the engine with cf-bui"):
        load(recorded, folder)


def test_weight_file_without_a_tapes_key_says_to_rebuild(copied: tuple[Recorded, Path]) -> None:
    recorded, folder = copied
    path = folder / "dit_step.tape.json"
    tape = json.loads(path.read_text())
    next(iter(tape["weights"].values()))["key"] = "9999"
    path.write_text(json.dumps(tape))
    with pytest.raises(EngineDamagedError, match=r"9999.*rebuild the engine with cf-build"):
        load(recorded, folder)
    assert load(recorded, folder, "dit_context").spec.name == "dit_context"
