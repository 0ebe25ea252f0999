"""Which products of a traced graph have weights and belong to its blocks."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from iq_export.graph.interface import Role, name_of
from iq_export.graph.sites import LAYOUT_OPS

_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})


def block_products(model: ir.Model) -> set[str]:
    """Names of the nodes that multiply by a matrix of weights in the blocks: those that a residual
    connection passes by, but for those by which tokens choose their experts. What all of the ids'
    way to the logits goes through makes the logits, or the stream in front of the first block.

    Whether the block they stand in is understood does not matter: these are what a share is of.
    """
    found = {str(node.name) for node in model.graph if _is_weighted(node)}
    choices = [node.inputs[0] for node in model.graph if node.op_type in ("TopK", "ArgMax")]
    return {name for name in found if _passed_by(model.graph, name)} - _last(choices)


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


def _last(values: Sequence[ir.Value | None]) -> set[str]:
    """The weighted products from which `values` are reached with no other on the way."""
    found: set[str] = set()
    seen: set[ir.Value] = set()
    waiting = [value for value in values if value is not None]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is None or value in seen:
            continue
        seen.add(value)
        if _is_weighted(node):
            found.add(str(node.name))
        else:
            waiting += [operand for operand in node.inputs if operand is not None]
    return found
