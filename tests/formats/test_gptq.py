"""GPTQ keeps the grid of plain rounding and gives a smaller output error."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from iq_export.formats import int4_weights
from iq_export.formats.gptq import Curvature, invert_factor
from iq_export.formats.int4_weights import INT4_WEIGHTS, Int4Weights
from iq_export.formats.int8_weights import INT8_WEIGHTS


def correlated(seed: int = 0, features: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Rows with loud and correlated channels, and a weight."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(features, features)) * np.exp(rng.normal(size=features))
    rows = (rng.normal(size=(1024, features)) @ mixing).astype(np.float32)
    return rows, rng.normal(size=(features, 40)).astype(np.float32)


def int4(block: int) -> Int4Weights:
    return replace(INT4_WEIGHTS, blocks=(block,))


def error(rows: np.ndarray, found: np.ndarray, weight: np.ndarray) -> float:
    return float(((rows @ (found - weight)) ** 2).sum())


@pytest.mark.parametrize("seed", range(3))
def test_int8_error_is_well_below_rounding(seed: int) -> None:
    rows, weight = correlated(seed)
    codes, scale = INT8_WEIGHTS.compensate(weight, Curvature(rows.T @ rows))
    plain, same = INT8_WEIGHTS.round(weight)
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(scale, same)
    assert error(rows, codes * scale, weight) < 0.7 * error(rows, plain * same, weight)


@pytest.mark.parametrize("block", [32, 64])
def test_int4_error_is_well_below_rounding(block: int) -> None:
    rows, weight = correlated()
    hessian = rows.T @ rows
    codes, scale = int4(block).compensate(weight, Curvature(hessian))
    assert codes.dtype == ml_dtypes.int4
    assert scale.shape == (128 // block, 40)
    plain, plain_scale = int4(block).round(weight, np.diag(hessian))

    def value(q: np.ndarray, s: np.ndarray) -> np.ndarray:
        return q.astype(np.float32) * np.repeat(s, block, axis=0)

    compensated = error(rows, value(codes, scale), weight)
    assert compensated < 0.8 * error(rows, value(plain, plain_scale), weight)


def test_later_rounds_leave_less_error_than_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = correlated(features=256)
    weight[:64, 5] = 0  # a group without a code
    hessian = rows.T @ rows

    def found() -> float:
        codes, scale = int4(64).compensate(weight, Curvature(hessian))
        assert codes.astype(np.int8).min() >= -8 and codes.astype(np.int8).max() <= 7
        np.testing.assert_array_equal(scale, scale.astype(np.float16).astype(np.float32))
        return error(rows, codes.astype(np.float32) * np.repeat(scale, 64, axis=0), weight)

    refined = found()
    monkeypatch.setattr(int4_weights, "_ROUNDS", 0)
    assert refined < 0.95 * found()


def test_uncorrelated_channels_are_rounded_plainly() -> None:
    _, weight = correlated()
    codes, scale = INT8_WEIGHTS.compensate(weight, Curvature(np.eye(128, dtype=np.float32)))
    plain, _ = INT8_WEIGHTS.round(weight)
    np.testing.assert_array_equal(codes, plain)
    assert scale.shape == (40,)


def test_silent_channels_and_zero_columns() -> None:
    rows, weight = correlated()
    rows[:, 7], weight[:, 3] = 0, 0
    codes, scale = INT8_WEIGHTS.compensate(weight, Curvature(rows.T @ rows))
    assert not codes[:, 3].any()
    assert np.isfinite(scale).all()
    np.testing.assert_allclose(codes[7] * scale, weight[7], atol=float(scale.max()))


def test_deterministic() -> None:
    rows, weight = correlated()
    first, again = (INT8_WEIGHTS.compensate(weight, Curvature(rows.T @ rows))[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("features", [1, 7, 128, 129, 1200])
def test_factor_is_that_of_the_inverse(features: int) -> None:
    rng = np.random.default_rng(features)
    rows = (rng.normal(size=(2 * features, features)) * np.exp(rng.normal(size=features))).astype(
        np.float32
    )
    curvature = Curvature(rows.T @ rows)
    damped = curvature.hessian.astype(np.float64)
    damped[np.diag_indices(features)] += 0.01 * np.diag(damped).mean()
    expected = np.linalg.cholesky(np.linalg.inv(damped)).T
    np.testing.assert_allclose(curvature.factor, expected, rtol=1e-5, atol=1e-5 * expected.max())
    np.testing.assert_allclose(curvature.damped, damped, rtol=1e-6)


def test_factor_of_an_indefinite_matrix_is_refused() -> None:
    matrix = np.diag(np.where(np.arange(300) == 299, -1.0, 1.0))
    with pytest.raises(np.linalg.LinAlgError):
        invert_factor(matrix)


@pytest.mark.parametrize("features", [5, 96, 130, 1100])
def test_compensation_is_that_of_the_paper(features: int) -> None:
    """Channel by channel: each error, over the factor's diagonal, on all later channels."""
    rng = np.random.default_rng(features)
    rows = rng.normal(size=(2 * features, features)).astype(np.float32)
    weight = rng.normal(size=(features, 6)).astype(np.float32)
    curvature = Curvature(rows.T @ rows)
    codes, scale = INT8_WEIGHTS.compensate(weight, curvature)
    work, factor = weight.astype(np.float64), curvature.factor.astype(np.float64)
    expected = np.empty_like(work)
    for row in range(features):
        expected[row] = np.clip(np.round(work[row] / scale), -127, 127)
        error = (work[row] - expected[row] * scale) / factor[row, row]
        work[row + 1 :] -= factor[row, row + 1 :, None] * error
    assert (codes != expected).mean() < 0.01  # at a tie either code is right
    assert np.abs(codes - expected).max() <= 1
