"""Per-channel smoothing factors that move activation outliers into the weights (SmoothQuant)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from iq_export.calibrate.ranges import TensorStats
from iq_export.graph.sites import Branch, Sites

# Beyond this a factor would only move the outlier, and half-precision weights lose digits.
_MOST = 32.0


@dataclass(frozen=True)
class Smoothing:
    """Factors by value name: `norms[norm output]` and `paths[down-projection input]`, float32
    `[features]`. The activation is divided by the factor, its consumers' weight rows multiplied.
    """

    norms: dict[str, np.ndarray]
    paths: dict[str, np.ndarray]


def find_smoothing(
    model: ir.Model, sites: Sites, stats: dict[str, TensorStats], *, strength: float
) -> Smoothing:
    """`s_c = absmax(x_c)^strength / absmax(w_c)^(1 - strength)` over semantic tokens, mean 1 in log.

    Norms feed several products, which share the factors; an up-projection passes its factors to the
    down-projection through the gate's elementwise product.
    """
    weights = model.graph.initializers
    norms: dict[str, np.ndarray] = {}
    paths: dict[str, np.ndarray] = {}
    for block in sites.blocks:
        for branch in (block.attention, block.mlp):
            if branch.norm_output in stats:
                rows = [_row_absmax(weights[linear.weight]) for linear in branch.inputs]
                norms[branch.norm_output] = _factors(
                    stats[branch.norm_output].channel_absmax, np.max(rows, axis=0), strength
                )
        if block.mlp.linear_path is not None:
            name = block.mlp.output.input
            rows = _row_absmax(weights[block.mlp.output.weight])
            paths[name] = _factors(stats[name].channel_absmax, rows, strength)
    return Smoothing(norms, paths)


def smoothable(model: ir.Model, branch: Branch) -> bool:
    """Whether only the branch's own products read the norm, so that its output may be rescaled."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    readers = {node.name for node in values[branch.norm_output].consumers()}
    return readers == {linear.node for linear in branch.inputs}


def _row_absmax(weight: ir.Value) -> np.ndarray:
    assert weight.const_value is not None
    return np.abs(weight.const_value.numpy()).max(axis=1)


def _factors(activation: np.ndarray, weight: np.ndarray, strength: float) -> np.ndarray:
    tiny = 1e-5
    factors = np.maximum(activation, tiny) ** strength / np.maximum(weight, tiny) ** (1 - strength)
    factors = factors / np.exp(np.log(factors).mean())
    return np.clip(factors, 1 / _MOST, _MOST).astype(np.float32)
