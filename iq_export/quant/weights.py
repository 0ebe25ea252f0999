"""Weight rounding: int8 per output channel, int4 in blocks along the reduction axis.

Layouts are TensorRT's (Q/DQ rules): symmetric, zero point 0, int4 blocks of 64 or 128 that divide
the reduction axis.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from iq_export.errors import UsageError

INT4_BLOCKS = (128, 64)
_INT4_CLIPS = np.linspace(1.0, 0.5, 21)


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
    return scale.astype(np.float16).astype(np.float32) if scale.min() > 1e-7 else scale


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
    weight: np.ndarray, block: int, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Round `weight` `[in, out]` to int4: `(q int4 [in, out], scale float32 [in / block, out])`.

    The scale of each block minimises `sum_c importance_c (w_c - q_c s)^2` over a grid of clips;
    `importance` `[in]` is the mean squared activation of each input channel (1 if None).
    """
    rows, columns = weight.shape
    blocks = weight.reshape(rows // block, block, columns)
    top = np.abs(blocks).max(axis=1)
    # The signed range reaches -8: map the largest magnitude there if it is negative.
    lowest = blocks.min(axis=1)
    reach = np.where(-lowest >= top, np.float32(8), np.float32(7))
    base = np.where(top > 0, top / reach, np.float32(1)).astype(np.float32)
    weights = np.ones(rows, np.float32) if importance is None else importance
    cost = weights.reshape(rows // block, block, 1).astype(np.float32)
    best_error = np.full(base.shape, np.inf, np.float32)
    best = base
    for full in (np.float32(1), np.float32(8) / 7):
        for clip in _INT4_CLIPS:
            scale = _as_shipped(base * np.float32(clip) * full)
            error = (cost * (blocks - _round4(blocks, scale)) ** 2).sum(axis=1)
            better = error < best_error
            best_error = np.where(better, error, best_error)
            best = np.where(better, scale, best)
    codes = np.clip(np.round(blocks / best[:, None]), -8, 7)
    return codes.reshape(rows, columns).astype(ml_dtypes.int4), best


def _round4(blocks: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.clip(np.round(blocks / scale[:, None]), -8, 7) * scale[:, None]
