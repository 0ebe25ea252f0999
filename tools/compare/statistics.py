"""The arithmetic of the table: flips, paired intervals, medians over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Two-sided 95 % of the normal distribution.
_Z = 1.959963984540054


def flips(chosen: Sequence[int], reference: Sequence[int]) -> float:
    """Share of items whose answer differs from the reference's."""
    pairs = list(zip(chosen, reference, strict=True))
    return sum(a != b for a, b in pairs) / len(pairs)


def accuracy(chosen: Sequence[int], gold: Sequence[int]) -> float:
    """Share of items answered rightly."""
    return sum(a == b for a, b in zip(chosen, gold, strict=True)) / len(gold)


def paired_interval(
    chosen: Sequence[int], reference: Sequence[int], gold: Sequence[int]
) -> tuple[float, float, float]:
    """Accuracy difference to the reference on the same items, with its 95 % interval.

    Normal approximation over the items' differences (-1, 0 or 1) with their sample standard
    deviation: `(difference, low, high)` as fractions.
    """
    differences = [(a == g) - (b == g) for a, b, g in zip(chosen, reference, gold, strict=True)]
    mean = statistics.fmean(differences)
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    half = _Z * spread / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def over_seeds(values: Sequence[float | None]) -> dict[str, float] | None:
    """`median`, `low` and `high` of the values that are there; None if none is."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    return {"median": statistics.median(found), "low": min(found), "high": max(found)}
