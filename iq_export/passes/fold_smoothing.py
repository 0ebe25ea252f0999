"""Fold smoothing factors into constants: norm weights, up-projection columns and weight rows.

Postcondition: the graph computes the same function, with smoothed activations in between, and has
not one node more.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from iq_export.decisions import Smoothing
from iq_export.graph.edit import own_constant, recompute
from iq_export.graph.sites import Sites


def fold_smoothing(model: ir.Model, sites: Sites, smoothing: Smoothing) -> bool:
    """Apply `smoothing`; returns whether the graph changed."""
    graph = model.graph
    nodes = {node.name: node for node in graph}
    for norm in (*sites.norms, *sites.latent_norms):
        choice = smoothing.norms.get(norm.output)
        if choice is not None:
            node = nodes[norm.node]
            for position in range(1, len(node.inputs)):  # weight, and bias of a LayerNorm
                if node.inputs[position] is not None:
                    _divide(graph, node, position, choice.factors)
            for linear in (*norm.linears, *norm.routers):
                _multiply_rows(graph, nodes[linear.node], choice.factors)
    for route in (route for block in sites.blocks for route in block.mlp.routes):
        path = smoothing.paths.get(route.output.input)
        if path is not None and route.linear_path is not None:
            up = route.inputs[route.linear_path]
            _divide(graph, nodes[up.node], 1, path.factors)
            _multiply_rows(graph, nodes[route.output.node], path.factors)
    return bool(smoothing.norms or smoothing.paths)


def _divide(graph: ir.Graph, node: ir.Node, position: int, factors: np.ndarray) -> None:
    """Divide the last axis of a constant of `node`."""
    recompute(own_constant(graph, node, position), partial(_quotient, factors=factors))


def _quotient(array: np.ndarray, factors: np.ndarray) -> np.ndarray:
    return array / factors


def _multiply_rows(graph: ir.Graph, product: ir.Node, factors: np.ndarray) -> None:
    recompute(own_constant(graph, product, 1), lambda weight: weight * factors[:, None])
