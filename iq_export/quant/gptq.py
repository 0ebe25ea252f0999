"""Round weights one input channel at a time and let later channels make up for the error.

GPTQ (arXiv 2210.17323): with `H = X^T X` over calibration rows, the rounding error of channel i is
spread over the channels after it so that `|X W - X Q|` stays least. The grid is the one that plain
rounding has (int8 per output channel, or int4 blocks), so nothing changes at run time.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from iq_export.quant.weights import as_shipped, int4_blocked, int8_scales

# Share of the mean diagonal that is added to it: the paper's value.
_DAMPING = 0.01
# Channels whose updates of the others are collected into one product; outputs solved at a time.
_CHUNK = 128
# int4: rounds behind the first pass, and sweeps over all channels in each.
_ROUNDS, _SWEEPS = 2, 2
_INT4 = (-8, 7)
# A scale moves no further than this factor in one round.
_MOST_SCALE = 3.0


def gptq_int8(weight: np.ndarray, hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `int8_per_channel`: `(codes int8 [in, out], scale float32 [out])` of `weight` `[in, out]`.

    `hessian`: `X^T X`, float32 `[in, in]`, in the basis of the weight's rows.
    """
    scale = int8_scales(weight)
    work, inverse = weight.astype(np.float32).copy(), _inverse_factor(_damped(hessian))
    codes = np.empty(weight.shape, np.int8)

    def rounded(row: int) -> np.ndarray:
        code = np.clip(np.round(work[row] / scale), -127, 127)
        codes[row] = code
        return code * scale

    _compensate(work, inverse, rounded, _CHUNK)
    return codes, scale


def gptq_int4(weight: np.ndarray, hessian: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """As `int4_blocked`: `(codes int4 [in, out], scale float32 [in / block, out])`.

    The scales of a block are chosen when it is reached, for the rows as compensated so far. Then,
    in rounds, all scales at once by least squares for the codes, and every code once more for what
    the others leave (coordinate descent, QuantEase, arXiv 2309.01885). The best round is kept.
    """
    weight, damped = weight.astype(np.float32), _damped(hessian)
    work, inverse = weight.copy(), _inverse_factor(damped)
    importance = np.maximum(np.diag(hessian), 1e-12)
    codes = np.empty(weight.shape, np.float32)
    scales = np.empty((weight.shape[0] // block, weight.shape[1]), np.float32)

    def rounded(row: int) -> np.ndarray:
        group = row // block
        if row % block == 0:
            rows = slice(row, row + block)
            scales[group] = int4_blocked(work[rows], block, importance[rows])[1][0]
        codes[row] = np.clip(np.round(work[row] / scales[group]), *_INT4)
        return codes[row] * scales[group]

    _compensate(work, inverse, rounded, block)
    curvature = damped.astype(np.float32)
    pull = curvature @ weight
    best = (_error(weight, codes, scales, curvature), codes, scales)
    for _ in range(_ROUNDS):
        scales = _fitted_scales(pull, codes, scales, curvature)
        codes = codes.copy()
        for _ in range(_SWEEPS):
            _descend(weight, codes, scales, curvature)
        best = min(
            best, (_error(weight, codes, scales, curvature), codes, scales), key=lambda x: x[0]
        )
    return best[1].astype(ml_dtypes.int4), best[2]


def _damped(hessian: np.ndarray) -> np.ndarray:
    """float64: H is nearly singular. Channels that are always zero count as the mean."""
    damped = hessian.astype(np.float64)
    diagonal = np.diag(damped)
    silent = diagonal <= 0
    mean = diagonal[~silent].mean() if (~silent).any() else 1.0
    damped[np.diag_indices_from(damped)] += _DAMPING * mean + silent * mean
    return damped


def _inverse_factor(damped: np.ndarray) -> np.ndarray:
    """Upper Cholesky factor of the inverse, float32."""
    lower = np.linalg.cholesky(np.linalg.inv(damped))
    return np.ascontiguousarray(lower.T).astype(np.float32)


def _error(
    weight: np.ndarray, codes: np.ndarray, scales: np.ndarray, curvature: np.ndarray
) -> float:
    """`tr(D^T H D)` of the rounding error D: the squared error of the outputs."""
    left = weight - codes * np.repeat(scales, len(weight) // len(scales), axis=0)
    return float((left * (curvature @ left)).sum())


def _fitted_scales(
    pull: np.ndarray, codes: np.ndarray, scales: np.ndarray, curvature: np.ndarray
) -> np.ndarray:
    """The scales `[groups, out]` of least output error for these codes, per output channel.

    `pull`: H W, `[in, out]`.
    """
    block = len(pull) // len(scales)
    found = scales.copy()
    for start in range(0, scales.shape[1], _CHUNK):
        part = slice(start, start + _CHUNK)
        found[:, part] = _solved(pull[:, part], codes[:, part], scales[:, part], curvature, block)
    near = (found > scales / _MOST_SCALE) & (found < scales * _MOST_SCALE)
    return as_shipped(np.where(near, found, scales))


def _solved(
    pull: np.ndarray, codes: np.ndarray, scales: np.ndarray, curvature: np.ndarray, block: int
) -> np.ndarray:
    """The normal equations of some output channels; `[groups, out]`."""
    groups, outputs = scales.shape
    system = np.empty((outputs, groups, groups), np.float64)
    for group in range(groups):
        rows = slice(group * block, (group + 1) * block)
        pulled = (curvature[:, rows] @ codes[rows]) * codes
        system[:, :, group] = pulled.reshape(groups, block, outputs).sum(1).T
    target = (pull * codes).reshape(groups, block, outputs).sum(1).T
    # A group of zeros says nothing about its scale: it keeps the one it has.
    hold = 1e-4 * np.einsum("ogg->o", system)[:, None] / groups + 1e-9
    system[:, np.arange(groups), np.arange(groups)] += hold
    solved: np.ndarray = np.linalg.solve(system, (target + hold * scales.T)[..., None])[..., 0].T
    return solved


def _descend(
    weight: np.ndarray, codes: np.ndarray, scales: np.ndarray, curvature: np.ndarray
) -> None:
    """Round every channel, in place, for the errors that all others have now."""
    block = len(weight) // len(scales)
    left = weight - codes * np.repeat(scales, block, axis=0)
    for group, scale in enumerate(scales):
        start = group * block
        rows = slice(start, start + block)
        pull, inside = curvature[rows] @ left, curvature[rows, rows]
        for row in range(block):
            now = codes[start + row]
            wanted = now * scale + pull[row] / inside[row, row]
            new = np.clip(np.round(wanted / scale), *_INT4)
            moved = (new - now) * scale
            pull -= inside[:, row, None] * moved
            left[start + row] -= moved
            codes[start + row] = new


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
