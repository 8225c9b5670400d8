"""Records to tables of the documentation, in Markdown: every figure between two markers comes from here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.cells import GB, MIB, Record, engine_subject, ms, percentiles, spread, subject, table
from benchmarks.rank_tables import context_parallel_ratios_table, context_parallel_table, one_of_ranks_table
from benchmarks.records import RESULTS, decoder_words, read_records


def latency_table(folder: Path) -> str:
    """Return whole clips, first frames, AR steps and memory of every engine and its peers."""
    header = (
        "slug, device", "what", "precision", "frames a second", "first frames, warm", "AR step, p50 / p90 / p99",
        "DiT of the step before the last", "engine is faster by",
    )  # fmt: skip
    rows = []
    for record in read_records("latency", folder):
        for run in record["runs"]:
            if "error" in run:
                rows.append((subject(record), run["name"], _precision(record, run), "failed", "–", "–", "–", "–"))
                continue
            ratio = record["ratios"].get(run["name"])
            rows.append(
                (
                    subject(record),
                    _what(record, run),
                    _precision(record, run),
                    spread(run["fps"], 1),
                    ms(run["first_frames_ms"]["median"]),
                    percentiles(run["step_ms"]) if "step_ms" in run else "–",
                    ms(run["late_dit_step_ms"]["median"]) if "late_dit_step_ms" in run else "–",
                    "–" if ratio is None else spread(ratio["fps"], 2) + "×",
                )
            )
    return table(header, rows)


def latency_summary_table(folder: Path) -> str:
    """Return the figures that a reader asks for first."""
    header = (
        "slug, device", "backend, precision", "frames a second", "process start to first frames", "first frames, warm",
        "torch's peak of GPU memory: clips, start", "faster than upstream, same run",
    )  # fmt: skip
    rows = []
    for record in read_records("latency", folder):
        run, cold = record["runs"][0], record["cold_start"]
        upstream = record["ratios"].get("upstream")
        if "error" not in run:
            starts = [start.get("torch_peak_bytes", 0) for start in cold["runs"]] if cold else []
            peaks = (run.get("torch_peak_bytes", 0), max(starts, default=0))
            rows.append(
                (
                    subject(record),
                    f"{record['conditions']['backend']}, {_precision(record, run)}",
                    spread(run["fps"], 1),
                    "–" if cold is None else f"{cold['first_frames_s']['median']:.1f} s",
                    ms(run["first_frames_ms"]["median"]),
                    ", ".join(f"{peak / GB:.1f} GB" if peak else "–" for peak in peaks),
                    "–" if upstream is None else spread(upstream["fps"], 2) + "×",
                )
            )
    return table(header, rows)


def latency_stages_table(folder: Path) -> str:
    """Return the stages of an AR step of every engine and its peers."""
    header = ("slug, device", "what", "precision", "stage", "p50 / p90 / p99", "calls counted")
    rows = [
        (
            subject(record),
            _what(record, run),
            _precision(record, run),
            stage.replace("_", " "),
            percentiles(values),
            str(values["n"]),
        )
        for record in read_records("latency", folder)
        for run in record["runs"]
        for stage, values in run.get("stages_ms", {}).items()
    ]
    return table(header, rows)


def stages_table(folder: Path) -> str:
    """Return every network by itself, beside its counted work and its floor; not those of one of several ranks."""
    header = ("slug, device", "engine's network", "cache filled to", "median", "work", "rate", "floor", "of the floor")
    rows = []
    for record in read_records("stages", folder):
        if "ranks" in record["conditions"]:
            continue
        for entry in record["networks"]:
            work = sum(entry.get("gflop", {}).values()) / 1000
            filled = entry.get("window_frames_filled")
            rows.append(
                (
                    engine_subject(record),
                    f"`{entry['network']}`",
                    "–" if filled is None else f"{filled} latent frames",
                    ms(entry["ms"]["p50"]),
                    f"{work:.3g} TFLOP" if work else "–",
                    f"{entry['tflops']:.3g} TFLOP/s" if work else "–",
                    ms(entry["floor_ms"]) if "floor_ms" in entry else "–",
                    f"{entry['of_floor']:.0%}" if "of_floor" in entry else "–",
                )
            )
    return table(header, rows)


def attention_table(folder: Path) -> str:
    """Return the attention of one chunk, kernel by kernel; kernels that no record has are left out."""
    records = read_records("attention", folder) or [
        _as_attention(record) for record in read_records("attention_kernel", folder)
    ]
    names = list(
        dict.fromkeys(
            name
            for record in records
            for case in record["cases"]
            for name, figures in case["kernels"].items()
            if "ms" in figures
        )
    )
    rows = [
        (
            f"{record['conditions']['device']}, {record['conditions']['precision']}",
            f"{case['queries_tokens']:,}",
            f"{case['keys_tokens']:,}",
            *(_kernel(case["kernels"].get(name, {})) for name in names),
        )
        for record in records
        for case in record["cases"]
    ]
    return table(("device", "queries", "keys", *(f"`{name}`" for name in names)), rows)


def plan_builds_table(folder: Path) -> str:
    """Return what exporting and compiling each network of the full-size model took."""
    header = (
        "network", "slugs", "million weights", "export", "parse, check, compile", "its peak memory",
        "plan", "layers",
    )  # fmt: skip
    rows = []
    for record in read_records("plan_builds", folder):
        slugs = list(record["conditions"]["slugs"])
        if record["conditions"]["precision"] != "bf16":
            continue
        for entry in record["networks"]:
            rows.append(
                (
                    f"`{entry['name']}`",
                    _slugs([*entry["slugs"]], slugs),
                    f"{entry['parameters'] / 1e6:,.0f}",
                    f"{entry['export_s']:.0f} s, {entry['export_peak_gib']:.1f} GiB",
                    f"{entry['parse_s'] + entry['compile_s']:.1f} s",
                    f"{entry['compile_peak_gib']:.1f} GiB",
                    f"{entry['plan_bytes'] / MIB:,.0f} MiB",
                    f"{entry['layers']:,}",
                )
            )
    return table(header, rows)


def conditions_table(folder: Path) -> str:
    """Return what the kept runs of clips, stages and attention were taken with."""
    header = ("run", "device", "versions", "commit", "clips or calls")
    rows = []
    for benchmark in ("latency", "stages", "context_parallel", "attention", "attention_kernel", "session_clip"):
        for record in read_records(benchmark, folder):
            conditions = record["conditions"]
            words = [conditions[key] for key in ("slug", "backend", "precision") if key in conditions]
            subject = ", ".join((*words, *decoder_words(conditions), *_ranks(benchmark, conditions)))
            versions = [
                f"{name.replace('_', '-')} {conditions[name]}"
                for name in ("driver", "torch", "cudnn", "nccl", "triton", "onnxruntime", "tensorrt", "tensorrt_rtx")
                if name in conditions
            ]
            counts = [
                f"{conditions[key]} {words}"
                for key, words in (
                    ("warm_up_clips", "clips to warm up"),
                    ("warm_ups", "to warm up"),
                    ("repeats", "counted"),
                    ("staged_repeats", "for stages"),
                )
                if key in conditions
            ]
            commit = (conditions["commit"] or "–").partition("+")
            rows.append(
                (
                    f"`{benchmark}`: {subject}",
                    conditions["device"],
                    ", ".join(versions),
                    commit[0][:10] + (" with changes" if commit[2] else ""),
                    ", ".join(counts) or "–",
                )
            )
    return table(header, rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "latency": latency_table,
    "latency-summary": latency_summary_table,
    "latency-stages": latency_stages_table,
    "stages": stages_table,
    "attention": attention_table,
    "plan-builds": plan_builds_table,
    "context-parallel": context_parallel_table,
    "context-parallel-ratios": context_parallel_ratios_table,
    "one-of-ranks": one_of_ranks_table,
    "conditions": conditions_table,
}
"""By the name in their markers."""


def make_table(name: str, folder: Path = RESULTS) -> str:
    """Return a table by its name."""
    return TABLES[name](folder)


def _what(record: Record, run: Record) -> str:
    return f"**{record['conditions']['backend']}**" if run["name"] == "engine" else run["name"]


def _precision(record: Record, run: Record) -> str:
    """Return a run's precision, and its decoder where that is not the usual one; upstream knows no other."""
    decoder = [] if run["name"] == "upstream" else decoder_words(record["conditions"])
    return ", ".join((run["precision"], *decoder))


