"""Tables of README.md and docs/performance.md are those of the kept records, and come from records alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def render(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.render_tables", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def spread(value: float) -> dict[str, float]:
    return {"min": value, "median": value, "max": value, "n": 1}


def percentiles(value: float) -> dict[str, float]:
    return {"p50": value, "p90": value, "p99": value, "n": 1}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with one record of a run against upstream, and one of stages."""
    folder = tmp_path / "results"
    folder.mkdir()
    conditions = {
        "commit": "0123456789abcdef",
        "slug": "some-slug",
        "backend": "some-backend",
        "precision": "bf16",
        "geometry": {"pixel_height": 480, "pixel_width": 832},
        "device": "Some GPU",
        "torch": "2.99",
        "warm_up_clips": 2,
        "repeats": 3,
    }
    run: dict[str, Any] = {
        "precision": "bf16",
        "fps": {"min": 30.0, "median": 31.25, "max": 32.0, "n": 3},
        "first_frames_ms": spread(123.4),
        "late_dit_step_ms": spread(55.5),
        "torch_peak_bytes": 3 * 10**9,
        "stages_ms": {"denoise": percentiles(44.4)},
    }
    latency = {
        "benchmark": "latency",
        "conditions": conditions,
        "cold_start": {"first_frames_s": spread(7.89), "runs": [{"torch_peak_bytes": 4 * 10**9}]},
        "runs": [
            {"name": "engine", **run, "step_ms": percentiles(66.6)},
            {"name": "upstream", **run},
            {"name": "compile", "precision": "bf16", "error": "RuntimeError: no"},
        ],
        "ratios": {"upstream": {"fps": {"min": 2.0, "median": 2.5, "max": 3.0, "n": 3}}},
    }
    gflop = {"linear": 11700.0, "attention": 28300.0, "convolution": 0.0}
    network = {"network": "dit_step", "ms": percentiles(80.0), "window_frames_filled": 21, "gflop": gflop}
    network |= {"tflops": 500.0, "floor_ms": 73.0, "of_floor": 0.9125}
    stages = {"benchmark": "stages", "conditions": conditions, "networks": [network]}
    for record in (latency, stages):
        (folder / f"{record['benchmark']}.json").write_text(json.dumps(record))
    return folder


def test_pages_have_the_tables_of_the_kept_records() -> None:
    finished = render("--check")
    assert finished.returncode == 0, finished.stderr


def test_every_kind_of_table_is_on_a_page() -> None:
    pages = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/performance.md"))
    source = (ROOT / "benchmarks" / "tables.py").read_text(encoding="utf-8")
    names = [line.split('"')[1] for line in source.partition("TABLES: ")[2].partition("}")[0].splitlines()[1:] if line]
    assert names
    for name in names:
        assert f"<!-- table: {name} -->\n" in pages


def test_a_page_gets_figures_from_records_with_their_units(results: Path, tmp_path: Path) -> None:
    names = ("latency", "latency-summary", "latency-stages", "stages", "conditions")
    page = tmp_path / "page.md"
    page.write_text("".join(f"# {name}\n\n<!-- table: {name} -->\n<!-- end -->\n\nafter\n\n" for name in names))
    assert render("--check", "--results", results, page).returncode == 1
    assert render("--results", results, page).returncode == 0
    assert render("--check", "--results", results, page).returncode == 0
    text = page.read_text()
    assert text.count("after\n") == len(names)
    subject = "`some-slug`, 480×832, Some GPU"
    assert (
        f"| {subject} | **some-backend** | bf16 | 31.2 (30.0–32.0) | 123 ms | 66.6 / 66.6 / 66.6 ms | 55.5 ms | – |"
        in text
    )
    assert f"| {subject} | upstream | bf16 | 31.2 (30.0–32.0) | 123 ms | – | 55.5 ms | 2.50 (2.00–3.00)× |" in text
    assert f"| {subject} | compile | bf16 | failed |" in text
    assert "| 31.2 (30.0–32.0) | 7.9 s | 123 ms | 3.0 GB, 4.0 GB | 2.50 (2.00–3.00)× |" in text
    assert "| `dit_step` | 21 latent frames | 80 ms | 40 TFLOP | 500 TFLOP/s | 73 ms | 91% |" in text
    assert "| Some GPU | torch 2.99 | 0123456789 | 2 clips to warm up, 3 counted |" in text


def test_a_tiny_decoder_is_named_beside_the_precision_but_not_upstreams(results: Path, tmp_path: Path) -> None:
    (kept,) = results.glob("latency*.json")
    record = json.loads(kept.read_text())
    record["conditions"]["decoder"] = "taehv"
    kept.write_text(json.dumps(record))
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in ("latency", "conditions")))
    assert render("--results", results, page).returncode == 0
    text = page.read_text()
    assert "| **some-backend** | bf16, taehv |" in text
    assert "| upstream | bf16 |" in text
    assert "| `latency`: some-slug, some-backend, bf16, taehv |" in text


