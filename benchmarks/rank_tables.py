"""Tables of several ranks: clips that they make together, and what one of them computes."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cells import GB, Record, engine_subject, ms, percentiles, spread, subject, table
from benchmarks.records import read_records
from causal_forcing.runtime.schedule import plan_variant
from causal_forcing.runtime.variant import find_variant


def context_parallel_table(folder: Path) -> str:
    """Return clips of several ranks beside those of one, taken in turn."""
    header = (
        "slug, device", "precision", "ranks", "frames a second", "first frames, warm", "AR step, p50 / p90 / p99",
        "decode of a chunk", "torch's memory, each rank",
    )  # fmt: skip
    rows = []
    for record in read_records("context_parallel", folder):
        ranks = str(record["conditions"]["ranks"])
        runs = {"1": record["one"], ranks: record["ranks"], f"{ranks}, by stores": record.get("stores")}
        for who, run in runs.items():
            if run is None:
                continue
            memory = sorted({f"{held / GB:.1f} GB" for held in run.get("bytes_of_rank", ())})
            rows.append(
                (
                    subject(record),
                    record["conditions"]["precision"],
                    who,
                    spread(run["fps"], 1),
                    ms(run["first_frames_ms"]["median"]),
                    percentiles(run["step_ms"]),
                    ms(run["stages_ms"]["decode"]["p50"]),
                    ", ".join(memory) or "–",
                )
            )
    return table(header, rows)


def context_parallel_ratios_table(folder: Path) -> str:
    """Return how many times faster several ranks are than one, and what their exchanges take."""
    header = (
        "slug, device", "ranks", "clip", "AR step before the last", "exchanges of a denoising pass, alone",
        "first latents, relative to one rank's",
    )  # fmt: skip
    rows = [
        (
            subject(record),
            str(record["conditions"]["ranks"]) + (", by stores" if run is not record else ""),
            spread(run["ratios"]["fps"], 2) + "×",
            spread(run["ratios"]["last_step"], 2) + "×",
            ms(run["exchange_of_a_pass_ms"]["median"]),
            f"{record['first_latents_relative_error']:.1e}" if run is record else "–",
        )
        for record in read_records("context_parallel", folder)
        for run in (record, record.get("stores"))
        if run is not None
    ]
    return table(header, rows)


def one_of_ranks_table(folder: Path) -> str:
    """Return the passes of one of several ranks, timed alone, beside those of one that makes clips by itself."""
    header = (
        "slug, device, engine", "ranks", "denoising pass", "context and denoising pass in one", "decoding a chunk",
        "AR step", "of one rank's",
    )  # fmt: skip
    records = read_records("stages", folder)
    divided = {engine_subject(record) for record in records if "ranks" in record["conditions"]}
    by_ranks = {
        (engine_subject(record), record["conditions"].get("ranks", 1)): _step_parts(record)
        for record in records
        if engine_subject(record) in divided
    }
    rows = []
    for (what, ranks), (*parts, step) in sorted(by_ranks.items()):
        whole = by_ranks.get((what, 1))
        share = "–" if ranks == 1 or whole is None else f"{step / whole[-1]:.0%}"
        rows.append((what, str(ranks), *map(ms, parts), ms(step), share))
    return table(header, rows)


def _step_parts(record: Record) -> tuple[float, float, float, float]:
    """Return milliseconds at a full window: a pass, a pass of two segments, decoding, and the AR step of these."""
    full = {entry["network"]: entry["ms"]["p50"] for entry in record["networks"]}  # the last entry is the fullest
    denoise, decode = full["dit_step"], full["vae_decoder"]
    both = full["dit_context_step"] if "dit_context_step" in full else denoise + full["dit_context"]
    passes = len(plan_variant(find_variant(record["conditions"]["slug"])).chunk)
    return denoise, both, decode, (passes - 1) * denoise + both + decode
