"""Quantised graphs: their Q/DQ nodes and initializers, ONNX Runtime's answer, and TensorRT-RTX's builder."""

from __future__ import annotations

import collections
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from causal_forcing.build_engines.builder import BuildJob, cut_networks
from causal_forcing.build_engines.export import export_program, save_onnx
from causal_forcing.build_engines.model_loading import RandomModels
from causal_forcing.build_engines.networks import Network
from causal_forcing.build_engines.quantization.calibration import Calibration
from causal_forcing.build_engines.quantization.fp8_attention import AttentionScales
from causal_forcing.build_engines.quantization.native_attention import lower_quantised_attention
from causal_forcing.build_engines.quantization.recipe import InputScaling, Recipe
from causal_forcing.build_engines.verification import TOLERANCES, make_inputs
from causal_forcing.plugins.contract import ONNX_NAME

FP8 = onnx.TensorProto.FLOAT8E4M3FN

GROUPS, LINEARS, LAYERS = 6, 8, 2

RTX_BUILD = """
import sys, tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1]), [parser.get_error(i).desc() for i in range(parser.num_errors)]
lengths = next(network.get_input(i) for i in range(network.num_inputs) if network.get_input(i).name == "valid_slots")
fp8_reads = 0
for index in range(network.num_layers):
    layer = network.get_layer(index)
    if layer.type == trt.LayerType.ATTENTION_INPUT and layer.get_input(1).name.endswith("k_rounded"):
        layer.__class__ = trt.IAttentionInputLayer
        layer.attention.key_value_lengths = lengths
        fp8_reads += 1
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
plan = builder.build_serialized_network(network, config)
assert plan is not None, "the builder refused"
print(fp8_reads, plan.nbytes)
"""


def everything(calibration: Calibration) -> Recipe:
    """Quantise every layer, sensitive or not; one with smoothing, so that a graph holds that too."""
    record = calibration.record
    linears = {name: InputScaling(scale=choice["input_scale"]) for name, choice in record["linears"].items()}
    attention = {name: AttentionScales(**choice["scales"]) for name, choice in record["attention"].items()}
    linears["blocks.0.ffn.2"] = InputScaling(scale=2.0**-5, multiplier=torch.exp2(torch.arange(160.0) % 3))
    return Recipe(linears=linears, attention=attention)


def network_of(job: BuildJob, recipe: Recipe, name: str) -> Network:
    dit_only = replace(job, parts=("dit",))
    return next(network for network in cut_networks(dit_only, recipe) if network.spec.name == name)


def save(network: Network, folder: Path) -> Path:
    path = folder / f"{network.spec.name}.onnx"
    save_onnx(export_program(network), network, path, cache_writes=1)
    return path


@pytest.fixture(scope="module")
def step(tiny_fp8_job: BuildJob, tiny_calibration: Calibration) -> Network:
    return network_of(tiny_fp8_job, everything(tiny_calibration), "dit_step")


@pytest.fixture(scope="module")
def step_path(step: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(step, tmp_path_factory.mktemp("fp8"))


@pytest.fixture(scope="module")
def bf16_path(tiny_fp8_job: BuildJob, tiny_calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with bf16 as the carrier, as plans are made of."""
    config = replace(tiny_fp8_job.config, backend="tensorrt-rtx")
    source = RandomModels(model=config.variant.model, seed=0, dtype=torch.bfloat16)
    job = replace(tiny_fp8_job, config=config, source=source)
    return save(network_of(job, everything(tiny_calibration), "dit_step"), tmp_path_factory.mktemp("bf16"))


def test_graph_of_a_quantised_pass_holds_exactly_its_quantisers(step_path: Path) -> None:
    graph = onnx.load(step_path).graph
    counts = collections.Counter(node.op_type for node in graph.node)
    # An input once, whatever reads it; queries, keys and values of attention; and every weight.
    assert counts["QuantizeLinear"] == LAYERS * (GROUPS + 3)
    assert counts["DequantizeLinear"] == LAYERS * (GROUPS + 3 + LINEARS)
    assert counts[ONNX_NAME] == LAYERS
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == FP8}
    assert len(weights) == LAYERS * LINEARS
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            assert (attributes["output_dtype"], attributes["saturate"]) == (FP8, 1)
        if node.op_type == "DequantizeLinear" and node.input[0] in weights:
            assert {attribute.name: attribute.i for attribute in node.attribute}["axis"] == 1
    names = [f"blocks.{layer}.{name}" for layer in range(LAYERS) for name in ("self_attn.q", "cross_attn.o", "ffn.0")]
    assert all(f"dit.{name}.weight" in weights for name in names)


def test_graph_of_a_quantised_pass_multiplies_only_where_smoothing_was_chosen(step_path: Path) -> None:
    names = [tensor.name for tensor in onnx.load(step_path).graph.initializer]
    assert [name for name in names if name.endswith("multiplier")] == ["dit.blocks.0.ffn.2.multiplier"]


def test_onnxruntime_on_a_quantised_pass_agrees_with_the_module(
    step: Network, step_path: Path, tiny_fp8_job: BuildJob
) -> None:
    config = tiny_fp8_job.config
    inputs = make_inputs(step.spec, config.geometry, config.variant.model, seed=0)
    session = onnxruntime.InferenceSession(step_path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.inference_mode():
        wanted = step.module(*(inputs[io_tensor.name].clone() for io_tensor in step.spec.inputs))
    for got, want in zip(outputs, wanted, strict=True):
        magnitude = float(want.abs().max())
        assert np.abs(got - want.numpy()).max() <= TOLERANCES["fp8"] * magnitude
    # The first layer's keys and values have no rounding of another layer before them.
    for got, want in zip(outputs[1:3], wanted[1:3], strict=True):
        assert np.mean(np.abs(got - want.numpy()) > 1e-4) < 0.01


def test_lowered_attention_reads_the_cache_through_quantisers(bf16_path: Path) -> None:
    model = onnx.load(bf16_path)
    before = collections.Counter(node.op_type for node in model.graph.node)
    assert lower_quantised_attention(model) == LAYERS
    after = collections.Counter(node.op_type for node in model.graph.node)
    assert after[ONNX_NAME] == 0
    assert after["TRT_Attention"] == LAYERS
    for operator in ("QuantizeLinear", "DequantizeLinear"):
        assert after[operator] == before[operator] + 2 * LAYERS
    made_by = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type == "TRT_Attention":
            assert [made_by[name].op_type for name in node.input] == ["DequantizeLinear"] * 3
            read = [made_by[made_by[made_by[name].input[0]].input[0]].op_type for name in node.input[1:]]
            assert read == ["TensorScatter"] * 2
    names = [node.name for node in model.graph.node if node.name]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX")
def test_tensorrt_rtx_builds_a_quantised_pass_without_a_gpu(bf16_path: Path, tmp_path: Path) -> None:
    model = onnx.load(bf16_path)
    lower_quantised_attention(model)
    model.opset_import.append(onnx.helper.make_opsetid("trt", 1))
    lowered = tmp_path / "lowered.onnx"
    onnx.save(model, lowered)
    # In a process of its own: the library stays loaded, and an error in it ends the process.
    finished = subprocess.run(
        [sys.executable, "-c", RTX_BUILD, str(lowered)], capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    fp8_reads, plan_bytes = map(int, finished.stdout.split())
    assert fp8_reads == LAYERS
    assert plan_bytes > 10_000
