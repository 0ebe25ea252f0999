"""Round weights one input channel at a time and let later channels make up for the error.

GPTQ (arXiv 2210.17323): with `H = X^T X` over calibration rows, the rounding error of channel i is
spread over the channels after it so that `|X W - X Q|` stays least. The grid is the one that plain
rounding has (int8 per output channel, or int4 blocks), so nothing changes at run time.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from iq_export.quant.weights import int4_blocked, int8_scales

# Share of the mean diagonal that is added to it: the paper's value.
_DAMPING = 0.01
# Channels whose updates of the others are collected into one product.
_CHUNK = 128


def gptq_int8(weight: np.ndarray, hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `int8_per_channel`: `(codes int8 [in, out], scale float32 [out])` of `weight` `[in, out]`.

    `hessian`: `X^T X`, float32 `[in, in]`, in the basis of the weight's rows.
    """
    scale = int8_scales(weight)
    work, inverse = weight.astype(np.float32).copy(), _inverse_factor(hessian)
    codes = np.empty(weight.shape, np.int8)

    def rounded(row: int) -> np.ndarray:
        code = np.clip(np.round(work[row] / scale), -127, 127)
        codes[row] = code
        return code * scale

    _compensate(work, inverse, rounded, _CHUNK)
    return codes, scale


def gptq_int4(weight: np.ndarray, hessian: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """As `int4_blocked`: `(codes int4 [in, out], scale float32 [in / block, out])`.

    The scales of a block are chosen when it is reached, for the rows as compensated so far.
    """
    work, inverse = weight.astype(np.float32).copy(), _inverse_factor(hessian)
    importance = np.maximum(np.diag(hessian), 1e-12)
    codes = np.empty(weight.shape, np.int8)
    scales = np.empty((weight.shape[0] // block, weight.shape[1]), np.float32)

    def rounded(row: int) -> np.ndarray:
        group = row // block
        if row % block == 0:
            rows = slice(row, row + block)
            scales[group] = int4_blocked(work[rows], block, importance[rows])[1][0]
        code = np.clip(np.round(work[row] / scales[group]), -8, 7)
        codes[row] = code
        return code * scales[group]

    _compensate(work, inverse, rounded, block)
    return codes.astype(ml_dtypes.int4), scales


def _inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """Upper Cholesky factor of the damped inverse; float64 inside, since H is nearly singular."""
    damped = hessian.astype(np.float64)
    diagonal = np.diag(damped)
    silent = diagonal <= 0
    mean = diagonal[~silent].mean() if (~silent).any() else 1.0
    damped[np.diag_indices_from(damped)] += _DAMPING * mean + silent * mean
    lower = np.linalg.cholesky(np.linalg.inv(damped))
    return np.ascontiguousarray(lower.T).astype(np.float32)


def _compensate(
    work: np.ndarray, inverse: np.ndarray, rounded: Callable[[int], np.ndarray], chunk: int
) -> None:
    """Round `work` `[in, out]` row by row, in place; `rounded(row)` gives the row's values."""
    channels = work.shape[0]
    for start in range(0, channels, chunk):
        end = min(start + chunk, channels)
        errors = np.empty((end - start, work.shape[1]), np.float32)
        for row in range(start, end):
            error = (work[row] - rounded(row)) / inverse[row, row]
            work[row + 1 : end] -= inverse[row, row + 1 : end, None] * error
            errors[row - start] = error
        work[end:] -= inverse[start:end, end:].T @ errors
