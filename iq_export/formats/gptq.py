"""Round weights one input channel at a time and let later channels make up for the error.

GPTQ (arXiv 2210.17323): with `H = X^T X` over calibration rows, the rounding error of channel i is
spread over the channels after it so that `|X W - X Q|` stays least. The grid is the one that plain
rounding has (int8 per output channel, or int4 blocks), so nothing changes at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

# Share of the mean diagonal that is added to it: the paper's value.
_DAMPING = 0.01
# Channels rounded one behind the other before the next hear of it: a power of two, as a block is.
_LEAF = 16
# Sizes of matrices: that LAPACK factors, and that of a strip which bounds temporaries.
_SMALL, _STRIP = 128, 512
# Rows of calibration that are multiplied at once.
_BATCH = 2048


class Gram:
    """`X^T X` of rows that come window by window, float32 `[in, in]`; besides it a batch of rows,
    since large products are quicker."""

    def __init__(self, width: int) -> None:
        self._sum = np.zeros((width, width), np.float32)
        self._rows: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        """Count rows `[tokens, in]`."""
        self._rows.append(rows)
        if sum(map(len, self._rows)) >= _BATCH:
            self._count()

    def total(self) -> np.ndarray:
        self._count()
        return self._sum

    def _count(self) -> None:
        if self._rows:
            rows = np.concatenate(self._rows)
            self._sum += rows.T @ rows
            self._rows = []


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


def compensate(
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
