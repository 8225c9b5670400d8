"""Many measurements to the few numbers that are reported of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

DIGITS = 3


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p90 and p99, each a value that was measured or the mean of two, and how many there were."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered), max(1, math.ceil(share * len(ordered)))) - 1]

    return {
        "p50": round(statistics.median(ordered), DIGITS),
        "p90": round(at(0.9), DIGITS),
        "p99": round(at(0.99), DIGITS),
        "n": len(ordered),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the least, the median, the greatest, and how many there were."""
    return {
        "min": round(min(values), DIGITS),
        "median": round(statistics.median(values), DIGITS),
        "max": round(max(values), DIGITS),
        "n": len(values),
    }


def ratios(values: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Return the spread of value / reference, pair by pair: what ran one after the other is compared."""
    return spread([value / reference for value, reference in zip(values, references, strict=True)])


def significant(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")
