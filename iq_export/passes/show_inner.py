"""Give every mixture of experts one value by which its tokens are known as sinks.

A spike is born in front of an output product, and in a mixture there are several, each for other
tokens. What enters them is joined here: of each token, the sum of its experts' inputs, and beside
it those of the MLPs that all tokens pass. A spike in any of them is one there, since all others are
small. Detection reads this value as it reads a dense MLP's; where none does, what makes it is left
out when the graph is rounded.

Precondition: the traced graph. Postcondition: the same function; `find_sites` finds the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from iq_export.graph.edit import shared_constant
from iq_export.graph.interface import Role, name_of
from iq_export.graph.sites import Branch, Sites

Axis = Any  # a size, an axis by its name, or None


def show_inner(model: ir.Model, sites: Sites) -> bool:
    """Add the values of all mixtures in `sites`; returns whether there are any."""
    mixtures = [branch for branch in sites.branches if branch.is_mixture and not branch.inner]
    nodes = {node.name: node for node in model.graph}
    values = {value.name: value for node in model.graph for value in node.outputs}
    for branch in mixtures:
        _show(model.graph, nodes, values, branch)
    if mixtures:
        model.graph.sort()  # an MLP beside the experts may stand anywhere
    return bool(mixtures)


def _show(
    graph: ir.Graph,
    nodes: dict[str | None, ir.Node],
    values: dict[str | None, ir.Value],
    branch: Branch,
) -> None:
    experts = [route.output for route in branch.routes if route.rows is not None]
    beside = [values[route.output.input] for route in branch.routes if route.rows is None]
    join = _join(nodes[experts[0].node])
    back = join.outputs[0].consumers()[0]
    apart = back.outputs[0].consumers()[0]
    shape, like, width = apart.outputs[0].shape, values[branch.input], experts[0].in_features
    assert shape is not None and isinstance(shape[1], int) and like.shape is not None
    name = f"{join.name}/inner"

    def add(op: str, inputs: list[ir.Value], shape: Sequence[Axis], **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=f"{name}/{op}.{len(made)}")
        out = node.outputs[0]
        out.name, out.shape, out.dtype = f"{node.name}/out", ir.Shape(shape), inputs[0].dtype
        made.append(node)
        return out

    made: list[ir.Node] = []
    tokens = list(like.shape)[:2]
    rows = [values[output.input] for output in experts]
    found = add("Concat", rows, [1, None, width], axis=1)
    found = add("Gather", [found, back.inputs[1]], [1, None, width], axis=1)
    sizes = _ints(graph, -1, shape[1], width)
    found = add("Reshape", [found, sizes], [None, shape[1], width])
    found = add("ReduceSum", [found, _ints(graph, 1)], [None, width], keepdims=0)
    ids = next(value for value in graph.inputs if value.name == name_of(Role.IDS))
    axes = add("Shape", [ids], [2])
    whole = add("Concat", [axes, _ints(graph, width)], [3], axis=0)
    found = add("Reshape", [found, whole], [*tokens, width])
    if beside:
        total = width + sum(route.output.in_features for route in branch.routes if not route.rows)
        found = add("Concat", [found, *beside], [*tokens, total], axis=-1)
    graph.insert_before(join, made)


def _join(output: ir.Node) -> ir.Node:
    """The Concat of all experts' results, behind one of their output products."""
    node = output
    while node.op_type != "Concat":
        (node,) = node.outputs[0].consumers()
    return node


def _ints(graph: ir.Graph, *values: int) -> ir.Value:
    array = np.array(values, np.int64)
    return shared_constant(graph, f"ints.{'.'.join(map(str, values))}", array)
