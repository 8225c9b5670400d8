"""The benchmark scripts run, on the smallest model, and say what their figures were taken with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SMALL = ("--slug", "tiny", "--pixel-height", "32", "--pixel-width", "48", "--backend", "torch")


def run_benchmark(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *SMALL, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_session_clip_reports_every_step_and_its_conditions(tmp_path: Path) -> None:
    printed = run_benchmark("session_clip.py", "--total-blocks", "2", "--repeats", "1", "--output", str(tmp_path))
    (path,) = tmp_path.iterdir()
    record: dict[str, Any] = json.loads(path.read_text())
    assert json.loads(printed) == record
    assert [len(clip["step_s"]) for clip in (record["warm_up"], *record["clips"])] == [2, 2]
    assert record["clips"][0]["frames"] == 21
    assert record["conditions"]["weights"] == "random:0"
    assert record["conditions"]["precision"] == "fp32"


def test_full_size_export_exports_and_verifies_in_two_phases() -> None:
    export, verify = map(json.loads, run_benchmark("full_size_export.py").splitlines())
    assert (export["phase"], verify["phase"]) == ("export", "verify")
    assert set(export["network_seconds"]) == set(verify["networks"])
    assert all(entry["max_error"] <= 1e-4 * entry["magnitude"] for entry in verify["networks"].values())


def test_committed_results_say_what_they_were_taken_with() -> None:
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert results
    for path in results:
        conditions = json.loads(path.read_text())["conditions"]
        assert {"commit", "device", "precision", "weights", "geometry", "torch"} <= set(conditions), path.name
