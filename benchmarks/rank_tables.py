"""Tables of clips that several ranks make together."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cells import GB, ms, percentiles, spread, subject, table
from benchmarks.records import read_records


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
