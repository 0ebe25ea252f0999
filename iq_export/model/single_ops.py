"""Make single ops of what a model's own code writes out: attention, and norms without a bias.

Models that do not take part in transformers' choice of attention add the mask to the scores. The
mask that a traced model is given is boolean, True where a token may be seen, and added it would
count as 0 or 1: what such code means is the mask itself.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir


def join_layer_norms(model: ir.Model) -> None:
    """Replace every `(x - mean) / sqrt(variance + epsilon) * weight` by a LayerNormalization."""
    from onnxscript.rewriter import pattern

    def written_out(op: Any, x: Any, weight: Any, epsilon: Any) -> Any:
        away = op.Sub(x, op.ReduceMean(x, [-1], keepdims=1))
        variance = op.ReduceMean(op.Pow(away, 2), [-1], keepdims=1)
        size = op.Reciprocal(op.Sqrt(op.Add(variance, epsilon)))
        return op.Mul(op.Mul(away, size), weight)

    def single(op: Any, x: Any, weight: Any, epsilon: Any) -> Any:
        value = float(epsilon.const_value.numpy().item())
        return op.LayerNormalization(x, weight, axis=-1, epsilon=value)

    def possible(context: Any, x: Any, weight: Any, epsilon: Any) -> bool:
        vector = weight.is_initializer() and len(weight.shape) == 1
        return vector and _number(epsilon) is not None and x.dtype == ir.DataType.FLOAT

    rule = pattern.RewriteRule(written_out, single, possible)
    pattern.RewriteRuleSet([rule], commute=True).apply_to_model(model)


def join_attention(graph: ir.Graph) -> None:
    """Replace every `softmax((q k^T) / c + mask) v` whose mask is a boolean one by an Attention;
    the scale may be applied before the mask or after it, or not at all."""
    for node in list(graph):
        if node.op_type == "Softmax":
            _join(graph, node)


def _join(graph: ir.Graph, softmax: ir.Node) -> None:
    readers = list(softmax.outputs[0].consumers())
    axis = softmax.attributes.get("axis")
    if (axis is not None and axis.as_int() not in (-1, 3)) or len(readers) != 1:
        return
    product = readers[0]
    if product.op_type != "MatMul" or product.inputs[0] is not softmax.outputs[0]:
        return
    scale, mask, node = 1.0, None, softmax.inputs[0].producer()
    while node is not None and node.op_type in ("Add", "Div", "Mul"):
        scores, other = node.inputs
        if node.op_type == "Add":
            flag = _boolean(other)
            if mask is not None or flag is None:
                return
            mask = flag
        else:
            factor = _number(other)
            if factor is None:
                return
            scale = scale / factor if node.op_type == "Div" else scale * factor
        node = scores.producer()
    if node is None or node.op_type != "MatMul" or mask is None:
        return
    turned = node.inputs[1].producer()
    if turned is None or turned.op_type != "Transpose":
        return
    if list(turned.attributes["perm"].as_ints()) != [0, 1, 3, 2]:
        return
    attention = ir.node(
        "Attention", [node.inputs[0], turned.inputs[0], product.inputs[1], mask], {"scale": scale}
    )
    old, new = product.outputs[0], attention.outputs[0]
    attention.metadata_props.update(product.metadata_props)
    new.type, new.shape = old.type, old.shape
    graph.insert_before(product, attention)
    old.replace_all_uses_with(new)


def _boolean(value: ir.Value) -> ir.Value | None:
    """The boolean value that `value` is as a number."""
    cast = value.producer()
    if cast is None or cast.op_type != "Cast" or cast.inputs[0].dtype != ir.DataType.BOOL:
        return None
    return cast.inputs[0]


def _number(value: ir.Value) -> float | None:
    constant = value.const_value
    return None if constant is None or constant.size != 1 else float(constant.numpy().item())
