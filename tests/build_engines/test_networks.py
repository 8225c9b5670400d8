"""Specifications of the networks against the modules that they describe."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

import pytest
import torch

from causal_forcing.build_engines.builder import ALL_PARTS, BuildJob, cut_networks, network_names
from causal_forcing.build_engines.model_loading import HollowModels, RandomModels
from causal_forcing.build_engines.networks import Network, example_inputs
from causal_forcing.build_engines.text_networks import text_network_names, text_networks
from causal_forcing.runtime.config import EngineConfig
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.model_spec import SHAPES, TINY, WAN21_T2V_1_3B
from causal_forcing.runtime.resolution import resolve_engine
from causal_forcing.runtime.variant import VARIANTS, Variant


def find_network(networks: Iterable[Network], name: str) -> Network:
    """Return the network of a name."""
    return next(network for network in networks if network.spec.name == name)


def job(slug: str, *, batch: int = 1, hollow: bool = False, precision: str = "fp32") -> BuildJob:
    options = EngineOptions(slug=slug, backend="torch", precision=precision, pixel_height=16, pixel_width=32)
    config = resolve_engine(options, weights="random:0", device="cpu")
    config = dataclasses.replace(config, geometry=dataclasses.replace(config.geometry, batch=batch))
    kind = HollowModels if hollow else RandomModels
    seed = {} if hollow else {"seed": 0}
    return BuildJob(config=config, source=kind(model=TINY, dtype=getattr(torch, config.dtype), **seed))


@pytest.fixture(scope="module")
def networks() -> list[Network]:
    """The networks of tiny-i2v, which has them all, for two clips at once."""
    return list(cut_networks(job("tiny-i2v", batch=2)))


def test_networks_of_a_job_are_the_names_it_announces(networks: list[Network]) -> None:
    names = [network.spec.name for network in networks]
    assert names == network_names(VARIANTS["tiny-i2v"])
    assert len(set(names)) == len(names) == 9


@pytest.mark.parametrize("slug", ["tiny", "tiny-i2v"])
@pytest.mark.parametrize("parts", [("dit",), ("vae",), ("text_encoder",), ("vae", "dit"), ALL_PARTS], ids=str)
def test_networks_of_some_parts_are_the_names_announced_for_them(slug: str, parts: tuple[str, ...]) -> None:
    cut = cut_networks(dataclasses.replace(job(slug, hollow=True), parts=parts))
    variant: Variant = VARIANTS[slug]
    assert [network.spec.name for network in cut] == network_names(variant, parts)


def test_every_network_gives_what_its_specification_says(networks: list[Network]) -> None:
    for network in networks:
        inputs = [torch.zeros(io.shape, dtype=getattr(torch, io.dtype)) for io in network.spec.inputs]
        for name, tensor in zip((io.name for io in network.spec.inputs), inputs, strict=True):
            if name == "valid_slots":
                tensor.fill_(4)
        with torch.inference_mode():
            outputs = network.module(*inputs)
        outputs = (outputs,) if torch.is_tensor(outputs) else outputs
        got = [(tuple(output.shape), str(output.dtype).removeprefix("torch.")) for output in outputs]
        assert got == [(io.shape, io.dtype) for io in network.spec.outputs], network.spec.name


def test_every_state_pairs_an_output_with_an_input_of_its_shape(networks: list[Network]) -> None:
    stateful = 0
    for network in networks:
        inputs = {io.name: (io.shape, io.dtype) for io in network.spec.inputs}
        outputs = {io.name: (io.shape, io.dtype) for io in network.spec.outputs}
        for output, source in network.spec.states:
            assert outputs[output] == inputs[source]
            assert output == f"{source}_out"
            stateful += 1
        assert network.spec.in_place == network.spec.name.startswith("dit_")
    assert stateful > 0


def test_names_that_networks_share_have_one_shape_and_dtype(networks: list[Network]) -> None:
    seen: dict[str, tuple[tuple[int, ...], str]] = {}
    for network in networks:
        names = [io.name for io in network.spec.io_tensors()]
        assert len(set(names)) == len(names)
        for io in network.spec.io_tensors():
            assert seen.setdefault(io.name, (io.shape, io.dtype)) == (io.shape, io.dtype)
    assert {"latent", "prompt_embeds", "cross_k_00", "k_cache_01", "decoder_cache_00"} <= set(seen)


def test_context_network_needs_neither_the_head_nor_the_last_layers_text(networks: list[Network]) -> None:
    step, context = (find_network(networks, name).spec for name in ("dit_step", "dit_context"))
    left_out = {io.name for io in step.inputs} - {io.name for io in context.inputs}
    assert left_out == {"head_modulation", "cross_k_01", "cross_v_01"}
    assert [io.name for io in step.outputs] == ["flow", *(io.name for io in context.outputs)]


def test_step_network_takes_its_inputs_in_the_modules_order(networks: list[Network]) -> None:
    step = find_network(networks, "dit_step").spec
    fixed = ["latent", "layer_modulation", "head_modulation", "rope_cos", "rope_sin", "slots", "valid_slots"]
    cross = ["cross_k_00", "cross_v_00", "cross_k_01", "cross_v_01"]
    caches = ["k_cache_00", "v_cache_00", "k_cache_01", "v_cache_01"]
    assert [io.name for io in step.inputs] == fixed + cross + caches
    assert [io.name for io in step.outputs] == ["flow", *(f"{name}_out" for name in caches)]
    context = find_network(networks, "dit_context").spec
    assert [io.name for io in context.inputs] == [n for n in fixed + cross[:2] + caches if n != "head_modulation"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_networks_in_half_precision_keep_positions_and_timesteps_in_fp32(precision: str) -> None:
    half = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    full = {"rope_cos", "rope_sin", "timestep_embedding"}
    whole = {"slots": "int32", "valid_slots": "int32", "token_ids": "int64", "token_mask": "int64"}
    for network in cut_networks(job("tiny-i2v", hollow=True, precision=precision)):
        assert all(str(p.dtype) == f"torch.{half}" for p in network.module.parameters())
        for io in network.spec.io_tensors():
            assert io.dtype == whole.get(io.name, "float32" if io.name in full else half), io.name


def test_modulation_network_has_a_row_for_each_timestep_of_the_schedule() -> None:
    two_step = dataclasses.replace(
        VARIANTS["tiny"], denoising_steps=(1000,), first_chunk_denoising_steps=(1000, 750, 500, 250)
    )
    base = job("tiny", hollow=True)
    config: EngineConfig = dataclasses.replace(base.config, variant=two_step)
    network = find_network(cut_networks(dataclasses.replace(base, config=config)), "timestep_modulation")
    assert network.spec.inputs[0].shape == (5, TINY.dit.freq_dim)


def test_text_networks_of_a_split_encoder_hand_on_numbered_hidden_states() -> None:
    base = job("tiny", batch=2, hollow=True)
    geometry, text, dit = base.config.geometry, TINY.text, TINY.dit
    networks = list(text_networks(base.source, text, dit, geometry, precision="bfloat16", max_parameters=1))
    assert [network.spec.name for network in networks] == ["text_encoder_1", "text_encoder_2", "text_encoder_3"]
    assert [network.spec.name for network in networks] == text_network_names(text, 1)
    names = ["token_ids", "text_hidden_1", "text_hidden_2", "prompt_embeds"]
    for network, (given, gives) in zip(networks, itertools.pairwise(names), strict=True):
        assert [io.name for io in network.spec.inputs] == [given, "token_mask"]
        assert [(io.name, io.shape, io.dtype) for io in network.spec.outputs] == [(gives, (2, 512, 32), "bfloat16")]


def test_text_networks_of_the_released_encoder_are_four_and_of_a_small_one_is_one() -> None:
    assert text_network_names(WAN21_T2V_1_3B.text) == [f"text_encoder_{index}" for index in (1, 2, 3, 4)]
    assert text_network_names(TINY.text) == text_network_names(SHAPES.text) == ["text_encoder"]


def test_hollow_networks_hold_no_memory_but_know_their_sizes() -> None:
    hollow = {n.spec.name: n for n in cut_networks(job("tiny-i2v", hollow=True))}
    for network in cut_networks(job("tiny-i2v")):
        twin = hollow[network.spec.name]
        assert twin.spec == network.spec
        assert all(parameter.is_meta for parameter in twin.module.parameters())
        sizes = [sum(p.nbytes for p in n.module.parameters()) for n in (twin, network)]
        assert sizes[0] == sizes[1] > 0


def test_example_inputs_have_the_specifications_shapes(networks: list[Network]) -> None:
    for network in networks:
        got = [(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in example_inputs(network.spec)]
        assert got == [(io.shape, io.dtype) for io in network.spec.inputs]
