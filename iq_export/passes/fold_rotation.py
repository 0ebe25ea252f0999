"""Rotate the residual stream and the attention values by block Hadamard matrices, inside weights.

`norm(x) W = norm(x H) (H^T diag(g) W)` for an orthogonal H and an RMS norm with weight g: with the
stream rotated, no channel of a norm's output stands out, so a per-tensor int8 range wastes little
(QuaRot, arXiv 2404.00456: R1, and R2 per head between the value and the output product). All of it
is folded into constants, except two small products: after the embedding and before the last norm,
because the embedding is usually shared with the LM head.

Postcondition: the same function; names of norms' outputs, products and residual values are kept,
their values are those of the rotated basis. Down-projection inputs are not touched.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from iq_export.graph.edit import own_constant, recompute
from iq_export.graph.sites import Branch, Refusal, Sites, scaled_on
from iq_export.passes.rotate import rotate_columns, rotate_rows, rotated_value

# Larger blocks mix no better (measured on SmolLM2, 64 against all 576 channels) and cost more.
_LARGEST = 64
_SMALLEST = 8
_BETWEEN_HEADS = frozenset({"Transpose", "Reshape"})
_PASSING = frozenset({"Add", "Concat", "Identity", "Shape", *_BETWEEN_HEADS})


def block_size(width: int) -> int:
    """The largest power of two that divides `width`, at most 64."""
    return min(width & -width, _LARGEST)


def rotate_stream(model: ir.Model, sites: Sites) -> Refusal | None:
    """Rotate the residual stream (R1); returns why not, with nothing changed, if it cannot."""
    graph = model.graph
    nodes = {node.name: node for node in graph}
    values = {value.name: value for node in graph for value in node.outputs}
    refusal = _why_not(nodes, values, sites)
    if refusal is not None:
        return refusal
    block = block_size(sites.hidden)
    turn_columns = partial(rotate_columns, block=block)
    embedding = _start(values[sites.embedding])
    readers = list(embedding.uses())
    turned = rotated_value(graph, embedding, block, f"{sites.embedding}/rotate")
    for node, position in readers:
        node.replace_input_with(position, turned)
    for norm in sites.norms:
        gain = own_constant(graph, nodes[norm.node], 1)
        for linear in (*norm.linears, *norm.routers):
            weight = own_constant(graph, nodes[linear.node], 1)
            recompute(weight, partial(_absorb, gain=gain.const_value, block=block))
        recompute(gain, np.ones_like)
    for output in (output for branch in sites.branches for output in branch.outputs):
        recompute(own_constant(graph, nodes[output.node], 1), turn_columns)
        bias = _bias(values[output.output])
        if bias is not None:
            node, position = bias
            recompute(own_constant(graph, node, position), partial(_turn_vector, block=block))
    final = nodes[sites.final_norm]
    back = rotated_value(graph, final.inputs[0], block, f"{sites.final_norm}/rotate_back")
    final.replace_input_with(0, back)
    return None


def rotate_attention_values(model: ir.Model, sites: Sites) -> list[Refusal]:
    """Rotate every head's value and turn the output product's rows (R2); returns what was left."""
    nodes = {node.name: node for node in model.graph}
    refused = []
    for layer in sites.blocks:
        found = _value_path(nodes, layer.attention)
        if isinstance(found, str):
            refused.append(Refusal(layer.attention.output.node, found))
            continue
        product, head = found
        block = block_size(head)
        weight = own_constant(model.graph, product, 1)
        recompute(weight, partial(rotate_columns, block=block))
        bias = _bias(product.outputs[0])
        if bias is not None:
            recompute(
                own_constant(model.graph, *bias),
                partial(_turn_vector, block=block),
            )
        output = own_constant(model.graph, nodes[layer.attention.output.node], 1)
        recompute(output, partial(rotate_rows, block=block))
    return refused


def _absorb(weight: np.ndarray, gain: ir.TensorProtocol, block: int) -> np.ndarray:
    return rotate_rows(gain.numpy()[:, None] * weight, block)


def _turn_vector(vector: np.ndarray, block: int) -> np.ndarray:
    return rotate_columns(vector[None], block)[0]


def _why_not(
    nodes: dict[str, ir.Node], values: dict[str, ir.Value], sites: Sites
) -> Refusal | None:
    """The first thing on the stream that a rotation cannot pass."""
    if sites.refused:
        return sites.refused[0]
    if block_size(sites.hidden) < _SMALLEST:
        return Refusal(sites.embedding, f"no power of two divides its width {sites.hidden}")
    norms = {norm.node for norm in sites.norms} | {sites.final_norm}
    adds = dict.fromkeys(nodes[name] for branch in sites.branches for name in branch.adds)
    sums = [_start(values[sites.embedding]), *(add.outputs[0] for add in adds)]
    for value in map(scaled_on, sums):
        for node in value.consumers():
            if node.name not in norms and node not in adds:
                return Refusal(node.name, "it reads the residual stream and is no norm")
    for norm in sites.norms:
        node = nodes[norm.node]
        if node.op_type != "RMSNormalization":
            return Refusal(norm.node, f"{node.op_type} does not commute with a rotation")
        readers = {reader.name for reader in node.outputs[0].consumers()}
        if readers != norm.readers:
            return Refusal(norm.node, "others than the branch's products read its output")
    for branch in sites.branches:
        if branch.is_mixture:
            if not branch.straight:
                return Refusal(branch.outputs[0].node, "a norm or factors stand behind its experts")
            continue
        value = values[branch.output.output]
        bias = _bias(value)
        if bias is not None:
            value = bias[0].outputs[0]
        if {node for node in value.consumers()} != {nodes[branch.adds[0]]}:
            return Refusal(
                branch.output.node, "its output does not go straight into the residual addition"
            )
    return None


def _start(value: ir.Value) -> ir.Value:
    """The embedding, behind the factor by which the whole stream is scaled, if it has one."""
    consumers = list(value.consumers())
    if len(consumers) == 1 and consumers[0].op_type == "Mul":
        factors = [v for v in consumers[0].inputs if v.is_initializer()]
        if factors and factors[0].const_value.size == 1:
            return consumers[0].outputs[0]
    return value


def _bias(value: ir.Value) -> tuple[ir.Node, int] | None:
    """The Add of a constant that alone reads `value`, and the constant's position."""
    consumers = list(value.consumers())
    if len(consumers) != 1 or consumers[0].op_type != "Add":
        return None
    for position, operand in enumerate(consumers[0].inputs):
        if operand.is_initializer():
            return consumers[0], position
    return None


