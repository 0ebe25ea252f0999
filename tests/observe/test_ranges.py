"""Ranges: histograms against NumPy, sinks left out, samples bounded and deterministic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iq_export.observe.ranges import (
    MagnitudeHistogram,
    MagnitudeObserver,
    TensorStats,
    observe_ranges,
)
from iq_export.observe.walk import observe as observe_all
from iq_export.progress import Progress
from tests.planted import CPU, Planted

NAME = "layers.1/mlp/Mul/out"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**16),
    st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=4),
    st.floats(0.01, 0.999),
)
def test_quantiles_are_those_of_the_data(seed: int, scales: list[float], q: float) -> None:
    """To within a bin of the final range, whatever the order of magnitudes."""
    rng = np.random.default_rng(seed)
    histogram, data = MagnitudeHistogram(), []
    for scale in scales:
        data.append(np.abs(scale * rng.normal(size=(20, 30))).astype(np.float32))
        histogram.add(data[-1])
    values = np.concatenate([part.ravel() for part in data])
    assert histogram.total == values.size
    bin_width = histogram.limit / histogram.counts.size
    below = np.quantile(values, q, method="inverted_cdf")
    assert histogram.quantile(q) == pytest.approx(below, abs=2 * bin_width)
    assert values.max() < histogram.limit <= max(2 * values.max(), 1.1 * data[0].max())


def test_doubling_merges_bins_exactly() -> None:
    histogram = MagnitudeHistogram()
    histogram.add(np.float32([0.5, 1.0]))
    histogram.add(np.float32([7.0]))
    assert histogram.total == 3
    assert histogram.limit == pytest.approx(8.0008)
    assert (histogram.counts > 0).sum() == 3


def test_zeros_and_nothing() -> None:
    histogram = MagnitudeHistogram()
    assert histogram.quantile(0.9) == 0
    histogram.add(np.zeros((0, 4), np.float32))
    histogram.add(np.zeros((3, 4), np.float32))
    assert (histogram.total, histogram.quantile(0.9)) == (12, 0)
    histogram.add(np.float32([4.0]))
    assert histogram.total == 13
    assert histogram.quantile(0.5) < 0.001


def test_sinks_count_for_absmax_only() -> None:
    value = np.float32([[1, -2], [500, 3], [0.5, 4]])
    stats = TensorStats.empty(2)
    stats.add(value, np.array([False, True, False]), np.array([0, 1, 2]))
    assert stats.absmax == 500
    assert stats.absmax_semantic == 4
    assert stats.channel_absmax.tolist() == [1, 4]
    assert stats.rows.tolist() == [[1, -2], [0.5, 4]]


def test_window_of_sinks_only() -> None:
    stats = TensorStats.empty(2)
    stats.add(np.float32([[9, 9]]), np.array([True]), np.array([0]))
    assert (stats.absmax, stats.absmax_semantic, len(stats.rows)) == (9, 0, 0)


def observe(data: Planted, names: dict[str, int], **options: object) -> dict[str, TensorStats]:
    settings_: dict[str, object] = {
        "providers": CPU, "progress": Progress(quiet=True), "seed": 3, **options,
    }  # fmt: skip
    first = np.arange(40) == 0
    return observe_ranges(data.path, names, data.windows, lambda *_: first, **settings_)


def test_planted_spike_is_left_out(spiky: Planted) -> None:
    stats = observe(spiky, {NAME: 128})[NAME]
    assert stats.absmax > 500
    assert stats.absmax_semantic < 10
    np.testing.assert_allclose(stats.absmax, spiky.stats.down_max[1].max(), rtol=1e-4)
    others = spiky.stats.position > 0
    np.testing.assert_allclose(
        stats.absmax_semantic, spiky.stats.down_max[1, others].max(), rtol=1e-4
    )
    everyone = MagnitudeObserver({NAME: 128}, len(spiky.windows))
    observe_all(spiky.path, [everyone], spiky.windows, progress=Progress(quiet=True))
    assert everyone.stats[NAME].histogram.total == 24 * 40 * 128 // 8
    assert everyone.stats[NAME].absmax == stats.absmax


def test_rows_are_left_out_tensor_by_tensor(spiky: Planted) -> None:
    found = observe_ranges(
        spiky.path, {NAME: 128, "layers.0/mlp/Mul/out": 128}, spiky.windows[:2],
        lambda name, *_: (np.arange(40) == 0) & (name == NAME),
        providers=CPU, progress=Progress(quiet=True), seed=0,
    )  # fmt: skip
    assert found[NAME].absmax_semantic < found[NAME].absmax
    other = found["layers.0/mlp/Mul/out"]
    assert other.absmax_semantic == other.absmax


def test_sample_is_bounded_and_goes_when_it_is_reduced(spiky: Planted) -> None:
    names = {NAME: 128, "embed/out": 64}
    assert 300 < len(observe(spiky, names)[NAME].rows) <= 512
    assert 50 < len(observe(spiky, names, sample_tokens=96)[NAME].rows) <= 96
    reduced: dict[str, int] = {}
    found = observe(
        spiky, names, reduce=lambda its: reduced.update((n, len(x.rows)) for n, x in its.items())
    )
    assert set(reduced) == set(names) and min(reduced.values()) > 300
    assert {len(stats.rows) for stats in found.values()} == {0}


def test_same_seed_same_sample(spiky: Planted) -> None:
    first, again = (observe(spiky, {NAME: 128})[NAME].rows for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.float32
    other = observe(spiky, {NAME: 128}, seed=4)[NAME].rows
    assert other.shape != first.shape or (other != first).any()


def test_sinks_may_be_read_from_the_graph(spiky: Planted) -> None:
    index = "iq.sinks.0.index"

    def sinks(name: str, number: int, values: dict[str, np.ndarray]) -> np.ndarray:
        assert name == NAME
        assert number in range(4)
        return values[index] > 0

    found = observe_ranges(
        spiky.inserted, {NAME: 128}, spiky.windows[:4], sinks, always=[index],
        providers=CPU, progress=Progress(quiet=True), seed=0,
    )  # fmt: skip
    assert set(found) == {NAME}
    assert found[NAME].absmax_semantic < 10
