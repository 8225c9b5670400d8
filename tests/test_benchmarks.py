"""The benchmarks run, on the smallest model, and their records hold together; no time is expected to be any number."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from causal_forcing.build_engines.builder import build
from causal_forcing.build_engines.planner import make_job
from causal_forcing.runtime.engine_options import EngineOptions

ROOT = Path(__file__).parents[1]
SMALL = ("--slug", "tiny", "--pixel-height", "32", "--pixel-width", "48")
CONDITIONS = {"commit", "device", "precision", "weights", "geometry", "torch"}
UPSTREAM = os.environ.get("CAUSAL_FORCING_UPSTREAM")
"""A clone of thu-ml/Causal-Forcing."""


def run_benchmark(name: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{name}", *SMALL, *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def run_to_record(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run a benchmark, and return the record that it wrote and printed."""
    printed = run_benchmark(name, *arguments, "--device", "cpu", "--output", str(folder))
    (path,) = folder.glob(f"{name}-*.json")
    record: dict[str, Any] = json.loads(path.read_text())
    assert json.loads(printed) == record
    assert set(record["conditions"]) >= CONDITIONS
    return record


def assert_is_spread(values: dict[str, float], n: int) -> None:
    assert 0 < values["min"] <= values["median"] <= values["max"]
    assert values["n"] == n


def assert_holds_together(run: dict[str, Any], *, repeats: int, staged_repeats: int) -> None:
    assert "error" not in run
    assert len(run["clip_ms"]) == repeats
    assert_is_spread(run["fps"], repeats)
    assert_is_spread(run["first_frames_ms"], repeats)
    assert all(values["p50"] <= values["p90"] <= values["p99"] for values in run["stages_ms"].values())
    assert len(run["staged_clip_ms"]) == staged_repeats
    assert run["dit_clip_ms"]["max"] < max(run["staged_clip_ms"]), "the passes are a part of their clip"
    for clip_ms, steps_ms in zip(run["clip_ms"], run.get("steps_ms", []), strict=False):
        assert sum(steps_ms) == pytest.approx(clip_ms, abs=5)
    assert run["fps"]["max"] == pytest.approx(1000 * run["frames"] / min(run["clip_ms"]), rel=1e-3)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine directory of the smallest model, with its text encoder."""
    options = EngineOptions(slug="tiny", backend="onnxruntime", pixel_height=32, pixel_width=48)
    folder = tmp_path_factory.mktemp("engines") / "tiny"
    build(make_job(options, device="cpu"), folder)
    return folder


@pytest.fixture(scope="module")
def latency(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A record of an engine, beside modules as they are and through torch.compile's front end."""
    peers = ("--peers", "eager,compile", "--compiler", "eager", "--total-blocks", "2")
    counts = ("--repeats", "2", "--staged-repeats", "1", "--warm-ups", "1", "--cold-starts", "1")
    return run_to_record("latency", tmp_path_factory.mktemp("latency"), "--engine", str(engine), *peers, *counts)


def test_latency_times_clips_steps_and_stages_of_every_peer(latency: dict[str, Any]) -> None:
    assert latency["conditions"]["decoder"] == "wan"
    assert [run["name"] for run in latency["runs"]] == ["engine", "eager", "compile"]
    for run in latency["runs"]:
        assert_holds_together(run, repeats=2, staged_repeats=1)
        assert (run["frames"], run["precision"]) == (21, "fp32")
        assert {name: values["n"] for name, values in run["stages_ms"].items()} == {
            "prompt": 1,
            "denoise": 2,
            "decode": 2,
            "context": 1,
        }
        parts_ms = sum(run["stages_ms"][name]["p50"] * run["stages_ms"][name]["n"] for name in ("denoise", "decode"))
        assert parts_ms <= run["staged_clip_ms"][0]


def test_latency_compares_with_peers_that_compute_the_same(latency: dict[str, Any]) -> None:
    assert set(latency["ratios"]) == {"eager", "compile"}
    for ratio in latency["ratios"].values():
        assert_is_spread(ratio["fps"], 2)
        assert_is_spread(ratio["dit"], 1)
        assert ratio["first_latents_relative_error"] < 1e-4


