"""Static per-tensor scales from calibration statistics (method.md step 8)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iq_export.calibrate.ranges import MagnitudeHistogram, TensorStats
from iq_export.errors import GraphError

INT8_MAX = 127
# Clipping factors tried: absmax x 1 ... 0.02, geometric.
_FACTORS = np.geomspace(1.0, 0.02, 96)


@dataclass(frozen=True)
class ActivationScale:
    """Symmetric int8 quantizer of one tensor: `q = clip(round(x / scale), -128, 127)`."""

    scale: float
    clip: float  # share of the semantic absmax that is kept, 1.0 = nothing is clipped


def absmax_scale(name: str, stats: TensorStats) -> ActivationScale:
    """Round-to-nearest calibration: the range of all tokens, sinks included, nothing clipped."""
    return ActivationScale(_positive(name, stats.absmax) / INT8_MAX, 1.0)


def mse_scale(name: str, stats: TensorStats, *, factors: np.ndarray = _FACTORS) -> ActivationScale:
    """The clipping factor with the least squared error over semantic tokens."""
    top = _positive(name, stats.absmax_semantic)
    errors = [_squared_error(stats.histogram, top * factor / INT8_MAX) for factor in factors]
    best = float(factors[int(np.argmin(errors))])
    return ActivationScale(top * best / INT8_MAX, best)


def _squared_error(histogram: MagnitudeHistogram, scale: float) -> float:
    used = np.flatnonzero(histogram.counts)
    values = histogram.centres()[used]
    rounded = np.minimum(np.round(values / scale), INT8_MAX) * scale
    return float(((values - rounded) ** 2 * histogram.counts[used]).sum())


def _positive(name: str, value: float) -> float:
    if value <= 0.0:
        raise GraphError(
            f"Tensor {name!r} is zero for every calibration token, so it has no range; use a "
            "calibration text that resembles the model's use."
        )
    return value
