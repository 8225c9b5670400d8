"""Whole slugs compiled by TensorRT-RTX on a machine without a GPU, and what their engine directories say of it."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from causal_forcing.build_engines.inspection import inspect_engine
from causal_forcing.runtime.backends import BACKENDS
from causal_forcing.runtime.manifest import MANIFEST_NAME, check_files, read_manifest

Run = Callable[..., subprocess.CompletedProcess[str]]

SMALL = ("--pixel-height", "32", "--pixel-width", "48")


@pytest.fixture(scope="module")
def build(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, str]]:
    """Build an engine of plans in a folder of this module's; returns its folder and what was narrated."""
    root = tmp_path_factory.mktemp("engines")

    @functools.cache
    def build_plans(*arguments: str) -> tuple[Path, str]:
        finished = run("cf-build", *arguments, "--backend", "tensorrt-rtx", "--output", str(root))
        assert finished.returncode == 0, finished.stderr
        return Path(finished.stdout.strip()), finished.stderr

    return build_plans


def plans_of(folder: Path) -> dict[str, Any]:
    plans: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text())["build"]["plans"]
    return plans


@pytest.mark.parametrize(
    ("slug", "precision", "capabilities", "arguments"),
    [
        ("tiny", "bf16", [86, 89, 120], SMALL),
        ("tiny-i2v", "fp16", [89], (*SMALL, "--compute-capability", "89")),
        ("shapes", "bf16", [86, 89, 120], ()),
        ("tiny", "fp8", [89, 120], (*SMALL, "--window-frames", "6")),
    ],
)
def test_every_network_of_a_slug_compiles(
    slug: str,
    precision: str,
    capabilities: list[int],
    arguments: tuple[str, ...],
    build: Callable[..., tuple[Path, str]],
) -> None:
    folder, _ = build(slug, "--precision", precision, *arguments)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    assert not [path.name for path in folder.iterdir() if ".onnx" in path.name], "no graph is left"
    plans = plans_of(folder)
    assert list(plans) == [network.name for network in manifest.networks]
    for name, record in plans.items():
        assert manifest.artefacts[name] == f"{name}.plan"
        assert record["compute_capabilities"] == capabilities
        assert record["precision"] == precision
        assert record["builder_version"] == BACKENDS["tensorrt-rtx"].artefact_version()
        assert record["op_digest"] == manifest.config.op_digest
        assert len(record["onnx_sha256"]) == len(record["fingerprint"]) == 64
        assert manifest.files[f"{name}.plan"].bytes == record["plan_bytes"]
    quantised = sum(
        count
        for kind, count in inspect_engine(folder)["networks"][2]["plan"]["precisions"].items()
        if kind.startswith("QUANTIZE")
    )
    assert (quantised > 0) == (precision == "fp8")


def test_plan_of_the_same_graph_is_taken_from_the_engine_that_has_it(
    build: Callable[..., tuple[Path, str]],
) -> None:
    first, _ = build("tiny", *SMALL)
    second, narrated = build("tiny", *SMALL, "--window-frames", "9")
    assert first != second
    reused = {name for name, record in plans_of(second).items() if record.get("reused_from") == first.name}
    assert reused == set(plans_of(second)) - {"dit_step", "dit_context"}, "only these know the window"
    assert "vae_decoder: compiling" not in narrated
    assert "dit_step: compiling" in narrated
    check_files(second, read_manifest(second))


def test_damaged_plan_is_not_taken(build: Callable[..., tuple[Path, str]]) -> None:
    first, _ = build("tiny", *SMALL)
    damaged = [*first.parent.glob("*/prompt_kv.plan")]
    contents = [path.read_bytes() for path in damaged]
    for path, content in zip(damaged, contents, strict=True):
        path.unlink()  # it may be one file in several engines
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    second, narrated = build("tiny", *SMALL, "--window-frames", "12")
    for path, content in zip(damaged, contents, strict=True):
        path.write_bytes(content)
    assert "prompt_kv: compiling" in narrated
    assert "vae_decoder: compiling" not in narrated
    check_files(second, read_manifest(second))


def test_inspect_shows_layers_precisions_aliases_and_memory(build: Callable[..., tuple[Path, str]], run: Run) -> None:
    folder, _ = build("tiny", *SMALL)
    step = next(row for row in inspect_engine(folder)["networks"] if row["network"] == "dit_step")
    plan = step["plan"]
    assert plan["aliases"] == {
        f"{kind}_cache_0{layer}_out": f"{kind}_cache_0{layer}" for layer in "01" for kind in "kv"
    }
    assert plan["precisions"]["MATRIX_MULTIPLY BF16"] > 10
    assert {"name", "type", "dtype", "input_dtypes", "shape", "origin"} == plan["layers"][0].keys()
    assert plan["memory"]["plan_bytes"] == (folder / "dit_step.plan").stat().st_size
    shown = run("cf-build", "inspect", str(folder))
    assert shown.returncode == 0, shown.stderr
    assert "sm_86, sm_89, sm_120" in shown.stdout
    assert "ATTENTION_INPUT BF16 4" in shown.stdout


def test_verify_of_plans_without_a_gpu_compares_the_graphs_and_says_that_the_plans_did_not_run(
    build: Callable[..., tuple[Path, str]], run: Run
) -> None:
    folder, _ = build("tiny", *SMALL)
    arguments = ("tiny", *SMALL, "--backend", "tensorrt-rtx", "--output", str(folder.parent.parent))
    finished = run("cf-build", "verify", *arguments, "--json")
    assert finished.returncode == 0, finished.stderr
    compared = json.loads(finished.stdout)
    assert {(row["engine"], row["reference"]) for row in compared} == {("onnxruntime fp32", "torch fp32")}
    assert {row["network"] for row in compared} == set(plans_of(folder))
    assert "the plans were not executed" in finished.stderr


def test_ring_that_wraps_inside_a_chunk_is_refused_before_anything_is_built(run: Run, tmp_path: Path) -> None:
    refused = run(
        "cf-build", "tiny", "--backend", "tensorrt-rtx", "--window-frames", "7", "--sink-frames", "1",
        "--output", str(tmp_path),
    )  # fmt: skip
    assert refused.returncode == 2
    assert "use --window-frames 6 --sink-frames 0" in refused.stderr
    assert not os.listdir(tmp_path)


def test_ctrl_c_while_compiling_cancels_and_leaves_nothing(engine_home: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "cf-build"), "tiny", *SMALL, "--backend", "tensorrt-rtx"]
    build = subprocess.Popen(
        [*command, "--output", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert build.stderr is not None
    for line in build.stderr:
        if "compiling" in line:
            build.send_signal(signal.SIGINT)
            break
    out, err = build.communicate(timeout=60)
    assert build.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted"
    assert out == ""
    assert [path.suffix for path in (tmp_path / "tiny").iterdir()] == [".lock"], "no half-made engine"
