"""int4 weights, symmetric, in blocks along the input channels (opset 21).

TensorRT takes blocks of 64 and 128 that divide the input channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from iq_export.formats.base import Codes, WeightFormat, register
from iq_export.formats.gptq import Curvature, compensate
from iq_export.graph.half import as_shipped

_LEAST, _LARGEST = -8, 7
# Shares of absmax / 7 tried as scale; 7/8 maps a largest value that is negative to -8.
_CLIPS = (1.0, 0.95, 0.9, 7 / 8, 0.84, 0.8, 0.75, 0.7, 0.65, 0.6)
# With compensation: rounds behind the first pass, and sweeps over all channels in each.
_ROUNDS, _SWEEPS = 2, 2
# Outputs solved at a time.
_CHUNK = 128
# A scale moves no further than this factor in one round.
_MOST_SCALE = 3.0


@dataclass(frozen=True)
class Int4Weights(WeightFormat):
    """Scales `[in / block, out]`. `blocks`: the sizes that may be taken, the first that divides."""

    blocks: tuple[int, ...]

    def round(self, weight: np.ndarray, importance: np.ndarray | None = None) -> Codes:
        """The scale of each block minimises `sum_c importance_c (w_c - q_c s)^2` over a grid."""
        block = self._block(weight)
        codes = np.empty(weight.shape, ml_dtypes.int4)
        scales = np.empty((len(weight) // block, weight.shape[1]), np.float32)
        cost = np.ones(len(weight), np.float32) if importance is None else importance
        for group in range(len(scales)):  # a group of all columns fits a cache
            rows = slice(group * block, (group + 1) * block)
            scales[group] = _scale(weight[rows], cost[rows])
            codes[rows] = np.clip(np.round(weight[rows] / scales[group]), _LEAST, _LARGEST)
        return codes, scales

    def compensate(self, weight: np.ndarray, curvature: Curvature) -> Codes:
        """The scales of a block are chosen when it is reached, for the rows as compensated so far.
        Then, in rounds, all scales at once by least squares for the codes, and every code once more
        for what the others leave (coordinate descent, QuantEase, arXiv 2309.01885). The best round
        is kept."""
        block, weight = self._block(weight), weight.astype(np.float32)
        work = weight.copy()
        importance = np.maximum(np.diag(curvature.hessian), 1e-12)
        codes = np.empty(weight.shape, np.float32)
        scales = np.empty((len(weight) // block, weight.shape[1]), np.float32)

        def rounded(row: int, values: np.ndarray) -> np.ndarray:
            group = row // block
            if row % block == 0:
                rows = slice(row, row + block)
                scales[group] = _scale(work[rows], importance[rows])
            codes[row] = np.clip(np.round(values / scales[group]), _LEAST, _LARGEST)
            return codes[row] * scales[group]

        compensate(work, curvature.factor, rounded)
        return _refined(weight, codes, scales, curvature.damped)

    def values(self, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        found = codes.astype(np.float32)
        groups = found.reshape(len(scales), -1, found.shape[1])  # a view
        groups *= scales[:, None]
        return found

    def attributes(self, in_features: int) -> dict[str, int]:
        block = self.block(in_features)
        assert block is not None
        return {"axis": 0, "block_size": block}

    def block(self, in_features: int) -> int | None:
        return next((size for size in self.blocks if in_features % size == 0), None)

    def misfit(self, in_features: int) -> str | None:
        if self.block(in_features) is not None:
            return None
        return (
            "divisible by neither 128 nor 64: TensorRT has no int4 blocks for that; use recipe w8a8"
        )

    def _block(self, weight: np.ndarray) -> int:
        block = self.block(len(weight))
        if block is None:
            raise ValueError(f"{len(weight)} channels have no blocks of {self.blocks}")
        return block


def _scale(weight: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """The scale of each column of one block `[block, out]`; `importance`: `[block]`."""
    cost = importance[:, None].astype(np.float32)
    top = np.abs(weight).max(axis=0)
    base = np.where(top > 0, top / np.float32(_LARGEST), np.float32(1)).astype(np.float32)
    best, best_error = base, np.full(base.shape, np.inf, np.float32)
    for clip in _CLIPS:
        scale = as_shipped(base * np.float32(clip))
        left = np.clip(np.round(weight / scale), _LEAST, _LARGEST)
        left *= scale
        np.subtract(weight, left, out=left)
        error = (cost * left**2).sum(axis=0)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best = np.where(better, scale, best)
    return best


def _refined(
    weight: np.ndarray, codes: np.ndarray, scales: np.ndarray, curvature: np.ndarray
) -> Codes:
    """The best of `codes` and of what the rounds behind it find; codes int4."""
    pull = curvature @ weight
    best = (_error(weight, codes, scales, curvature), codes, scales)
    for _ in range(_ROUNDS):
        scales = _fitted_scales(pull, codes, scales, curvature)
        codes = codes.copy()
        for _ in range(_SWEEPS):
            _descend(weight, codes, scales, curvature)
        error = _error(weight, codes, scales, curvature)
        if error < best[0]:
            best = (error, codes, scales)
    return best[1].astype(ml_dtypes.int4), best[2]


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
            new = np.clip(np.round(wanted / scale), _LEAST, _LARGEST)
            np.multiply(new - now, scale, out=moved[row])
            codes[start + row] = new
        left[rows] -= moved


def _weights(name: str, blocks: tuple[int, ...]) -> Int4Weights:
    return Int4Weights(name, ir.DataType.INT4, opset=21, compute_capability=80, blocks=blocks)


INT4_WEIGHTS = _weights("int4", (128, 64))
register(INT4_WEIGHTS, _weights("int4-64", (64,)))
