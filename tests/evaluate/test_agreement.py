"""Outputs against a reference: numbers that are known by construction."""

from __future__ import annotations

import numpy as np
import pytest

from iq_export.errors import DataError, GraphError
from iq_export.evaluate import agreement
from iq_export.evaluate.agreement import (
    compare_classes,
    compare_features,
    compare_maps,
    nearest,
)

RNG = np.random.default_rng(0)


def test_top1_counts_equal_classes() -> None:
    reference = np.eye(4, 10, dtype=np.float32)
    other = reference.copy()
    other[3] = reference[0]
    assert compare_classes(reference, other).top1 == 0.75


def test_scale_changes_no_cosine_and_an_angle_does() -> None:
    reference = np.array([[1.0, 0], [0, 1], [1, 1]])
    angle = np.deg2rad(30)
    turned = np.array([[np.cos(angle), np.sin(angle)], [0, 5], [3, 3]])
    found = compare_features(reference, turned)
    assert found.rows == 3
    assert found.cosine_min == pytest.approx(np.cos(angle))
    assert found.cosine_mean == pytest.approx((np.cos(angle) + 2) / 3)


def test_features_of_all_tokens_are_one_row() -> None:
    reference = RNG.normal(size=(5, 7, 3))
    assert compare_features(reference, reference * 2).cosine_min == pytest.approx(1)


def test_neighbours_and_retrieval_see_different_things() -> None:
    """A shift of all rows, as a wrong bias makes, leaves who is near to whom, but an index of
    the reference does not find it."""
    reference = np.concatenate([RNG.normal(size=(20, 8))] * 2) + RNG.normal(0, 0.01, (40, 8))
    same = compare_features(reference, reference)
    assert same.neighbours == same.retrieved == 1.0
    mirrored = compare_features(reference, -reference)
    assert mirrored.neighbours == 1.0 and mirrored.retrieved == 0.0
    random = compare_features(reference, RNG.normal(size=reference.shape))
    assert random.neighbours is not None and random.neighbours < 0.3


def test_nearest_is_what_a_loop_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = RNG.normal(size=(30, 5)) * 10.0 ** RNG.integers(-3, 3, (30, 1))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = [
        max((j for j in range(30) if j != i), key=lambda j, i=i: unit[i] @ unit[j])
        for i in range(30)
    ]
    monkeypatch.setattr(agreement, "_CHUNK", 7)
    assert nearest(rows).tolist() == expected


def test_maps_are_compared_beyond_scale_and_offset() -> None:
    reference = RNG.normal(size=(3, 4, 6)).astype(np.float32)
    found = compare_maps(reference, 3 * reference - 100)
    assert found.correlation_min == pytest.approx(1, abs=1e-5)
    other = reference.copy()
    other[1] = -reference[1]
    found = compare_maps(reference, other)
    assert found.correlation_min == pytest.approx(-1)
    assert found.correlation_mean == pytest.approx(1 / 3)


def test_rows_without_direction() -> None:
    """Nothing is like nothing, and unlike anything else; a flat map has no pattern."""
    zero, one = np.zeros((2, 3)), np.ones((2, 3))
    assert compare_features(zero, zero).cosine_min == 1.0
    assert compare_features(zero, one).cosine_min == 0.0
    flat = np.full((1, 9), 0.1, np.float32)
    assert compare_maps(flat, flat + np.float32(0.2)).correlation_min == 1.0
    assert compare_maps(flat, np.arange(9.0)[None]).correlation_min == 0.0


def test_huge_and_tiny_values_keep_their_direction() -> None:
    row = RNG.normal(size=(3, 8))
    assert compare_features(row * 1e200, row * 1e-200).cosine_min == pytest.approx(1)


def test_what_cannot_be_compared_is_refused() -> None:
    rows = np.ones((2, 3))
    for other in (np.ones((3, 3)), np.ones(2), np.ones((0, 3))):
        with pytest.raises(DataError, match="cannot be compared"):
            compare_features(other if other.ndim < 2 or not other.size else rows, other)
    broken = rows.copy()
    broken[1, 2] = np.nan
    for compare in (compare_features, compare_maps, compare_classes):
        with pytest.raises(GraphError, match="of the graph for input 1 is not finite"):
            compare(rows, broken)
    assert compare_features(rows[:1], rows[:1]).retrieved is None
