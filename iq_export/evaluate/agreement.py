"""How far the outputs of an encoder are from those of its reference: classes, features, maps.

Arrays of both models go in, row i of both made of the same input; numbers come out. A row that is
not finite is an error, and not a low number: no later average shall hide it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iq_export.errors import DataError, GraphError

Array = NDArray[np.floating]

# Similarities at a time: 1024 x rows x 8 bytes.
_CHUNK = 1024


@dataclass(frozen=True)
class Classes:
    """rows: inputs that were compared; top1: the share of them with the same likeliest class."""

    rows: int
    top1: float


@dataclass(frozen=True)
class Features:
    """cosine_mean, cosine_min: of each row with the reference's.

    neighbours: the share of rows whose nearest other row (by cosine) is the same one among the
    rows of each model: what a search finds where both the index and the question are made by one
    model. retrieved: the share of rows that are nearest to the reference's row of the same input
    among all of its rows: a question to an index that the reference has made. None with fewer than
    three rows, and two.
    """

    rows: int
    cosine_mean: float
    cosine_min: float
    neighbours: float | None
    retrieved: float | None


@dataclass(frozen=True)
class Maps:
    """correlation_mean, correlation_min: Pearson's, over the values of each row's map."""

    rows: int
    correlation_mean: float
    correlation_min: float


def compare_classes(reference: Array, other: Array) -> Classes:
    """Of logits `[rows, classes]`. Raises DataError for unequal or empty arrays, GraphError for
    values that are not finite, as all comparisons here do."""
    reference, other = _rows(reference, other)
    return Classes(len(reference), float(np.mean(reference.argmax(axis=1) == other.argmax(axis=1))))


def compare_features(reference: Array, other: Array) -> Features:
    """Of vectors `[rows, ...]`, each row flattened: pooled features, or those of all its tokens."""
    first, second = (_unit(rows) for rows in _rows(reference, other))
    cosines = _dots(first, second)
    neighbours = retrieved = None
    if len(first) > 2:
        neighbours = float(np.mean(nearest(first) == nearest(second)))
    if len(first) > 1:
        found = np.concatenate([s.argmax(axis=1) for s in _similarities(second, first)])
        retrieved = float(np.mean(found == np.arange(len(first))))
    return Features(len(first), float(cosines.mean()), float(cosines.min()), neighbours, retrieved)


def compare_maps(reference: Array, other: Array) -> Maps:
    """Of one map per row, `[rows, ...]`, each row flattened."""
    first, second = (_unit(_centred(rows)) for rows in _rows(reference, other))
    correlations = _dots(first, second)
    return Maps(len(first), float(correlations.mean()), float(correlations.min()))


def nearest(rows: Array) -> NDArray[np.intp]:
    """For each of `rows` `[rows, features]` the index of the other row with the largest cosine."""
    unit = _unit(np.asarray(rows, np.float64))
    found, start = [], 0
    for similar in _similarities(unit, unit):
        here = np.arange(len(similar))
        similar[here, start + here] = -np.inf
        found.append(similar.argmax(axis=1))
        start += len(similar)
    return np.concatenate(found)


def _rows(reference: Array, other: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both as float64 `[rows, values]`."""
    if reference.shape != other.shape or reference.ndim < 2 or not reference.size:
        raise DataError(
            f"outputs of the shapes {list(reference.shape)} and {list(other.shape)} cannot be "
            "compared: one row per input is needed, of both models"
        )
    for name, values in (("the reference", reference), ("the graph", other)):
        if not np.isfinite(values).all():
            broken = int(np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))[0])
            raise GraphError(f"the output of {name} for input {broken} is not finite")
    first, second = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (reference, other))
    return first, second


def _centred(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Less each row's mean; a row that is equal to its mean but for rounding is one of zeros."""
    spread = np.ptp(rows, axis=1, keepdims=True)
    flat = spread <= np.finfo(np.float32).eps * np.abs(rows).max(axis=1, keepdims=True)
    return np.where(flat, 0.0, rows - rows.mean(axis=1, keepdims=True))


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of length 1, or 0 where there is nothing but zeros."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    scaled = rows / np.where(largest > 0, largest, 1.0)  # squares neither overflow nor vanish
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    return np.asarray(scaled / np.where(length > 0, length, 1.0))


def _dots(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines `[rows]`; 1 where both rows are zeros, 0 where one is."""
    both = ~first.any(axis=1) & ~second.any(axis=1)
    return np.where(both, 1.0, np.clip((first * second).sum(axis=1), -1.0, 1.0))


def _similarities(
    rows: NDArray[np.float64], others: NDArray[np.float64]
) -> Iterator[NDArray[np.float64]]:
    """`rows @ others.T`, in pieces `[up to 1024, len(others)]`."""
    return (rows[a : a + _CHUNK] @ others.T for a in range(0, len(rows), _CHUNK))
