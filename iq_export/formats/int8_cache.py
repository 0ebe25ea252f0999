"""An int8 KV cache: per tensor, clipped by squared error over semantic tokens."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from iq_export.formats.base import CacheFormat, CacheScale, register

_TYPE = np.iinfo(np.int8)
_CLIPS = tuple(np.geomspace(1.0, 0.25, 25).tolist())


class Int8Cache(CacheFormat):
    """The clip with the least squared error on the sampled rows."""

    def scale(self, rows: np.ndarray, absmax: float) -> CacheScale:
        """Keys and values that are always zero get scale 1: nothing is rounded."""
        energy = float((rows**2).sum())
        if not absmax or not energy:
            return CacheScale(1.0, 1.0, 0.0, absmax)
        errors = [_rounding_error(rows, absmax * clip / _TYPE.max) for clip in _CLIPS]
        best = int(np.argmin(errors))
        clip = _CLIPS[best]
        return CacheScale(clip * absmax / _TYPE.max, clip, errors[best] / energy, absmax)


def _rounding_error(rows: np.ndarray, scale: float) -> float:
    codes = np.clip(np.round(rows / np.float32(scale)), _TYPE.min, _TYPE.max)
    return float(((codes * np.float32(scale) - rows) ** 2).sum())


INT8_CACHE = Int8Cache("int8", ir.DataType.INT8, opset=13, compute_capability=0)
register(INT8_CACHE)
