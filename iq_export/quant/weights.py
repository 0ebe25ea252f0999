"""Weight rounding: int8 per output channel, int4 in blocks along the reduction axis.

Layouts are TensorRT's (Q/DQ rules): symmetric, zero point 0, int4 blocks of 64 or 128 that divide
the reduction axis.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from iq_export.errors import UsageError

INT4_BLOCKS = (128, 64)
# Rows rounded at a time: temporaries are small beside a weight.
_ROWS = 256
# Shares of absmax / 7 tried as scale; 7/8 maps a largest value that is negative to -8.
_INT4_CLIPS = (1.0, 0.95, 0.9, 7 / 8, 0.84, 0.8, 0.75, 0.7, 0.65, 0.6)


def int8_per_channel(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round `weight` `[in, out]` to int8 with one absmax scale per output: `(q, scale [out])`."""
    scale = int8_scales(weight)
    codes = np.empty(weight.shape, np.int8)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        codes[rows] = np.clip(np.round(weight[rows] / scale), -127, 127)
    return codes, scale


def int8_scales(weight: np.ndarray) -> np.ndarray:
    """float32 `[out]`; a column of zeros gets scale 1 so that it stays exactly zero.

    A column of tiny weights gets half's smallest normal number: it is off by 3e-5 at most.
    """
    top = np.maximum(weight.max(axis=0), -weight.min(axis=0)).astype(np.float32)
    scale = np.maximum(top / np.float32(127), np.finfo(np.float16).smallest_normal)
    return as_shipped(np.where(top > 0, scale, np.float32(1)))


def as_shipped(scale: np.ndarray) -> np.ndarray:
    """Scales ship in half: round the weights by the very scale that will multiply them."""
    limits = np.finfo(np.float16)
    normal = (scale >= limits.smallest_normal) & (scale <= limits.max)
    with np.errstate(over="ignore"):  # what half cannot hold is kept, and refused by to_half
        return np.where(normal, scale.astype(np.float16), scale).astype(np.float32)


def int4_block_size(name: str, in_features: int, most: int = 128) -> int:
    """128 where it divides the reduction axis and `most` allows it, else 64.

    Raises UsageError naming the weight if neither does (TensorRT accepts only these).
    """
    for size in INT4_BLOCKS:
        if size <= most and in_features % size == 0:
            return size
    raise UsageError(
        f"Weight {name!r} has {in_features} input features, divisible by neither 128 nor 64: "
        "TensorRT has no int4 blocks for it. Use recipe w8a8."
    )


def int4_blocked(
    weight: np.ndarray, block: int, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Round `weight` `[in, out]` to int4: `(q int4 [in, out], scale float32 [in / block, out])`.

    The scale of each block minimises `sum_c importance_c (w_c - q_c s)^2` over a grid of clips;
    `importance` `[in]` is the mean squared activation of each input channel (1 if None).
    """
    codes = np.empty(weight.shape, ml_dtypes.int4)
    scales = np.empty((len(weight) // block, weight.shape[1]), np.float32)
    cost = np.ones(len(weight), np.float32) if importance is None else importance
    for group in range(len(scales)):  # a group of all columns fits a cache
        rows = slice(group * block, (group + 1) * block)
        scales[group] = _int4_scale(weight[rows], cost[rows, None].astype(np.float32))
        codes[rows] = np.clip(np.round(weight[rows] / scales[group]), -8, 7)
    return codes, scales


def _int4_scale(weight: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """The scale of each column of one block `[block, out]`; `cost`: `[block, 1]`."""
    top = np.abs(weight).max(axis=0)
    base = np.where(top > 0, top / np.float32(7), np.float32(1)).astype(np.float32)
    best, best_error = base, np.full(base.shape, np.inf, np.float32)
    for clip in _INT4_CLIPS:
        scale = as_shipped(base * np.float32(clip))
        left = np.clip(np.round(weight / scale), -8, 7)
        left *= scale
        np.subtract(weight, left, out=left)
        error = (cost * left**2).sum(axis=0)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best = np.where(better, scale, best)
    return best


def int4_rounded(
    weight: np.ndarray, block: int, importance: np.ndarray | None = None
) -> np.ndarray:
    """`weight` after rounding to int4 and back, float32 `[in, out]`."""
    codes, scales = int4_blocked(weight, block, importance)
    values = codes.astype(np.float32)
    groups = values.reshape(len(scales), block, -1)  # a view
    groups *= scales[:, None]
    return values