def _ranks(benchmark: str, conditions: Record) -> list[str]:
    of = "one of " if benchmark == "stages" else ""
    return [f"{of}{conditions['ranks']} ranks"] if "ranks" in conditions else []


def _kernel(figures: Record) -> str:
    return f"{figures['ms']:.3f} ms, {figures['tflops']:.0f} TFLOP/s" if "ms" in figures else "–"


def _as_attention(record: Record) -> Record:
    """Return a record of the program that `attention` replaced in its form."""
    names = {"kernel": "op", "cudnn": "sdpa_cudnn"}
    cases = [
        {
            "queries_tokens": case["queries_tokens"],
            "keys_tokens": case["keys_tokens"],
            "kernels": {new: {"ms": case[f"{old}_ms"], "tflops": case[f"{old}_tflops"]} for old, new in names.items()},
        }
        for case in record["cases"]
    ]
    return {**record, "cases": cases}


def _slugs(slugs: list[str], of: list[str]) -> str:
    if slugs == of:
        return f"all {len(of)}"
    framewise = [slug for slug in of if "framewise" in slug]
    if slugs == framewise and len(slugs) > 1:
        return f"the {len(slugs)} framewise ones"
    return ", ".join(slug.removeprefix("causal-forcing-wan2.1-").replace("-1.3b", "") for slug in slugs)
