"""Round weights one input channel at a time and let later channels make up for the error.

GPTQ (arXiv 2210.17323): with `H = X^T X` over calibration rows, the rounding error of channel i is
spread over the channels after it so that `|X W - X Q|` stays least. The grid is the one that plain
rounding has (int8 per output channel, or int4 blocks), so nothing changes at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import ml_dtypes
import numpy as np

from iq_export.quant.weights import as_shipped, int4_blocked, int8_scales

# Share of the mean diagonal that is added to it: the paper's value.
_DAMPING = 0.01
# Channels rounded one behind the other before the next hear of it: a power of two, as a block is.
_LEAF = 16
# Sizes of matrices: that LAPACK factors, and that of a strip which bounds temporaries.
_SMALL, _STRIP = 128, 512
# int4: rounds behind the first pass, and sweeps over all channels in each.
_ROUNDS, _SWEEPS = 2, 2
# Outputs solved at a time.
_CHUNK = 128
_INT4 = (-8, 7)
# A scale moves no further than this factor in one round.
_MOST_SCALE = 3.0


class Curvature:
    """`X^T X` of calibration rows, in the basis of a weight's rows: shared by all products that
    read these rows, so that it is factored once.

    `hessian`: float32 `[in, in]`, not changed. Besides it this holds at most two more such, and for
    a moment the factor in float64.
    """

    def __init__(self, hessian: np.ndarray) -> None:
        self.hessian = hessian

    @cached_property
    def factor(self) -> np.ndarray:
        """Upper Cholesky factor U of the damped inverse, `U^T U`: float32 `[in, in]`.

        With the order of channels reversed, `H = L L^T` becomes `H = R R^T` with an upper R, and U
        is its inverse: no inverse of H is needed.
        """
        lower = np.array(self.hessian[::-1, ::-1], np.float64, order="C")
        np.fill_diagonal(lower, self._diagonal[::-1])
        invert_factor(lower)
        return np.ascontiguousarray(lower[::-1, ::-1], np.float32)

    @cached_property
    def damped(self) -> np.ndarray:
        """float32 `[in, in]`."""
        damped = self.hessian.astype(np.float32)
        np.fill_diagonal(damped, self._diagonal)
        return damped

    @cached_property
    def _diagonal(self) -> np.ndarray:
        """float64: H is nearly singular. Channels that are always zero count as the mean."""
        diagonal = np.diag(self.hessian).astype(np.float64)
        silent = diagonal <= 0
        mean = diagonal[~silent].mean() if (~silent).any() else 1.0
        return diagonal + (_DAMPING * mean + silent * mean)


def gptq_int8(weight: np.ndarray, curvature: Curvature) -> tuple[np.ndarray, np.ndarray]:
    """As `int8_per_channel`: `(codes int8 [in, out], scale float32 [out])`."""
    scale = int8_scales(weight)
    codes = np.empty(weight.shape, np.int8)

    def rounded(row: int, values: np.ndarray) -> np.ndarray:
        code = np.clip(np.round(values / scale), -127, 127)
        codes[row] = code
        return code * scale

    _compensate(weight.astype(np.float32), curvature.factor, rounded)
    return codes, scale


def gptq_int4(
    weight: np.ndarray, curvature: Curvature, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `int4_blocked`: `(codes int4 [in, out], scale float32 [in / block, out])`.

    The scales of a block are chosen when it is reached, for the rows as compensated so far. Then,
    in rounds, all scales at once by least squares for the codes, and every code once more for what
    the others leave (coordinate descent, QuantEase, arXiv 2309.01885). The best round is kept.
    """
    weight = weight.astype(np.float32)
    work = weight.copy()
    importance = np.maximum(np.diag(curvature.hessian), 1e-12)
    codes = np.empty(weight.shape, np.float32)
    scales = np.empty((weight.shape[0] // block, weight.shape[1]), np.float32)

    def rounded(row: int, values: np.ndarray) -> np.ndarray:
        group = row // block
        if row % block == 0:
            rows = slice(row, row + block)
            scales[group] = int4_blocked(work[rows], block, importance[rows])[1][0]
        codes[row] = np.clip(np.round(values / scales[group]), *_INT4)
        return codes[row] * scales[group]

    _compensate(work, curvature.factor, rounded)
    damped = curvature.damped
    pull = damped @ weight
    best = (_error(weight, codes, scales, damped), codes, scales)
    for _ in range(_ROUNDS):
        scales = _fitted_scales(pull, codes, scales, damped)
        codes = codes.copy()
        for _ in range(_SWEEPS):
            _descend(weight, codes, scales, damped)
        best = min(best, (_error(weight, codes, scales, damped), codes, scales), key=lambda x: x[0])
    return best[1].astype(ml_dtypes.int4), best[2]


def invert_factor(matrix: np.ndarray) -> None:
    """Put `L^-1` of `matrix = L L^T`, float64 `[n, n]`, in its place, zeros above the diagonal.

    By halves, `L = [[A, 0], [B, C]]`, so that nearly all is matrix products; what an upper triangle
    holds is not read. Temporaries are `_STRIP` columns.

    Raises LinAlgError for a matrix that is not positive definite.
    """
    size = len(matrix)
    if size <= _SMALL:
        matrix[:] = np.tril(np.linalg.inv(np.linalg.cholesky(matrix)))
        return
    half = size // 2
    strips = [slice(at, min(at + _STRIP, half)) for at in range(0, half, _STRIP)]
    first, between, second = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    invert_factor(first)
    for strip in reversed(strips):  # B = (its part of the matrix) A^-T
        between[:, strip] = between[:, : strip.stop] @ first[strip, : strip.stop].T
    below = [slice(at, min(at + _STRIP, size - half)) for at in range(0, size - half, _STRIP)]
    for strip in below:
        second[strip, : strip.stop] -= between[strip] @ between[: strip.stop].T
    invert_factor(second)
    for strip in strips:  # -C^-1 B A^-1
        between[:, strip] = between[:, strip.start :] @ first[strip.start :, strip]
    for strip in reversed(below):
        between[strip] = -second[strip, : strip.stop] @ between[: strip.stop]
    matrix[:half, half:] = 0


def _error(
    weight: np.ndarray, codes: np.ndarray, scales: np.ndarray, curvature: np.ndarray
) -> float:
    """`tr(D^T H D)` of the rounding error D: the squared error of the outputs."""
    left = _left(weight, codes, scales)
    return float((left * (curvature @ left)).sum())


def _left(weight: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The rounding errors, `[in, out]`."""
    left = codes.copy()
    blocks = left.reshape(len(scales), -1, left.shape[1])  # a view
    blocks *= scales[:, None]
    return np.subtract(weight, left, out=left)


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
    left = _left(weight, codes, scales)
    moved = np.empty((block, weight.shape[1]), np.float32)
    for group, scale in enumerate(scales):
        start = group * block
        rows = slice(start, start + block)
        pull, inside = curvature[rows] @ left, curvature[rows, rows]
        for row in range(block):
            pull[row] -= inside[row, :row] @ moved[:row]
            now = codes[start + row]
            wanted = now * scale + pull[row] / inside[row, row]
            new = np.clip(np.round(wanted / scale), *_INT4)
            np.multiply(new - now, scale, out=moved[row])
            codes[start + row] = new
        left[rows] -= moved


def _compensate(
    work: np.ndarray, factor: np.ndarray, rounded: Callable[[int, np.ndarray], np.ndarray]
) -> None:
    """Round `work` `[in, out]` row by row; `rounded(row, values)` gives the row's rounded values.

    `work` is used up. By halves: when the first half is done, its errors reach the second in one
    product. Halves are powers of two, so that what comes before an int4 block is known in it.
    """
    _compensate_rows(work, factor, rounded, 0, len(work))


def _compensate_rows(
    work: np.ndarray,
    factor: np.ndarray,
    rounded: Callable[[int, np.ndarray], np.ndarray],
    start: int,
    end: int,
) -> None:
    if end - start <= _LEAF:
        for row in range(start, end):  # a row that is done holds its error
            work[row] -= factor[start:row, row] @ work[start:row]
            work[row] -= rounded(row, work[row])
            work[row] /= factor[row, row]
        return
    half = _LEAF
    while 2 * half < end - start:
        half *= 2
    middle = start + half
    _compensate_rows(work, factor, rounded, start, middle)
    for at in range(middle, end, _STRIP):
        rows = slice(at, min(at + _STRIP, end))
        work[rows] -= factor[start:middle, rows].T @ work[start:middle]
    _compensate_rows(work, factor, rounded, middle, end)
