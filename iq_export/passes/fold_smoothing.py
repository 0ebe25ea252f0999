"""Fold smoothing factors into constants: norm weights, up-projection columns and weight rows.

Postcondition: the graph computes the same function, with smoothed activations in between, and has
not one node more.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from iq_export.graph.edit import own_constant
from iq_export.graph.sites import Sites
from iq_export.quant.smoothing import Smoothing


def fold_smoothing(model: ir.Model, sites: Sites, smoothing: Smoothing) -> bool:
    """Apply `smoothing`; returns whether the graph changed."""
    nodes = {node.name: node for node in model.graph}
    for block in sites.blocks:
        for branch in (block.attention, block.mlp):
            choice = smoothing.norms.get(branch.norm_output)
            if choice is not None:
                factors = choice.factors
                norm = nodes[branch.norm]
                for position in range(1, len(norm.inputs)):  # weight, and bias of a LayerNorm
                    if norm.inputs[position] is not None:
                        _rescale(model.graph, norm, position, lambda w, f=factors: w / f)
                for linear in branch.inputs:
                    _scale_rows(model.graph, nodes[linear.node], factors)
        path = smoothing.paths.get(block.mlp.output.input)
        if path is not None and block.mlp.linear_path is not None:
            factors = path.factors
            up = block.mlp.inputs[block.mlp.linear_path]
            _rescale(model.graph, nodes[up.node], 1, lambda w, f=factors: w / f)
            _scale_rows(model.graph, nodes[block.mlp.output.node], factors)
    return bool(smoothing.norms or smoothing.paths)


def _scale_rows(graph: ir.Graph, product: ir.Node, factors: np.ndarray) -> None:
    _rescale(graph, product, 1, lambda w: w * factors[:, None])


def _rescale(
    graph: ir.Graph, node: ir.Node, position: int, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Replace a constant of `node` by its changed self, computed when it is written or read."""
    value = own_constant(graph, node, position)
    old = value.const_value
    assert old is not None

    def compute() -> ir.Tensor:
        return ir.Tensor(change(old.numpy()).astype(old.dtype.numpy()), name=old.name)

    value.const_value = ir.LazyTensor(compute, dtype=old.dtype, shape=old.shape, name=old.name)
