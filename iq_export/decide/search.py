"""Choose, per quantizer, the smoothing factors and the clipping factor by measured output error.

The squared error is taken on the output of the products behind the quantizer, over a bounded
sample of semantic tokens: an error in a channel that the weights ignore costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from iq_export.decisions import SmoothingChoice
from iq_export.formats.base import ActivationFormat
from iq_export.formats.rounding import W8A8, Rounding
from iq_export.passes.rotate import rotate_columns, rotate_rows

# Beyond this a factor would only move the outlier, and half-precision weights lose digits.
_MOST = 32.0
CLIPS = (1.0, 0.87, 0.76, 0.66, 0.57, 0.5, 0.43, 0.35, 0.28, 0.22, 0.17, 0.13)
_COARSE_CLIPS = CLIPS[::3]
_MOST_OUTPUTS = 256

Candidate = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

# name -> factors from (channel absmax, channel rms, weight row absmax); SmoothQuant's rule with
# strength 0.5, and the same on the root mean square, which one outlier token does not decide.
_CANDIDATES: dict[str, Candidate] = {
    "none": lambda top, rms, weight: np.ones_like(top),
    "absmax 0.5": lambda top, rms, weight: np.sqrt(top / weight),
    "rms 0.5": lambda top, rms, weight: np.sqrt(rms / weight),
    "rms 0.25": lambda top, rms, weight: rms**0.25,
}


def choose_smoothing(
    rows: np.ndarray,
    channel_absmax: np.ndarray,
    weights: Sequence[np.ndarray],
    *,
    rounding: Rounding = W8A8,
    rotation: int | None = None,
    side: int = 0,
) -> SmoothingChoice:
    """Try all candidates on sampled semantic `rows` `[tokens, in]`; `weights`: `[in, out]` each.

    The `side` loudest of the smoothed channels are left out of the range, as they will bypass the
    quantizer, then the rest is rotated in blocks of `rotation`. Where only weights are rounded,
    this is the idea of AWQ (arXiv 2306.00978), and every token counts by its relative error.
    """
    weight_rows = _row_absmax(weights)
    weight = _some_outputs(weights)
    activations = rounding.activations
    if activations is None:
        rows = unit_rows(rows)
    rms = np.sqrt((rows**2).mean(0))
    energy = float(((rows @ weight) ** 2).sum()) or 1.0
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
        if side:
            aside = loudest_channels(smooth, side)
            smooth[:, aside], scaled[aside] = 0, 0
        exact = smooth @ scaled
        if rotation:
            smooth, scaled = rotate_columns(smooth, rotation), rotate_rows(scaled, rotation)
        rounded = rounded_weight(scaled, rounding, smooth)
        if activations is None:
            error = float(((smooth @ rounded - exact) ** 2).sum())
        else:
            top = float(np.abs(smooth).max())
            steps = [activations.scale(top * clip) for clip in _COARSE_CLIPS]
            error = min(_output_error(smooth, step, activations, rounded, exact) for step in steps)
        results[name] = (error / energy, factors)
    best = min(results, key=lambda name: results[name][0])
    error, factors = results[best]
    return SmoothingChoice(best, factors, error, results["none"][0])


def loudest_channels(rows: np.ndarray, count: int) -> np.ndarray:
    """The `count` channels of `rows` `[tokens, in]` with the largest values, at most an eighth of
    all: int64, in order."""
    top = np.maximum(rows.max(0), -rows.min(0))
    return np.sort(np.argsort(-top, kind="stable")[: min(count, len(top) // 8)])


def choose_clip(
    rows: np.ndarray,
    absmax: float,
    weights: Sequence[np.ndarray],
    rounding: Rounding = W8A8,
    strength: float = 1.0,
) -> tuple[float, float]:
    """`(clip, relative output error)` of a per-tensor range `clip * absmax`.

    `clip` is that of least squared error to the power `strength`, 0 being no clipping at all.
    """
    weight = _some_outputs(weights)
    exact = rows @ weight
    energy = float((exact**2).sum()) or 1.0
    rounded = rounded_weight(weight, rounding, rows)
    found = rounding.activations
    assert found is not None
    errors = [_output_error(rows, found.scale(absmax * c), found, rounded, exact) for c in CLIPS]
    clip = float(CLIPS[int(np.argmin(errors))] ** strength)
    return clip, _output_error(rows, found.scale(absmax * clip), found, rounded, exact) / energy


def rounded_weight(weight: np.ndarray, rounding: Rounding, rows: np.ndarray) -> np.ndarray:
    """`weight` `[in, out]` rounded and dequantized; `rows` tell which channels count."""
    if rounding.weights is None:
        return weight
    return rounding.weights.rounded(weight, (rows**2).mean(0))


def _some_outputs(weights: Sequence[np.ndarray]) -> np.ndarray:
    """Evenly spaced columns of `[in, out]` side by side: they tell the error as well as all, and
    cost less time and memory."""
    step = max(1, sum(weight.shape[1] for weight in weights) // _MOST_OUTPUTS)
    chosen, first = [], 0
    for weight in weights:
        chosen.append(weight[:, first::step])
        first = (first - weight.shape[1]) % step
    return np.concatenate(chosen, axis=1)


def _row_absmax(weights: Sequence[np.ndarray]) -> np.ndarray:
    """Of each input channel, over all outputs; no copy of a weight."""
    tops = [np.maximum(weight.max(1), -weight.min(1)) for weight in weights]
    return np.maximum.reduce(tops)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1: a norm follows, so every token counts by its relative error, spikes too."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _normalised(factors: np.ndarray) -> np.ndarray:
    """Geometric mean 1, bounded: the tensor keeps its magnitude on the whole."""
    factors = factors / np.exp(np.log(factors).mean())
    return np.clip(factors, 1 / _MOST, _MOST).astype(np.float32)


def _output_error(
    rows: np.ndarray, scale: float, found: ActivationFormat, weight: np.ndarray, exact: np.ndarray
) -> float:
    if scale == 0:  # a tensor of zeros: nothing to round
        return float((exact**2).sum())
    return float(((found.rounded(rows, scale) @ weight - exact) ** 2).sum())
