"""Exported graphs: their version, their names, what they carry, and where large weights go."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxscript import rewriter
from torch import nn

from causal_forcing.build_engines import export
from causal_forcing.build_engines.export import IR_VERSION, export_program, save_onnx, save_program
from causal_forcing.build_engines.networks import Network
from causal_forcing.plugins.contract import DOMAIN, ONNX_NAME
from causal_forcing.plugins.torch_op import kv_cache_attention
from causal_forcing.runtime.manifest import read_manifest
from causal_forcing.runtime.network_spec import IOTensor, NetworkSpec

DTYPES = {"float32": onnx.TensorProto.FLOAT, "int32": onnx.TensorProto.INT32, "int64": onnx.TensorProto.INT64}


def io(name: str, *shape: int, dtype: str = "float32") -> IOTensor:
    return IOTensor(name=name, shape=shape, dtype=dtype)


class Attend(nn.Module):
    """The smallest network with a cache: a projection and the op."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 8)

    def forward(
        self, x: torch.Tensor, slots: torch.Tensor, valid_slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        projected = self.projection(x)
        return kv_cache_attention(projected, x, x, k, v, slots, valid_slots, 0.5)


@pytest.fixture(scope="module")
def attend() -> Network:
    torch.manual_seed(0)
    caches = [io(f"{kind}_cache", 1, 2, 10, 8) for kind in "kv"]
    written = [io(f"{kind}_cache_out", 1, 2, 10, 8) for kind in "kv"]
    spec = NetworkSpec(
        name="attend",
        inputs=(io("x", 1, 2, 6, 8), io("slots", 3, dtype="int32"), io("valid_slots", 1, dtype="int32"), *caches),
        outputs=(io("out", 1, 2, 6, 8), *written),
        states=(("k_cache_out", "k_cache"), ("v_cache_out", "v_cache")),
        in_place=True,
    )
    return Network(spec=spec, module=Attend())


@pytest.fixture(scope="module")
def linear() -> Network:
    torch.manual_seed(0)
    spec = NetworkSpec(name="linear", inputs=(io("x", 2, 8),), outputs=(io("y", 2, 8),))
    return Network(spec=spec, module=nn.Linear(8, 8))


def signature(values: object) -> list[tuple[str, tuple[int, ...], int]]:
    return [
        (value.name, tuple(d.dim_value for d in value.type.tensor_type.shape.dim), value.type.tensor_type.elem_type)
        for value in values  # type: ignore[attr-defined]
    ]


def test_every_exported_graph_of_an_engine_is_valid_and_named_as_its_specification(tiny_engine: Path) -> None:
    manifest = read_manifest(tiny_engine)
    for network in manifest.networks:
        path = tiny_engine / manifest.artefacts[network.name]
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path)
        assert model.ir_version == IR_VERSION == 11
        assert {opset.domain: opset.version for opset in model.opset_import}[""] == 24
        for values, tensors in ((model.graph.input, network.inputs), (model.graph.output, network.outputs)):
            assert signature(values) == [(t.name, t.shape, DTYPES[t.dtype]) for t in tensors], network.name


def test_exported_graphs_take_no_operator_of_another_domain_but_ours(tiny_engine: Path) -> None:
    """Any runtime of opset 24 must be able to run the files without us."""
    for path in tiny_engine.glob("*.onnx"):
        model = onnx.load(path)
        functions = {(function.domain, function.name) for function in model.functions}
        for nodes in (model.graph.node, *(function.node for function in model.functions)):
            for node in nodes:
                assert node.domain == "" or (node.domain, node.op_type) in functions, node.op_type


def test_exported_program_mutates_nothing_and_holds_no_caches(attend: Network) -> None:
    program = export_program(attend)
    signature = program.graph_signature
    assert not signature.user_inputs_to_mutate
    assert not signature.buffers_to_mutate
    assert program.example_inputs is None


@pytest.mark.parametrize("writes", [1, 3])
def test_saved_graph_carries_the_function_with_the_writes_that_were_asked_for(
    writes: int, attend: Network, tmp_path: Path
) -> None:
    path = tmp_path / "attend.onnx"
    save_onnx(export_program(attend), attend, path, cache_writes=writes)
    model = onnx.load(path)
    (function,) = [f for f in model.functions if (f.domain, f.name) == (DOMAIN, ONNX_NAME)]
    assert [node.op_type for node in function.node].count("TensorScatter") == 2 * writes
    slots = {1: [2, 4, 6], 3: [8, 0, 4]}[writes]
    generator = torch.Generator().manual_seed(1)
    x, k, v = (torch.randn(io.shape, generator=generator) for io in attend.spec.inputs if io.dtype == "float32")
    inputs = {"x": x, "slots": torch.tensor(slots, dtype=torch.int32), "valid_slots": torch.tensor([9]).int()}
    inputs |= {"k_cache": k, "v_cache": v}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    got = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        want = attend.module(*(tensor.clone() for tensor in inputs.values()))
    for output, tensor in zip(got, want, strict=True):
        np.testing.assert_allclose(output, tensor.numpy(), atol=2e-6)


def test_saved_graph_with_weights_above_the_threshold_keeps_them_beside_it(
    linear: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = export_program(linear)
    save_onnx(program, linear, tmp_path / "inside.onnx", cache_writes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["inside.onnx"]
    monkeypatch.setattr(export, "EXTERNAL_DATA_BYTES", 100)
    folder = tmp_path / "apart"
    folder.mkdir()
    save_onnx(program, linear, folder / "apart.onnx", cache_writes=1)
    assert sorted(path.name for path in folder.iterdir()) == ["apart.onnx", "apart.onnx.data"]
    moved = folder.rename(tmp_path / "moved")
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).numpy()
    outputs = [
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for path in (tmp_path / "inside.onnx", moved / "apart.onnx")
    ]
    np.testing.assert_array_equal(*outputs)


def test_saved_program_gives_what_the_module_gives(linear: Network, tmp_path: Path) -> None:
    save_program(export_program(linear), tmp_path / "linear.pt2")
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.export.load(tmp_path / "linear.pt2").module()(x), linear.module(x))


def test_graph_does_not_say_where_its_sources_lie(attend: Network, tmp_path: Path) -> None:
    path = tmp_path / "attend.onnx"
    save_onnx(export_program(attend), attend, path, cache_writes=1)
    for folder in {Path(__file__).parent, Path(export.__file__).parents[1], Path(torch.__file__).parent}:
        assert str(folder).encode() not in path.read_bytes()


def test_export_leaves_the_optimisers_rules_as_they_were_and_still_needs_to_leave_one_out(
    attend: Network, tmp_path: Path
) -> None:
    rules = rewriter._DEFAULT_REWRITE_RULES
    assert [rule.name for rule in rules].count(export.SLOW_RULE) == 1
    save_onnx(export_program(attend), attend, tmp_path / "attend.onnx", cache_writes=1)
    assert rewriter._DEFAULT_REWRITE_RULES is rules


def test_export_says_nothing_and_leaves_logging_as_it_was(
    linear: Network, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    program = export_program(linear)
    save_onnx(program, linear, tmp_path / "linear.onnx", cache_writes=1)
    save_program(program, tmp_path / "linear.pt2")
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert [logger.level for logger in loggers] == levels