def test_what_one_of_several_ranks_computes_stands_beside_one_that_is_alone(results: Path, tmp_path: Path) -> None:
    record = json.loads((results / "stages.json").read_text())
    slug = "causal-forcing-wan2.1-t2v-1.3b-chunkwise"  # four denoising passes, the first together with a context pass
    for backend, ranks, denoise, both, decode in (
        ("cuda", 1, 20.0, 50.0, 10.0),
        ("cuda", 12, 2.0, 5.0, 2.0),
        ("cuda", 4, 5.0, 15.0, 3.0),
        ("torch", 4, 50.0, 150.0, 30.0),
    ):
        times = {"dit_step": denoise, "dit_context_step": both, "vae_decoder": decode}
        empty = [{"network": "dit_step", "ms": percentiles(1.0), "window_frames_filled": 3}]
        conditions = record["conditions"] | {"slug": slug, "backend": backend}
        kept = {
            **record,
            "conditions": conditions | ({"ranks": ranks} if ranks > 1 else {}),
            "networks": empty + [{"network": name, "ms": percentiles(value)} for name, value in times.items()],
        }
        (results / f"stages-{backend}-{ranks}.json").write_text(json.dumps(kept))
    page = tmp_path / "page.md"
    names = ("one-of-ranks", "stages", "conditions")
    page.write_text("".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in names))
    assert render("--results", results, page).returncode == 0
    text = page.read_text()
    _, _, *rows = text.partition("\n<!-- end -->")[0].splitlines()[1:]
    subject = f"| `{slug}`, 480×832, Some GPU, "
    assert [row.removeprefix(subject) for row in rows] == [
        "cuda bf16 | 1 | 20 ms | 50 ms | 10 ms | 120 ms | – |",
        "cuda bf16 | 4 | 5 ms | 15 ms | 3 ms | 33 ms | 28% |",
        "cuda bf16 | 12 | 2 ms | 5 ms | 2 ms | 13 ms | 11% |",
        "torch bf16 | 4 | 50 ms | 150 ms | 30 ms | 330 ms | – |",
    ]
    assert text.count("| `dit_step` |") == 3, "of one rank alone, twice, and of the other record"
    assert f"| `stages`: {slug}, cuda, bf16, one of 4 ranks |" in text


def test_clips_of_several_ranks_stand_beside_those_of_one_and_by_stores_where_they_were_made(
    results: Path, tmp_path: Path
) -> None:
    conditions = json.loads((results / "latency.json").read_text())["conditions"] | {"ranks": 2}
    speeds = {"fps": spread(1.5), "last_step": spread(1.25)}
    clips = {"first_frames_ms": spread(99.9), "step_ms": percentiles(88.8), "stages_ms": {"decode": percentiles(7.0)}}
    record = {
        "benchmark": "context_parallel",
        "conditions": conditions,
        "one": {**clips, "fps": spread(20.0), "bytes_of_rank": [6 * 10**9]},
        "ranks": {**clips, "fps": spread(30.0), "bytes_of_rank": [3 * 10**9, 3 * 10**9]},
        "ratios": speeds,
        "exchange_of_a_pass_ms": spread(4.5),
        "first_latents_relative_error": 0.0066,
        "stores": {
            **clips,
            "fps": spread(40.0),
            "ratios": speeds | {"fps": spread(2.0)},
            "exchange_of_a_pass_ms": spread(1.5),
        },
    }
    (results / "context_parallel.json").write_text(json.dumps(record))
    page = tmp_path / "page.md"
    page.write_text(
        "".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in ("context-parallel", "context-parallel-ratios"))
    )
    assert render("--results", results, page).returncode == 0
    text = page.read_text()
    for who, speed, memory in (("1", "20.0", "6.0 GB"), ("2", "30.0", "3.0 GB"), ("2, by stores", "40.0", "–")):
        assert f"| bf16 | {who} | {speed} | 99.9 ms | 88.8 / 88.8 / 88.8 ms | 7 ms | {memory} |" in text
    assert "| 2 | 1.50× | 1.25× | 4.5 ms | 6.6e-03 |" in text
    assert "| 2, by stores | 2.00× | 1.25× | 1.5 ms | – |" in text


@pytest.mark.parametrize(
    ("conditions", "name"),
    [
        ({"precision": "bf16"}, "latency-some-slug-cuda-h100.json"),
        ({"precision": "bf16", "decoder": "wan"}, "latency-some-slug-cuda-h100.json"),
        ({"precision": "fp8", "decoder": "taehv"}, "latency-some-slug-cuda-fp8-taehv-h100.json"),
    ],
)
def test_a_record_is_named_for_what_is_not_usual(conditions: dict[str, str], name: str) -> None:
    record = {"benchmark": "latency", "conditions": {"slug": "some-slug", "backend": "cuda", **conditions}}
    code = (
        "import json, sys; from benchmarks.records import record_name; print(record_name(json.load(sys.stdin), 'h100'))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, input=json.dumps(record), capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == name


def test_a_page_without_records_says_that_there_are_none(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- table: latency -->\nold\n<!-- end -->\n")
    (tmp_path / "empty").mkdir()
    assert render("--results", tmp_path / "empty", page).returncode == 0
    assert page.read_text() == "<!-- table: latency -->\nNo run of this kind is kept yet.\n<!-- end -->\n"


@pytest.mark.parametrize("text", ["<!-- table: latency -->\n", "<!-- table: nothing -->\n<!-- end -->\n"])
def test_a_page_with_a_wrong_marker_is_refused(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    finished = render("--results", RESULTS, page)
    assert finished.returncode == 1
    assert "table" in finished.stderr
    assert page.read_text() == text
