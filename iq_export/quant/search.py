"""Choose, per quantizer, the smoothing factors and the clipping factor by measured output error.

The squared error is taken on the output of the products behind the quantizer, over a bounded
sample of semantic tokens: an error in a channel that the weights ignore costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from iq_export.passes.rotate import rotate_columns, rotate_rows
from iq_export.quant.weights import int4_rounded, int8_per_channel

INT8_MAX = 127
# Beyond this a factor would only move the outlier, and half-precision weights lose digits.
_MOST = 32.0
CLIPS = (1.0, 0.87, 0.76, 0.66, 0.57, 0.5, 0.43, 0.35, 0.28, 0.22, 0.17, 0.13)
_COARSE_CLIPS = CLIPS[::3]

Candidate = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

# name -> factors from (channel absmax, channel rms, weight row absmax); SmoothQuant's rule with
# strength 0.5, and the same on the root mean square, which one outlier token does not decide.
_CANDIDATES: dict[str, Candidate] = {
    "none": lambda top, rms, weight: np.ones_like(top),
    "absmax 0.5": lambda top, rms, weight: np.sqrt(top / weight),
    "rms 0.5": lambda top, rms, weight: np.sqrt(rms / weight),
    "rms 0.25": lambda top, rms, weight: rms**0.25,
}


@dataclass(frozen=True)
class SmoothingChoice:
    """The best candidate's name, its factors float32 `[features]`, and its relative output error
    beside that of no smoothing."""

    name: str
    factors: np.ndarray
    error: float
    error_without: float


def choose_smoothing(
    rows: np.ndarray,
    channel_absmax: np.ndarray,
    weights: Sequence[np.ndarray],
    *,
    rotation: int | None = None,
    int4_block: int | None = None,
) -> SmoothingChoice:
    """Try all candidates on sampled semantic `rows` `[tokens, in]`; `weights`: `[in, out]` each.

    With `int4_block` the weights are rounded to int4 in such blocks and the activation is not
    (the idea of AWQ, arXiv 2306.00978), else both are rounded to int8.
    """
    weight = np.concatenate(list(weights), axis=1)
    if int4_block:
        rows = unit_rows(rows)
    rms = np.sqrt((rows**2).mean(0))
    weight_rows = np.abs(weight).max(1)
    exact = rows @ weight
    energy = float((exact**2).sum()) or 1.0
    results: dict[str, tuple[float, np.ndarray]] = {}
    for name, candidate in _CANDIDATES.items():
        factors = _normalised(
            candidate(
                np.maximum(channel_absmax, 1e-5),
                np.maximum(rms, 1e-6),
                np.maximum(weight_rows, 1e-5),
            )
        )
        smooth, scaled = rows / factors, weight * factors[:, None]
        if rotation:
            smooth, scaled = rotate_columns(smooth, rotation), rotate_rows(scaled, rotation)
        if int4_block:
            error = _int4_error(smooth, scaled, exact, int4_block)
        else:
            rounded = _rounded_weight(scaled)
            top = float(np.abs(smooth).max())
            steps = [top * clip / INT8_MAX for clip in _COARSE_CLIPS]
            error = min(_output_error(smooth, step, rounded, exact) for step in steps)
        results[name] = (error / energy, factors)
    best = min(results, key=lambda name: results[name][0])
    return SmoothingChoice(best, results[best][1], results[best][0], results["none"][0])


def choose_clip(
    rows: np.ndarray, absmax: float, weights: Sequence[np.ndarray]
) -> tuple[float, float]:
    """`(clip, relative output error)` of the best per-tensor int8 range `clip * absmax`."""
    weight = np.concatenate(list(weights), axis=1)
    exact = rows @ weight
    energy = float((exact**2).sum()) or 1.0
    rounded = _rounded_weight(weight)
    errors = [_output_error(rows, absmax * c / INT8_MAX, rounded, exact) for c in CLIPS]
    best = int(np.argmin(errors))
    return CLIPS[best], errors[best] / energy


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1: a norm follows, so every token counts by its relative error, spikes too."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _normalised(factors: np.ndarray) -> np.ndarray:
    """Geometric mean 1, bounded: the tensor keeps its magnitude on the whole."""
    factors = factors / np.exp(np.log(factors).mean())
    return np.clip(factors, 1 / _MOST, _MOST).astype(np.float32)


def _rounded_weight(weight: np.ndarray) -> np.ndarray:
    codes, scale = int8_per_channel(weight)
    return codes * scale


def _int4_error(rows: np.ndarray, weight: np.ndarray, exact: np.ndarray, block: int) -> float:
    rounded = int4_rounded(weight, block, (rows**2).mean(0))
    return float(((rows @ rounded - exact) ** 2).sum())


def _output_error(rows: np.ndarray, scale: float, weight: np.ndarray, exact: np.ndarray) -> float:
    if scale == 0:  # a tensor of zeros: nothing to round
        return float((exact**2).sum())
    rounded = np.clip(np.round(rows * np.float32(1 / scale)), -128, 127) * np.float32(scale)
    return float(((rounded @ weight - exact) ** 2).sum())
