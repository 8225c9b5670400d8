"""Cells of the tables in the documentation, and the tables of them, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.records import decoder_words

Record = dict[str, Any]
NONE_YET = "No run of this kind is kept yet."
GB, MIB = 10**9, 2**20


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, or the sentence that says there is none."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join((f"| {' | '.join(header)} |", "|" + "---|" * len(header), *lines)) if lines else NONE_YET


def subject(record: Record) -> str:
    """Name what a record is of."""
    conditions = record["conditions"]
    geometry = conditions["geometry"]
    size = f"{geometry['pixel_height']}×{geometry['pixel_width']}"
    return f"`{conditions['slug']}`, {size}, {conditions['device']}"


def engine_subject(record: Record) -> str:
    """Name what a record is of, and the engine: its backend, its precision, a decoder that is not the usual one."""
    conditions = record["conditions"]
    return ", ".join(
        (subject(record), f"{conditions['backend']} {conditions['precision']}", *decoder_words(conditions))
    )


def ms(milliseconds: float) -> str:
    """Return milliseconds with three digits."""
    return f"{milliseconds:.3g} ms" if milliseconds < 100 else f"{milliseconds:,.0f} ms"


def percentiles(values: dict[str, float]) -> str:
    """Return the half, nine tenths and 99 hundredths of milliseconds."""
    p50, p90, p99 = (ms(values[name]).removesuffix(" ms") for name in ("p50", "p90", "p99"))
    return f"{p50} / {p90} / {p99} ms"


def spread(values: dict[str, float], digits: int) -> str:
    """Return a median, and the least and the most where they differ."""
    least, median, most = (f"{values[name]:.{digits}f}" for name in ("min", "median", "max"))
    return median if least == most else f"{median} ({least}–{most})"
