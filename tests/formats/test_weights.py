"""Weight rounding: bounds that hold for any weight, and the layouts TensorRT takes."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iq_export.errors import UsageError
from iq_export.formats.int4_weights import INT4_WEIGHTS, Int4Weights
from iq_export.formats.int8_weights import INT8_WEIGHTS

fast = settings(max_examples=50, deadline=None)


def int4(block: int) -> Int4Weights:
    return replace(INT4_WEIGHTS, blocks=(block,))


@st.composite
def weights(draw: st.DrawFn, rows: int | None = None) -> np.ndarray:
    """Columns of different magnitudes, some of them zero, some skewed to one sign."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    shape = (rows or draw(st.integers(1, 12)), draw(st.integers(1, 6)))
    weight = rng.normal(size=shape) + draw(st.sampled_from([0, -1, 2]))
    weight *= 10.0 ** rng.integers(-4, 3, size=shape[1])
    weight *= rng.random(shape[1]) < 0.9
    return weight.astype(np.float32)


@fast
@given(weights())
def test_int8_is_off_by_half_a_step_at_most(weight: np.ndarray) -> None:
    codes, scale = INT8_WEIGHTS.round(weight)
    assert codes.dtype == np.int8
    assert scale.dtype == np.float32
    assert (scale > 0).all()
    assert codes.min() >= -127
    # The scale is rounded to half, which moves 127 steps by 0.06 of one.
    assert (np.abs(codes * scale - weight) <= 0.57 * scale).all()
    top = np.abs(weight).max(0)
    assert (np.abs(codes).max(0)[top > 127 * 2**-14] == 127).all()
    np.testing.assert_array_equal(scale, INT8_WEIGHTS.scales(weight))


def test_int8_column_of_zeros() -> None:
    codes, scale = INT8_WEIGHTS.round(np.zeros((4, 2), np.float32))
    assert not codes.any()
    assert scale.tolist() == [1, 1]


def test_int8_of_exact_weights() -> None:
    rng = np.random.default_rng(0)
    exact = rng.integers(-127, 128, size=(16, 4)).astype(np.int8)
    exact[0] = 127
    codes, scale = INT8_WEIGHTS.round(exact.astype(np.float32) * 0.25)
    np.testing.assert_array_equal(codes, exact)
    np.testing.assert_array_equal(scale, np.float32(0.25))


@fast
@given(weights(rows=16), st.sampled_from([4, 8, 16]))
def test_int4_stays_within_its_blocks(weight: np.ndarray, block: int) -> None:
    codes, scale = int4(block).round(weight)
    assert codes.dtype == ml_dtypes.int4
    assert codes.shape == weight.shape
    assert scale.shape == (16 // block, weight.shape[1])
    assert scale.dtype == np.float32
    assert (scale > 0).all()
    spread = np.repeat(scale, block, axis=0)
    rounded = codes.astype(np.float32) * spread
    # Codes are the nearest ones for their scale: half a step, or clipped at the ends.
    inside = (weight >= -8 * spread) & (weight <= 7 * spread)
    assert (np.abs(rounded - weight)[inside] <= 0.5 * spread[inside] * (1 + 1e-4)).all()


def to_nearest(weight: np.ndarray, block: int) -> np.ndarray:
    """Each weight by itself, absmax scales: what int4 is compared with."""
    blocks = weight.reshape(len(weight) // block, block, -1)
    top = np.abs(blocks).max(1, keepdims=True)
    step = np.where(top > 0, top / 7, 1).astype(np.float32)
    return (np.clip(np.round(blocks / step), -8, 7) * step).reshape(weight.shape)


@fast
@given(weights(rows=16))
def test_int4_is_never_worse_than_absmax(weight: np.ndarray) -> None:
    codes, scale = int4(8).round(weight)
    rounded = codes.astype(np.float32) * np.repeat(scale, 8, axis=0)
    ours, plain = (((x - weight) ** 2).sum(0) for x in (rounded, to_nearest(weight, 8)))
    # Scales are rounded to half: a part in two thousand.
    step = np.abs(weight).max(0) / 7
    assert (np.sqrt(ours) <= np.sqrt(plain) + 0.01 * step + 1e-30).all()


def test_int4_importance_moves_the_scale() -> None:
    """One outlier that no activation meets is clipped for the sake of the others."""
    weight = np.full((8, 1), 0.6, np.float32)
    weight[::2] = 1
    weight[3] = 9
    importance = np.ones(8, np.float32)
    _, plain = int4(8).round(weight, importance)
    importance[3] = 1e-6
    _, weighed = int4(8).round(weight, importance)
    assert weighed < plain


def test_int4_rounded_is_what_dequantizing_gives() -> None:
    weight = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    codes, scale = int4(8).round(weight)
    expected = codes.astype(np.float32) * np.repeat(scale, 8, axis=0)
    np.testing.assert_array_equal(int4(8).rounded(weight), expected)


@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 1e7])
def test_scales_ship_as_they_are_rounded(magnitude: float) -> None:
    """To half where half holds them in full; otherwise unchanged, for a float32 graph."""
    weight = np.float32([[0.3], [1], [-0.7]]) * np.float32(magnitude)
    codes, scale = INT8_WEIGHTS.round(weight)
    assert np.abs(codes * scale - weight).max() <= 0.57 * scale
    exact = max(np.float32(magnitude) / np.float32(127), np.float32(2**-14))
    shipped = np.float32(np.float16(exact)) if magnitude == 1 else exact
    assert scale == pytest.approx(shipped, rel=1e-6)


def test_int4_uses_the_eighth_negative_code() -> None:
    weight = np.float32([[-8], [7], [3], [1]])
    codes, scale = int4(4).round(weight)
    np.testing.assert_array_equal(codes.astype(np.float32) * scale, weight)
    assert codes.min() == -8


def test_int4_of_zeros() -> None:
    codes, scale = int4(4).round(np.zeros((4, 2), np.float32))
    assert not codes.astype(int).any()
    assert (scale > 0).all()


@pytest.mark.parametrize(("features", "block"), [(128, 128), (576, 64), (1536, 128), (64, 64)])
def test_block_is_the_largest_that_divides(features: int, block: int) -> None:
    assert INT4_WEIGHTS.block(features) == block


@pytest.mark.parametrize("features", [1, 63, 96, 100])
def test_block_that_does_not_divide_is_refused_by_name(features: int) -> None:
    with pytest.raises(UsageError, match=rf"'layers\.1\.w' has {features} input features"):
        INT4_WEIGHTS.check("layers.1.w", features)


@pytest.mark.parametrize("weighed", [False, True])
def test_int4_groups_are_rounded_as_all_at_once(weighed: bool) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(192, 5)).astype(np.float32)
    importance = rng.random(192).astype(np.float32) if weighed else None
    codes, scales = int4(64).round(weight, importance)
    for group in range(3):
        rows = slice(64 * group, 64 * (group + 1))
        part = None if importance is None else importance[rows]
        alone, scale = int4(64).round(weight[rows], part)
        np.testing.assert_array_equal(alone, codes[rows])
        np.testing.assert_array_equal(scale[0], scales[group])
