"""Scales of an int8 KV cache: per tensor, clipped by squared error over semantic tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iq_export.calibrate.ranges import TensorStats

_INT8_MAX = 127
_CLIPS = tuple(np.geomspace(1.0, 0.25, 25).tolist())


@dataclass(frozen=True)
class CacheScale:
    """int8 scale of one layer's keys or values; `clip` the kept share of the semantic absmax,
    `error` the relative squared rounding error of the sampled rows."""

    scale: float
    clip: float
    error: float
    absmax: float


def cache_scale(stats: TensorStats) -> CacheScale:
    """The clip with the least squared error on the sampled semantic rows.

    Keys and values that are always zero get scale 1: nothing is rounded.
    """
    absmax = stats.absmax_semantic
    energy = float((stats.rows**2).sum())
    if not absmax or not energy:
        return CacheScale(1.0, 1.0, 0.0, absmax)
    errors = [_rounding_error(stats.rows, absmax * clip / _INT8_MAX) for clip in _CLIPS]
    best = int(np.argmin(errors))
    clip = _CLIPS[best]
    return CacheScale(clip * absmax / _INT8_MAX, clip, errors[best] / energy, absmax)


def _rounding_error(rows: np.ndarray, scale: float) -> float:
    rounded = np.clip(np.round(rows / np.float32(scale)), -128, 127) * np.float32(scale)
    return float(((rounded - rows) ** 2).sum())
