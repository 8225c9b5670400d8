"""The benchmark scripts run, on the smallest model, and say what their figures were taken with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ("--slug", "tiny", "--pixel-height", "32", "--pixel-width", "48")


def run_benchmark(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *SMALL, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_session_clip_reports_every_step_and_its_conditions(tmp_path: Path) -> None:
    arguments = ("--backend", "torch", "--total-blocks", "2", "--repeats", "1", "--output", str(tmp_path))
    printed = run_benchmark("session_clip.py", *arguments)
    (path,) = tmp_path.iterdir()
    record: dict[str, Any] = json.loads(path.read_text())
    assert json.loads(printed) == record
    assert [len(clip["step_s"]) for clip in (record["warm_up"], *record["clips"])] == [2, 2]
    assert record["clips"][0]["frames"] == 21
    assert record["conditions"]["weights"] == "random:0"
    assert record["conditions"]["precision"] == "fp32"


def test_full_size_export_exports_and_verifies_in_two_phases() -> None:
    export, verify = map(json.loads, run_benchmark("full_size_export.py", "--backend", "torch").splitlines())
    assert (export["phase"], verify["phase"]) == ("export", "verify")
    assert set(export["network_seconds"]) == set(verify["networks"])
    assert all(entry["max_error"] <= 1e-4 * entry["magnitude"] for entry in verify["networks"].values())


def test_plan_builds_compiles_a_network_that_slugs_share_once_and_proves_it_the_same(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    slugs = ("tiny", "tiny-i2v")
    parts = ("--parts", "text_encoder", "--prove", "text_encoder")
    printed = run_benchmark("plan_builds.py", "--slug", *slugs, *parts, "--output", str(tmp_path))
    record: dict[str, Any] = json.loads((tmp_path / "plan_builds-tiny-tensorrt-rtx-bf16.json").read_text())
    assert json.loads(printed) == record
    assert record["conditions"]["compute_capabilities"] == [86, 89, 120]
    (network,) = record["networks"]
    assert (network["name"], network["slugs"], network["same_onnx_sha256"]) == ("text_encoder", [*slugs], ["tiny-i2v"])
    assert network["plan_bytes"] > 2 * network["parameters"]
    assert 0 < network["compile_peak_gib"] < 4


def test_committed_results_say_what_they_were_taken_with() -> None:
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert results
    for path in results:
        conditions = json.loads(path.read_text())["conditions"]
        assert {"commit", "device", "precision", "weights", "geometry", "torch"} <= set(conditions), path.name