def test_latency_starts_a_process_and_shows_text_encoding_apart(latency: dict[str, Any]) -> None:
    (start,) = latency["cold_start"]["runs"]
    assert sum(start["phases_s"].values()) == pytest.approx(start["first_frames_s"], abs=0.01)
    assert list(start["phases_s"]) == ["start_python", "import", "load_engines", "bind", "first_chunk"]
    assert start["frames"] == 9
    measured = latency["runs"][0]
    assert_is_spread(measured["text_encoding_ms"], 3)
    assert "text" not in measured["stages_ms"]


def test_latency_leaves_a_peer_that_fails_out_and_says_so(engine: Path, tmp_path: Path) -> None:
    counts = ("--repeats", "1", "--staged-repeats", "1", "--warm-ups", "1", "--cold-starts", "0", "--total-blocks", "1")
    command = [sys.executable, "-m", "benchmarks.latency", "--engine", str(engine), "--device", "cpu", *counts]
    peers = ["--peers", "compile", "--compiler", "no-such-compiler", "--output", str(tmp_path)]
    finished = subprocess.run([*command, *peers], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 1
    assert "not measured: compile" in finished.stderr
    record = json.loads((tmp_path / "latency-tiny-onnxruntime-cpu.json").read_text())
    measured, peer = record["runs"]
    assert "no-such-compiler" in peer["error"]
    assert_holds_together(measured, repeats=1, staged_repeats=1)


@pytest.mark.skipif(UPSTREAM is None, reason="CAUSAL_FORCING_UPSTREAM names no clone of upstream")
@pytest.mark.parametrize("slug", ["tiny", "tiny-i2v", "shapes-framewise-2step"])
def test_latency_drives_upstream(slug: str, tmp_path: Path) -> None:
    peers = ("--peers", "upstream", "--upstream", str(UPSTREAM))
    counts = ("--repeats", "1", "--staged-repeats", "1", "--warm-ups", "1", "--cold-starts", "0", "--total-blocks", "3")
    record = run_to_record("latency", tmp_path, "--slug", slug, "--backend", "torch", *peers, *counts)
    upstream = record["runs"][1]
    assert_holds_together(upstream, repeats=1, staged_repeats=1)
    assert upstream["frames"] == record["runs"][0]["frames"]
    assert upstream["stages_ms"]["context"]["n"] == 3
    assert_is_spread(record["ratios"]["upstream"]["fps"], 1)


def test_stages_times_every_network_and_counts_its_work(engine: Path, tmp_path: Path) -> None:
    record = run_to_record("stages", tmp_path, "--engine", str(engine), "--warm-ups", "1", "--repeats", "2")
    networks = [(entry["network"], entry.get("window_frames_filled")) for entry in record["networks"]]
    passes = [(name, fill) for name in ("dit_step", "dit_context") for fill in (3, 9, 21)]
    others = [(name, None) for name in ("timestep_modulation", "prompt_kv", "vae_decoder_first", "vae_decoder")]
    others.append(("text_encoder", None))
    assert sorted(networks, key=str) == sorted((*passes, *others), key=str)
    for entry in record["networks"]:
        assert 0 < entry["ms"]["p50"] <= entry["ms"]["p99"]
        assert entry["network"] == "text_encoder" or entry["tflops"] > 0
    steps = [entry["gflop"] for entry in record["networks"] if entry["network"] == "dit_step"]
    assert steps[0]["attention"] < steps[1]["attention"] < steps[2]["attention"], "a fuller cache is more work"
    assert len({step["linear"] for step in steps}) == 1
    assert steps[0]["linear"] * 1e9 == pytest.approx(linear_work_of_a_pass(tokens=18), rel=1e-3)


def linear_work_of_a_pass(tokens: int) -> int:
    """Return the operations of `tiny`'s linear layers.

    Two layers: queries, keys, values and output; queries and output of the cross-attention; the feed-forward network.
    Then the head. The patch embedding is a convolution.
    """
    dim, ffn_dim, patch = 64, 160, 64
    return 2 * tokens * (2 * (6 * dim**2 + 2 * dim * ffn_dim) + dim * patch)


def test_attention_times_what_is_here_and_says_why_not_elsewhere(tmp_path: Path) -> None:
    cases = ("--queries-frames", "1", "3", "--keys-frames", "3", "--warm-ups", "1", "--repeats", "2")
    record = run_to_record("attention", tmp_path, *cases)
    assert [(case["queries_tokens"], case["keys_tokens"]) for case in record["cases"]] == [(6, 18), (18, 18)]
    for case in record["cases"]:
        kernels = case["kernels"]
        assert {"op", "sdpa_cudnn", "sdpa_math", "hopper", "flash_attn_cute", "cudnn_frontend_fp8"} <= set(kernels)
        assert kernels["op"]["ms"] > 0
        assert kernels["sdpa_math"]["largest_difference"] < 1e-5
        assert all(("ms" in figures) != ("unavailable" in figures) for figures in kernels.values())
        assert "unavailable" in kernels["hopper"], "no CPU has it"


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Engines of one model for one rank and for two."""
    folders = {ranks: tmp_path_factory.mktemp("engine") / str(ranks) for ranks in (1, 2)}
    for ranks, folder in folders.items():
        options = EngineOptions(
            slug="tiny", backend="torch", pixel_height=32, pixel_width=48, random_weights=0, context_parallel=ranks
        )
        build(dataclasses.replace(make_job(options, device="cpu"), parts=("dit", "vae")), folder)
    return folders


def test_stages_of_one_of_two_ranks_have_half_the_work_of_a_pass(by_ranks: dict[int, Path], tmp_path: Path) -> None:
    record = run_to_record("stages", tmp_path, "--engine", str(by_ranks[2]), "--warm-ups", "0", "--repeats", "1")
    assert record["conditions"]["ranks"] == 2
    assert (tmp_path / "stages-tiny-torch-one-of-2x-cpu.json").exists()
    steps = [entry for entry in record["networks"] if entry["network"] == "dit_step"]
    assert steps
    for step in steps:
        assert step["ms"]["p50"] > 0
        assert step["gflop"]["linear"] * 1e9 == pytest.approx(linear_work_of_a_pass(tokens=9), rel=1e-3)


def test_context_parallel_makes_the_same_clip_by_two_ranks_and_by_one(
    by_ranks: dict[int, Path], tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = ["-m", "benchmarks.context_parallel", "--engine", str(by_ranks[2]), "--single", str(by_ranks[1])]
    counts = ["--device", "cpu", "--total-blocks", "2", "--repeats", "1", "--output", str(tmp_path / "records")]
    command = [*launcher, *program, *counts]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    (path,) = (tmp_path / "records").iterdir()
    record = json.loads(path.read_text())
    assert path.name == "context_parallel-tiny-torch-2x-cpu.json"
    assert set(record["conditions"]) >= CONDITIONS
    assert record["conditions"]["ranks"] == len(record["ranks"]["bytes_of_rank"]) == 2
    for name in ("ranks", "one"):
        assert_holds_together(record[name], repeats=1, staged_repeats=1)
    assert_is_spread(record["ratios"]["fps"], 1)
    assert_is_spread(record["exchange_of_a_pass_ms"], 5)
    assert record["first_latents_relative_error"] < 1e-5


def test_full_size_export_exports_and_verifies_in_two_phases() -> None:
    export, verify = map(json.loads, run_benchmark("full_size_export", "--backend", "torch").splitlines())
    assert (export["phase"], verify["phase"]) == ("export", "verify")
    assert set(export["network_seconds"]) == set(verify["networks"])
    assert all(entry["max_error"] <= 1e-4 * entry["magnitude"] for entry in verify["networks"].values())


def test_plan_builds_compiles_a_network_that_slugs_share_once_and_proves_it_the_same(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    slugs = ("tiny", "tiny-i2v")
    parts = ("--parts", "text_encoder", "--prove", "text_encoder")
    printed = run_benchmark("plan_builds", "--slug", *slugs, *parts, "--output", str(tmp_path))
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
        assert set(json.loads(path.read_text())["conditions"]) >= CONDITIONS, path.name


def test_process_of_a_cold_start_imports_what_a_user_of_the_runtime_does() -> None:
    code = "import sys, benchmarks.clips; print([name for name in sys.modules if 'build_engines' in name])"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
