"""Which products of a traced graph have weights and belong to its blocks."""

from __future__ import annotations

import onnx_ir as ir

from iq_export.graph.interface import Role, name_of
from iq_export.graph.sites import LAYOUT_OPS

_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})


def block_products(model: ir.Model) -> set[str]:
    """Names of the nodes that multiply by a matrix of weights in the blocks: those that a residual
    connection passes by. What all of the ids' way to the logits goes through makes the logits, or
    the stream in front of the first block.

    Whether the block they stand in is understood does not matter: these are what a share is of.
    """
    found = {str(node.name) for node in model.graph if _is_weighted(node)}
    return {name for name in found if _passed_by(model.graph, name)}


def _is_weighted(node: ir.Node) -> bool:
    return node.op_type in _PRODUCTS and any(_is_matrix(value) for value in node.inputs)


def _is_matrix(value: ir.Value | None) -> bool:
    """Whether it is a constant of two axes or more, or one that is only laid out anew."""
    if value is None:
        return False
    node = value.producer()
    if node is not None:
        return node.op_type in LAYOUT_OPS and _is_matrix(node.inputs[0])
    return value.is_initializer() and len(value.shape or ()) > 1


def _passed_by(graph: ir.Graph, product: str) -> bool:
    """Whether the ids reach the logits without it; their number is no way."""
    reached = {name_of(Role.IDS)}
    for node in graph:
        read = {value.name for value in node.inputs if value is not None}
        if node.name != product and node.op_type != "Shape" and read & reached:
            reached |= {str(value.name) for value in node.outputs}
    return graph.outputs[0].name in reached
