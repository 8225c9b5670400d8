"""What `cf-build inspect` knows of an engine directory."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from causal_forcing.build_engines import builder
from causal_forcing.build_engines.inspection import inspect_engine
from causal_forcing.build_engines.planner import make_job
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.errors import EngineDamagedError, EngineNotFoundError
from causal_forcing.runtime.manifest import read_manifest


def test_inspect_of_an_engine_tells_its_configuration(tiny_engine: Path) -> None:
    summary = inspect_engine(tiny_engine)
    manifest = read_manifest(tiny_engine)
    assert summary["folder"] == str(tiny_engine)
    assert summary["fingerprint"] == manifest.config.fingerprint()
    assert summary["fingerprint"].startswith(tiny_engine.name)
    config = summary["config"]
    assert (config["slug"], config["model"], config["weights"]) == ("tiny", "tiny", "random:0")
    assert (config["backend"], config["precision"], config["pixels"]) == ("onnxruntime (opset24)", "fp32", "32×48")
    assert (config["chunk_frames"], config["window_frames"], config["sink_frames"]) == (3, 21, 0)
    assert config["built"] == manifest.build["created"]
    json.dumps(summary)


def test_inspect_of_an_engine_tells_each_network_with_its_size_and_operators(tiny_engine: Path) -> None:
    manifest = read_manifest(tiny_engine)
    rows = {row["network"]: row for row in inspect_engine(tiny_engine)["networks"]}
    assert list(rows) == [network.name for network in manifest.networks]
    for network in manifest.networks:
        row = rows[network.name]
        assert row["bytes"] == (tiny_engine / row["file"]).stat().st_size
        counts = (len(network.inputs), len(network.outputs), len(network.states), network.in_place)
        assert (row["inputs"], row["outputs"], row["states"], row["in_place"]) == counts
        assert row["io_tensors"] == {io.name: [io.dtype, *io.shape] for io in network.io_tensors()}
        assert row["operators"], network.name
    assert "MatMul" in rows["prompt_kv"]["operators"] or "Gemm" in rows["prompt_kv"]["operators"]


def test_inspect_of_a_torch_engine_works_without_onnx_graphs(tiny_torch_engine: Path) -> None:
    summary = inspect_engine(tiny_torch_engine)
    assert summary["config"]["backend"].startswith("torch (")
    assert all(row["operators"] == "" and row["bytes"] > 0 for row in summary["networks"])


def test_inspect_of_no_engine_says_how_to_build(tmp_path: Path) -> None:
    with pytest.raises(EngineNotFoundError, match="cf-build SLUG"):
        inspect_engine(tmp_path)


def test_inspect_of_a_damaged_engine_names_the_file(tiny_engine: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(tiny_engine, tmp_path / "engine")
    (copied / "prompt_kv.onnx").write_bytes(b"")
    with pytest.raises(EngineDamagedError, match=r"prompt_kv\.onnx"):
        inspect_engine(copied)


def test_inspect_of_tapes_tells_their_operators_and_the_weights_that_they_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EngineOptions(slug="tiny", backend="torch", precision="bf16", pixel_height=32, pixel_width=48)
    job = make_job(options, device="cpu")
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, backend="cuda"), parts=("dit",))
    monkeypatch.setattr(builder, "compile_kernels", lambda *arguments: None)  # needs a GPU
    builder.build(job, tmp_path / "engine")
    summary = inspect_engine(tmp_path / "engine")
    rows = {row["network"]: row for row in summary["networks"]}
    weights = (tmp_path / "engine" / "dit.safetensors").stat().st_size
    assert {row["bytes"] - (tmp_path / "engine" / row["file"]).stat().st_size for row in rows.values()} == {weights}
    assert "add_norm" in rows["dit_context_step"]["operators"]
    assert list(rows) == ["timestep_modulation", "prompt_kv", "dit_step", "dit_context", "dit_context_step"]
