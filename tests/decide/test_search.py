"""Clips and smoothing factors are chosen by the error of the products behind the quantizer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iq_export.decide.search import (
    CLIPS,
    _row_absmax,
    _some_outputs,
    choose_clip,
    choose_smoothing,
    loudest_channels,
)


def sample(seed: int = 0, *, loud: float = 1.0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rows [200, 32] whose channel 5 is `loud` times the others, and two weights."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(200, 32)).astype(np.float32)
    rows[:, 5] *= loud
    return rows, [rng.normal(size=(32, n)).astype(np.float32) for n in (8, 12)]


def output_error(rows: np.ndarray, weights: list[np.ndarray], scale: float) -> float:
    weight = np.concatenate(weights, axis=1)
    rounded = np.clip(np.round(rows / scale), -128, 127) * scale
    return float(((rounded @ weight - rows @ weight) ** 2).sum() / ((rows @ weight) ** 2).sum())


@pytest.mark.parametrize("strength", [1.0, 0.25, 0.0])
def test_clip_is_the_best_of_the_grid_to_a_power(strength: float) -> None:
    rows, weights = sample()
    rows[0, 7] = 40  # one outlier entry, in a channel of little weight
    for weight in weights:
        weight[7] *= 0.01
    clip, error = choose_clip(rows, 40.0, weights, strength=strength)
    errors = [output_error(rows, weights, 40 * c / 127) for c in CLIPS]
    best = CLIPS[int(np.argmin(errors))]
    assert best < 1
    assert clip == pytest.approx(best**strength)
    # The search rounds the weights too; they add an error of their own.
    expected = output_error(rows, weights, 40 * clip / 127)
    assert error == pytest.approx(expected, rel=0.5, abs=2e-4)


def test_error_in_a_channel_that_no_weight_reads_costs_nothing() -> None:
    rows, weights = sample()
    rows[:, 7] *= 1000
    top = float(np.abs(rows).max())
    for weight in weights:
        weight[7] = 0
    clip, _ = choose_clip(rows, top, weights)
    assert clip == min(CLIPS)
    for weight in weights:
        weight[7] = 1
    clip, _ = choose_clip(rows, top, weights)
    assert clip > 0.5


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.floats(0.01, 100))
def test_clip_does_not_depend_on_the_unit(seed: int, unit: float) -> None:
    rows, weights = sample(seed)
    top = float(np.abs(rows).max())
    clip, error = choose_clip(rows, top, weights)
    again, same = choose_clip(rows * np.float32(unit), top * unit, weights)
    assert same == pytest.approx(error, rel=0.05)
    assert again == clip or abs(same - error) < 0.05 * error


def test_smoothing_tames_a_loud_channel() -> None:
    rows, weights = sample(loud=200.0)
    choice = choose_smoothing(rows, np.abs(rows).max(0), weights)
    assert choice.name != "none"
    assert choice.error < 0.5 * choice.error_without
    assert choice.factors.dtype == np.float32
    assert choice.factors.argmax() == 5


def test_even_channels_gain_nothing() -> None:
    rows, weights = sample()
    choice = choose_smoothing(rows, np.abs(rows).max(0), weights)
    assert choice.error <= choice.error_without


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.floats(1, 1e5))
def test_factors_are_bounded_and_keep_the_magnitude(seed: int, loud: float) -> None:
    rows, weights = sample(seed, loud=loud)
    factors = choose_smoothing(rows, np.abs(rows).max(0), weights).factors
    assert np.isfinite(factors).all()
    assert 1 / 32 <= factors.min() <= factors.max() <= 32
    assert 0.25 < np.exp(np.log(factors).mean()) < 4


def test_dead_channels_are_no_division_by_zero() -> None:
    rows, weights = sample()
    rows[:, 3] = 0
    weights[0][4] = weights[1][4] = 0
    choice = choose_smoothing(rows, np.abs(rows).max(0), weights)
    assert np.isfinite(choice.factors).all()
    assert np.isfinite(choice.error)


def test_rotation_is_part_of_the_choice() -> None:
    """A rotated tensor has no loud channel left, so smoothing has less to gain."""
    rows, weights = sample(loud=100.0)
    top = np.abs(rows).max(0)
    plain = choose_smoothing(rows, top, weights)
    rotated = choose_smoothing(rows, top, weights, rotation=16)
    assert rotated.error_without < plain.error_without


def test_silent_tensor() -> None:
    """Nothing to lose: all errors are zero and no factor is needed."""
    rows, weights = sample()
    choice = choose_smoothing(0 * rows, np.zeros(32, np.float32), weights)
    assert choice.error == 0


def test_error_is_lower_when_the_loudest_channels_go_aside() -> None:
    rows, weights = sample(loud=200.0)
    top = np.abs(rows).max(0)
    plain = choose_smoothing(rows, top, weights)
    assert choose_smoothing(rows, top, weights, side=2).error < plain.error


def test_loudest_channels() -> None:
    rows, _ = sample(loud=200.0)
    rows[3, 20] = -5000
    np.testing.assert_array_equal(loudest_channels(rows, 2), [5, 20])
    assert loudest_channels(rows, 0).size == 0
    assert loudest_channels(rows, 32).size == 4  # at most an eighth


@pytest.mark.parametrize("widths", [(8, 12), (256,), (513, 1, 255), (700, 700, 701)])
def test_sampled_outputs_are_those_of_all_side_by_side(widths: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(4, n)).astype(np.float32) for n in widths]
    together = np.concatenate(weights, axis=1)
    step = max(1, sum(widths) // 256)
    np.testing.assert_array_equal(_some_outputs(weights), together[:, ::step])
    np.testing.assert_array_equal(_row_absmax(weights), np.abs(together).max(1))
