"""A run's record: one JSON object, printed, and kept in a folder under a name that says what it is of."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.checkout import ROOT, head_commit
from causal_forcing.runtime.engine_options import DECODERS

RESULTS = ROOT / "benchmarks" / "results"
"""Records that the documentation quotes."""


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every program has."""
    parser.add_argument("--output", type=Path, help="folder for the JSON record; benchmarks/results is the kept one")
    parser.add_argument("--commit", default=head_commit(), help="commit to record; by default the checkout's")


def write_record(record: dict[str, Any], folder: Path | None, *, device: str) -> None:
    """Print a record, and write it as benchmark-slug-backend-device.json where a folder is given.

    Args:
        record: What was measured, with its conditions.
        folder: Where to keep it; None prints it alone.
        device: From `conditions.device_slug`.
    """
    print(json.dumps(record, indent=1))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / record_name(record, device)).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def record_name(record: dict[str, Any], device: str) -> str:
    """Return the file name of a record; a precision or a decoder other than the usual one is part of it."""
    conditions = record["conditions"]
    words = [record["benchmark"], *(conditions[key] for key in ("slug", "backend") if key in conditions)]
    usual = "fp32" if device.endswith("cpu") else "bf16"
    if conditions["precision"] != usual:
        words.append(conditions["precision"])
    words += decoder_words(conditions)
    return "-".join((*words, device)) + ".json"


def decoder_words(conditions: dict[str, Any]) -> list[str]:
    """Return the decoder's name where it is not the usual one; older records do not name theirs, which is that one."""
    decoder = conditions.get("decoder", DECODERS[0])
    return [] if decoder == DECODERS[0] else [decoder]


def read_records(benchmark: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the kept records of one benchmark, in the order of their names."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [record for record in records if record["benchmark"] == benchmark]