def _value_path(nodes: dict[str, ir.Node], branch: Branch) -> tuple[ir.Node, int] | str:
    """The value product of an attention branch and its head size, or why there is none.

    From the output product back through layout ops to the Attention node, from its value operand
    back through the cache and layout ops to a product.
    """
    attention = nodes[branch.output.node].inputs[0].producer()
    while attention is not None and attention.op_type in _BETWEEN_HEADS:
        attention = attention.inputs[0].producer()
    if attention is None or attention.op_type != "Attention":
        return "no Attention node stands before it"
    value = attention.inputs[2]
    shape = value.shape
    if shape is None or len(shape) != 4 or not isinstance(shape[3], int):
        return "the size of its attention heads is not known"
    if block_size(shape[3]) < _SMALLEST:
        return f"no power of two divides its head size {shape[3]}"
    products = {linear.node for linear in branch.inputs}
    node = value.producer()
    while node is not None and node.name not in products:
        operands = [v for v in node.inputs if v is not None and v.producer() is not None]
        if node.op_type in {"Concat", "Add", *_BETWEEN_HEADS} and operands:
            node = operands[0].producer()
        else:
            return f"node {node.name} ({node.op_type}) stands between it and the value product"
    if node is None:
        return "the value product was not found"
    if other := _other_reader(node.outputs[0], attention):
        return f"node {other.name} ({other.op_type}) reads its values too"
    return node, shape[3]


def _other_reader(value: ir.Value, attention: ir.Node) -> ir.Node | None:
    """What reads `value`, laid out anew or joined with a cache, beside `attention` and the graph's
    outputs: the attention of a layer that has no values of its own."""
    seen, todo = {attention}, list(value.consumers())
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op_type not in _PASSING:
            return node
        todo += [] if node.op_type == "Shape" else node.outputs[0].consumers()
    return None
