"""Weight rounding: int8 per output channel, int4 in blocks along the reduction axis.

Layouts are TensorRT's (Q/DQ rules): symmetric, zero point 0, int4 blocks of 64 or 128 that divide
the reduction axis.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from iq_export.errors import UsageError

INT4_BLOCKS = (128, 64)
# Shares of absmax / 7 tried as scale; 7/8 maps a largest value that is negative to -8.
_INT4_CLIPS = np.append(np.linspace(1.05, 0.5, 23), 7 / 8)
# Share of the mean diagonal added to GPTQ's Hessian, the published value.
_DAMPING = 0.01


def int8_per_channel(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round `weight` `[in, out]` to int8 with one absmax scale per output: `(q, scale [out])`."""
    scale = int8_scales(weight)
    return np.clip(np.round(weight / scale), -127, 127).astype(np.int8), scale


def int8_scales(weight: np.ndarray) -> np.ndarray:
    """float32 `[out]`; a column of zeros gets scale 1 so that it stays exactly zero."""
    top = np.abs(weight).max(axis=0).astype(np.float32)
    return _as_shipped(np.where(top > 0, top / np.float32(127), np.float32(1)))


def _as_shipped(scale: np.ndarray) -> np.ndarray:
    """Scales ship in half: round the weights by the very scale that will multiply them."""
    limits = np.finfo(np.float16)
    normal = (scale >= limits.smallest_normal) & (scale <= limits.max)
    with np.errstate(over="ignore"):  # what half cannot hold is kept, and refused by to_half
        return np.where(normal, scale.astype(np.float16), scale).astype(np.float32)


def int4_block_size(name: str, in_features: int) -> int:
    """128 where it divides the reduction axis, else 64.

    Raises UsageError naming the weight if neither does (TensorRT accepts only these).
    """
    for size in INT4_BLOCKS:
        if in_features % size == 0:
            return size
    raise UsageError(
        f"Weight {name!r} has {in_features} input features, divisible by neither 128 nor 64: "
        "TensorRT has no int4 blocks for it. Use recipe w8a8."
    )


def int4_blocked(
    weight: np.ndarray, block: int, rows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Round `weight` `[in, out]` to int4: `(q int4 [in, out], scale float32 [in / block, out])`.

    With sampled inputs `rows` `[tokens, in]` each rounding error is compensated in the input
    channels not yet rounded, so that the error of `rows @ weight` is least (GPTQ, arXiv
    2210.17323); without, every weight is rounded by itself. Either way the scale of a block is the
    one of a grid of clips with the least squared error.
    """
    features, columns = weight.shape
    left = weight.astype(np.float32, copy=True)
    codes = np.zeros((features, columns), np.int8)
    scales = np.ones((features // block, columns), np.float32)
    factor, importance = _compensation(rows, features)
    for group, start in enumerate(range(0, features, block)):
        end = start + block
        scale = _block_scale(left[start:end], importance[start:end])
        scales[group] = scale
        errors = np.zeros((block, columns), np.float32)
        for i in range(start, end):
            codes[i] = np.clip(np.round(left[i] / scale), -8, 7)
            errors[i - start] = (left[i] - codes[i] * scale) / factor[i, i]
            left[i + 1 : end] -= np.outer(factor[i, i + 1 : end], errors[i - start])
        left[end:] -= factor[start:end, end:].T @ errors
    return codes.astype(ml_dtypes.int4), scales


def _compensation(rows: np.ndarray | None, features: int) -> tuple[np.ndarray, np.ndarray]:
    """The upper Cholesky factor of the damped inverse Hessian, and the Hessian's diagonal."""
    if rows is None:
        return np.eye(features, dtype=np.float32), np.ones(features, np.float32)
    hessian = rows.T.astype(np.float64) @ rows / rows.shape[0]
    diagonal = np.diag(hessian).copy()
    damping = _DAMPING * diagonal.mean() + 1e-12
    inverse = np.linalg.inv(hessian + damping * np.eye(features))
    factor = np.linalg.cholesky((inverse + inverse.T) / 2).T
    return factor.astype(np.float32), (diagonal + damping).astype(np.float32)


def _block_scale(block: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """The scale per column of one block `[block, out]` that minimises the weighted error."""
    top = np.abs(block).max(axis=0)
    base = np.where(top > 0, top / np.float32(7), np.float32(1)).astype(np.float32)
    best, best_error = base, np.full(base.shape, np.inf, np.float32)
    for clip in _INT4_CLIPS:
        scale = _as_shipped(base * np.float32(clip))
        rounded = np.clip(np.round(block / scale), -8, 7) * scale
        error = (importance[:, None] * (block - rounded) ** 2).sum(axis=0)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best = np.where(better, scale, best)
    return best
