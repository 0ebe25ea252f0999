"""Make the residual stream smaller by a power of two, exactly and at no cost at run time.

A norm gives the same rows for `x` and for `x / 2^n` with its epsilon divided by `4^n`. So the
embedding and whatever each branch adds to the stream may be divided by `2^n`, folded into constants
(a post-norm's weight, or the output product's), and every norm of the stream still gives the same
rows; one that stands in the stream itself gives them over `2^n`. It is what half precision needs
where tokens that must be computed exceed its largest number: a spike that is constant can be taken
out by sink ops, one that varies from token to token cannot.

Precondition: float32 graph, before quantization; every value of the stream is read by norms, by
the next residual Add and by products of blocks only. Postcondition: equal outputs, to the bit
unless a weight is subnormal; at most one node more (a Mul, where the embedding ends in no product
with a constant).
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from iq_export.errors import GraphError
from iq_export.graph.edit import constant, own_constant, recompute
from iq_export.graph.sites import LAYOUT_OPS, NORM_OPS, Branch, Sites, norm_epsilon, scaled_on


def scale_residual(model: ir.Model, sites: Sites, exponent: int) -> bool:
    """Divide the stream of `sites` by `2^exponent`; returns whether the graph changed.

    Raises GraphError with the node that keeps it from being exact.
    """
    if not exponent:
        return False
    graph = model.graph
    nodes = {node.name: node for node in graph}
    values = {value.name: value for node in graph for value in node.outputs}
    adds = dict.fromkeys(nodes[name] for branch in sites.branches for name in branch.adds)
    sums = [values[sites.embedding], *(add.outputs[0] for add in adds)]
    # A constant factor between blocks scales what it is given.
    factors = {value.producer() for value in map(scaled_on, sums)} - {*adds, sums[0].producer()}
    stream = [*sums, *(node.outputs[0] for node in factors)]
    bare = [branch for branch in sites.branches if branch.norm is None]
    products = [nodes[x.node] for branch in bare for x in (*branch.inputs, *branch.routers)]
    readers = {nodes[name] for branch in bare for name in branch.readers}
    passed = [values[branch.onward].producer() for branch in sites.branches]
    within = dict.fromkeys(node for node in passed if node.op_type in NORM_OPS)
    stream += (node.outputs[0] for node in within)
    _check_readers(graph, stream, {*adds, *factors, *readers})
    norms = {node for value in stream for node in value.consumers() if node.op_type in NORM_OPS}
    factor = float(2.0**-exponent)
    _scale_embedding(graph, stream[0], factor)
    for branch in sites.branches:
        for value in _tails(values, branch):
            _scale_tail(graph, value, factor)
    for norm in within:
        for position in range(1, len(norm.inputs)):  # weight, and bias of a LayerNorm
            _multiply(graph, norm, position, factor)
    for product in products:  # what reads the stream itself gets as much as before
        _multiply(graph, product, 1, 1 / factor)
    for norm in norms:
        epsilon = norm_epsilon(norm) * factor**2
        norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)
    return True


def _tails(values: dict[str | None, ir.Value], branch: Branch) -> list[ir.Value]:
    """What a branch adds, back from which the factor finds a constant; of a mixture's sum, what
    each of its routes adds."""
    if not branch.is_mixture or not branch.straight:
        return [values[branch.added]]
    found = []
    for output in branch.outputs:
        value = values[output.output]
        (reader,) = value.consumers()
        biased = reader.op_type == "Add" and any(v.is_initializer() for v in reader.inputs if v)
        found.append(reader.outputs[0] if biased else value)
    return found


def _check_readers(graph: ir.Graph, sums: list[ir.Value], known: set[ir.Node]) -> None:
    """A reader that is neither a norm nor `known` would see other numbers."""
    for value in sums:
        for node in value.consumers():
            if node.op_type not in NORM_OPS and node not in known:
                raise GraphError(
                    f"The residual value {value.name!r} exceeds half precision and cannot be "
                    f"scaled, since node {node.name!r} ({node.op_type}) reads it; use --dtype fp32."
                )
        if any(value is output for output in graph.outputs):
            raise GraphError(
                f"The residual value {value.name!r} exceeds half precision and cannot be scaled, "
                "since it is an output of the graph; use --dtype fp32."
            )


def _scale_embedding(graph: ir.Graph, value: ir.Value, factor: float) -> None:
    """In the constant that it is multiplied with, if any: its table is often the head's too."""
    node = value.producer()
    if node is not None and node.op_type == "Mul":
        for position, operand in enumerate(node.inputs):
            if operand.is_initializer():
                _multiply(graph, node, position, factor)
                return
    scale = constant(graph, "residual.scale", np.array(factor, np.float32))
    product = ir.node("Mul", [value, scale], name="residual/scale")
    new = product.outputs[0]
    new.name, new.dtype, new.shape = f"{value.name}.scaled", value.dtype, value.shape
    for consumer, position in list(value.uses()):
        if consumer is not product:
            consumer.replace_input_with(position, new)
    if node is None:
        graph.insert_before(graph[0], product)
    else:
        graph.insert_after(node, product)


def _scale_tail(graph: ir.Graph, value: ir.Value, factor: float) -> None:
    """Fold the factor into the constants behind what a branch adds, back to the first product."""
    node = value.producer()
    while node is not None and len(node.outputs[0].uses()) == 1:
        constants = [i for i, v in enumerate(node.inputs) if v is not None and v.is_initializer()]
        if node.op_type in NORM_OPS and constants:
            for position in constants:  # weight, and bias of a LayerNorm
                _multiply(graph, node, position, factor)
            return
        if node.op_type in ("Mul", "MatMul") and constants:
            _multiply(graph, node, constants[0], factor)
            return
        if node.op_type == "Add" and len(constants) == 1:  # a bias: it and what it is added to
            _multiply(graph, node, constants[0], factor)
            node = node.inputs[1 - constants[0]].producer()
        elif node.op_type in LAYOUT_OPS:
            node = node.inputs[0].producer()
        else:
            break
    name = value.name if node is None else f"{node.name} ({node.op_type})"
    raise GraphError(
        f"The residual stream exceeds half precision and cannot be scaled at {name}: no constant "
        "to fold the scale into, or it is read elsewhere too; use --dtype fp32."
    )


def _multiply(graph: ir.Graph, node: ir.Node, position: int, factor: float) -> None:
    recompute(own_constant(graph, node, position), partial(_product, factor=factor))


def _product(array: np.ndarray, factor: float) -> np.ndarray:
    return array * np.float32(factor)
