"""Networks that lack something the graph was exported with are refused: each check is broken on purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from causal_forcing.build_engines.plans import lowering
from causal_forcing.build_engines.plans.checks import check_network
from causal_forcing.build_engines.plans.job import PlanJob
from causal_forcing.build_engines.plans.lowering import layers, parse
from causal_forcing.plugins.contract import DOMAIN, ONNX_NAME
from causal_forcing.plugins.onnx_bodies import function_body
from causal_forcing.runtime.errors import PlanError
from causal_forcing.runtime.tensorrt_library import TensorRTLibrary, load_library

MakeJob = Callable[..., PlanJob]
NetworkPass = Callable[[TensorRTLibrary, Any], None]


@pytest.fixture
def library() -> TensorRTLibrary:
    return load_library("tensorrt-rtx")


@pytest.fixture
def check(library: TensorRTLibrary) -> Iterator[Callable[..., None]]:
    """Parse a job's graph, change the network, and check it."""
    kept: list[object] = []

    def parse_and_check(job: PlanJob, change: NetworkPass = lambda library, network: None) -> None:
        builder = library.trt.Builder(library.logger)
        network = builder.create_network(0)
        model, parser = parse(library, network, job)
        kept.append((builder, network, parser))
        change(library, network)
        check_network(library, network, model, job)

    yield parse_and_check
    for objects in kept:
        del objects


def changed_graph(job: PlanJob, folder: Path, change: Callable[[onnx.ModelProto], None]) -> PlanJob:
    model = onnx.load(job.onnx)
    change(model)
    path = folder / "changed.onnx"
    onnx.save(model, path)
    return dataclasses.replace(job, onnx=path)


def layer_of(network: Any, kind: str) -> Any:
    return next(layer for layer in layers(network) if layer.type.name == kind)


@pytest.mark.parametrize("name", ["timestep_modulation", "prompt_kv", "dit_step", "dit_context"])
def test_networks_as_exported_pass(name: str, make_plan_job: MakeJob, check: Callable[..., None]) -> None:
    check(make_plan_job(name))


def test_every_self_attention_layer_has_the_device_side_length_and_cross_attention_none(
    library: TensorRTLibrary, make_plan_job: MakeJob
) -> None:
    job = make_plan_job()
    builder = library.trt.Builder(library.logger)
    network = builder.create_network(0)
    kept = parse(library, network, job)
    lengths = {}
    for layer in layers(network):
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = library.trt.IAttentionInputLayer
            length = layer.attention.key_value_lengths
            lengths[layer.attention.get_input(1).name] = length and length.name
    assert lengths["k_cache_00_out"] == lengths["k_cache_01_out"] == "valid_slots"
    assert list(lengths.values()).count(None) == len(lengths) - 2 == 2
    assert kept


def test_attention_without_its_key_length_is_refused(
    make_plan_job: MakeJob, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "attach_lengths", lambda library, network: None)
    with pytest.raises(PlanError, match=r"input valid_slots was dropped.*has key length none, expected valid_slots"):
        check(make_plan_job())


def test_attention_with_another_key_length_is_refused(make_plan_job: MakeJob, check: Callable[..., None]) -> None:
    def attach_another(library: TensorRTLibrary, network: Any) -> None:
        other = network.add_constant((1,), library.trt.Weights(np.array([7], dtype=np.int32)))
        other.get_output(0).name = "seven"
        lowering.cache_attentions(library, network)[0].key_value_lengths = other.get_output(0)

    with pytest.raises(PlanError, match="has key length seven, expected valid_slots"):
        check(make_plan_job(), attach_another)


