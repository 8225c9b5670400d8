"""Whole slugs compiled by TensorRT-RTX on a machine without a GPU, and what their engine directories say of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from causal_forcing.build_engines.inspection import inspect_engine
from causal_forcing.runtime.manifest import MANIFEST_NAME, check_files, read_manifest

Run = Callable[..., subprocess.CompletedProcess[str]]

SMALL = ("--pixel-height", "32", "--pixel-width", "48")


def plans_of(folder: Path) -> dict[str, Any]:
    plans: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text())["build"]["plans"]
    return plans


def test_plan_of_the_same_graph_is_taken_from_the_engine_that_has_it_unless_damaged(
    build: Callable[..., tuple[Path, str]],
) -> None:
    first, _ = build("tiny", *SMALL)
    damaged = [*first.parent.glob("*/prompt_kv.plan")]
    contents = [path.read_bytes() for path in damaged]
    for path, content in zip(damaged, contents, strict=True):
        path.unlink()  # it may be one file in several engines
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    second, narrated = build("tiny", *SMALL, "--window-frames", "9")
    for path, content in zip(damaged, contents, strict=True):
        path.write_bytes(content)
    assert first != second
    reused = {name for name, record in plans_of(second).items() if record.get("reused_from") == first.name}
    compiled = {name for name in plans_of(second) if f"{name}: compiling" in narrated}
    assert compiled == {"dit_step", "dit_context", "prompt_kv"}, "the first two know the window, the third was damaged"
    assert reused == set(plans_of(second)) - compiled
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