def test_length_that_enters_as_the_input_that_parsers_drop_is_noticed(
    make_plan_job: MakeJob, check: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention-24's nonpad_kv_seqlen, which TensorRT's parser ignores without an error."""

    def use_nonpad_kv_seqlen(model: onnx.ModelProto) -> None:
        body = function_body(writes=1)
        for node in body.node:
            if node.op_type == "Attention":
                node.input[3] = ""
                node.input.extend(["", "", "valid_int64"])
        cast = helper.make_node("Cast", ["valid_slots"], ["valid_int64"], to=onnx.TensorProto.INT64)
        body.node.insert(len(body.node) - 1, cast)
        for function in model.functions:
            if function.name == ONNX_NAME:
                function.CopyFrom(body)

    monkeypatch.setattr(lowering, "_exchange_body", lambda model: None)
    monkeypatch.setattr(lowering, "attach_lengths", lambda library, network: None)
    job = changed_graph(make_plan_job(), tmp_path, use_nonpad_kv_seqlen)
    with pytest.raises(PlanError, match="input valid_slots was dropped: no output depends on it"):
        check(job)


def test_cache_whose_output_is_a_copy_is_refused(make_plan_job: MakeJob, check: Callable[..., None]) -> None:
    def copy(library: TensorRTLibrary, network: Any) -> None:
        update = layer_of(network, "KV_CACHE_UPDATE")
        output = update.get_output(0)
        name = output.name
        network.unmark_output(output)
        output.name = "inner"
        copied = network.add_identity(output).get_output(0)
        copied.name = name
        network.mark_output(copied)

    with pytest.raises(PlanError, match="cache k_cache_00 is not updated in place: k_cache_00_out comes from a layer"):
        check(make_plan_job(), copy)


def test_caches_that_alias_each_other_are_refused(make_plan_job: MakeJob, check: Callable[..., None]) -> None:
    def swap(library: TensorRTLibrary, network: Any) -> None:
        first, second = [layer for layer in layers(network) if layer.type.name == "KV_CACHE_UPDATE"][:2]
        k_cache, v_cache = first.get_input(0), second.get_input(0)
        first.set_input(0, v_cache)
        second.set_input(0, k_cache)

    with pytest.raises(PlanError, match="output k_cache_00_out does not alias k_cache_00 but v_cache_00"):
        check(make_plan_job(), swap)


def test_layer_in_another_precision_is_refused(make_plan_job: MakeJob, check: Callable[..., None]) -> None:
    def widen(library: TensorRTLibrary, network: Any) -> None:
        product = layer_of(network, "MATRIX_MULTIPLY")
        wide = [network.add_cast(product.get_input(index), library.trt.float32).get_output(0) for index in range(2)]
        plain = library.trt.MatrixOperation.NONE
        network.add_matrix_multiply(wide[0], plain, wide[1], plain)

    with pytest.raises(PlanError, match=r"\(MATRIX_MULTIPLY\) is in (BF16, )?FLOAT, expected BF16 \(bf16\)"):
        check(make_plan_job(), widen)


def test_graph_of_another_precision_is_refused(make_plan_job: MakeJob, check: Callable[..., None]) -> None:
    job = dataclasses.replace(make_plan_job(dtype="float16"), spec=make_plan_job().spec)
    with pytest.raises(PlanError, match=r"io_tensor latent is HALF \[.*\], expected BF16"):
        check(job)


def test_dropped_input_is_noticed(make_plan_job: MakeJob, check: Callable[..., None]) -> None:
    def forget(library: TensorRTLibrary, network: Any) -> None:
        inputs = {network.get_input(index).name: network.get_input(index) for index in range(network.num_inputs)}
        first = network.add_slice(inputs["layer_modulation"], (0, 0, 0), (2, 1, 64), (1, 1, 1))
        other = network.add_shuffle(first.get_output(0))
        other.reshape_dims = (2, 64)
        for layer in layers(network):
            for index in range(layer.num_inputs):
                tensor = layer.get_input(index)
                if tensor is not None and tensor.name == "head_modulation":
                    layer.set_input(index, other.get_output(0))

    with pytest.raises(PlanError, match="input head_modulation was dropped"):
        check(make_plan_job(), forget)


def test_graph_that_lacks_an_io_tensor_is_refused(make_plan_job: MakeJob, check: Callable[..., None]) -> None:
    step, context = make_plan_job("dit_step"), make_plan_job("dit_context")
    job = dataclasses.replace(context, spec=step.spec)
    with pytest.raises(PlanError, match="io_tensor head_modulation is not there"):
        check(job)


def test_quantiser_that_the_parser_left_out_is_noticed(make_plan_job: MakeJob, library: TensorRTLibrary) -> None:
    job = make_plan_job()
    builder = library.trt.Builder(library.logger)
    network = builder.create_network(0)
    model, parser = parse(library, network, job)
    model.graph.node.append(helper.make_node("QuantizeLinear", ["latent", "scale"], ["quantised"]))
    with pytest.raises(PlanError, match="the graph has 1 QuantizeLinear nodes, the network 0 QUANTIZE layers"):
        check_network(library, network, model, job)
    assert parser


def test_exchanged_body_is_in_the_model_that_is_parsed_and_not_in_the_file(
    library: TensorRTLibrary, make_plan_job: MakeJob
) -> None:
    job = make_plan_job()
    before = job.onnx.read_bytes()
    builder = library.trt.Builder(library.logger)
    network = builder.create_network(0)
    model, parser = parse(library, network, job)
    (body,) = (function for function in model.functions if function.domain == DOMAIN)
    assert [node.op_type for node in body.node].count("TRT_Attention") == 1
    assert job.onnx.read_bytes() == before
    assert parser
