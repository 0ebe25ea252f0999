"""Norms that are written out, in the spellings of exporters and of models' own code."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from iq_export.graph.edit import shared_constant
from iq_export.graph.sites import norm_epsilon
from iq_export.model.written_out import constant_of, insert, made_by, replace, scalar


def fuse_norms(model: ir.Model) -> None:
    """Replace each LayerNormalization and RMSNormalization, by onnxscript's rules."""
    from onnxscript.rewriter.rules.fusion._layer_norm import fuse_layer_normalization
    from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization

    _spell_norms(model.graph)
    fuse_layer_normalization(model)
    fuse_rms_normalization(model)
    _split_added(model.graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.ShapeInferencePass()(model)


def _split_added(graph: ir.Graph) -> None:
    """Take out again what onnxscript's rule takes for a bias, and is a residual addition."""
    for node in list(graph):
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if node.op_type == "LayerNormalization" and bias is not None and not bias.is_initializer():
            axis = node.attributes.get("axis")
            last = -1 if axis is None else axis.as_int()
            attributes = {"axis": last, "epsilon": norm_epsilon(node)}
            normed = insert(node, "LayerNormalization", list(node.inputs[:2]), attributes)
            replace(node, insert(node, "Add", [normed, bias]))


def _spell_norms(graph: ir.Graph) -> None:
    """Write norms as onnxscript's rules do: stated defaults, the last axis as -1, x ** 2,
    x * (1 / sqrt(v)), constants behind what is computed, a weight (of ones where there is none)."""
    for node in list(graph):
        if node.op_type == "ReduceMean":
            node.attributes.setdefault("keepdims", ir.AttrInt64("keepdims", 1))
            node.attributes.setdefault(
                "noop_with_empty_axes", ir.AttrInt64("noop_with_empty_axes", 0)
            )
            axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
            rank = len(node.inputs[0].shape) if node.inputs[0].shape is not None else 0
            if axes is not None and axes.tolist() == [rank - 1]:
                last = shared_constant(graph, "last_axis", np.array([-1]))
                node.replace_input_with(1, last)
            square = node.inputs[0].producer()
            if (
                square is not None
                and square.op_type == "Mul"
                and square.inputs[0] is square.inputs[1]
            ):
                two = shared_constant(graph, "two", np.array(2.0, np.float32))
                replace(square, insert(square, "Pow", [square.inputs[0], two]))
        elif node.op_type == "Pow" and scalar(node.inputs[1]) == -0.5 and _of_mean(node.inputs[0]):
            root = insert(node, "Sqrt", [node.inputs[0]])
            replace(node, insert(node, "Reciprocal", [root]))
        elif node.op_type == "Div" and _is_deviation(node.inputs[1]):
            inverse = insert(node, "Reciprocal", [node.inputs[1]])
            if scalar(node.inputs[0]) != 1:
                inverse = insert(node, "Mul", [node.inputs[0], inverse])
            replace(node, inverse)
    for node in graph:
        if node.op_type in ("Mul", "Add"):
            first, second = node.inputs
            if first.is_initializer() or made_by(first, "Reciprocal") is not None:
                node.replace_input_with(0, second)
                node.replace_input_with(1, first)
    for node in list(graph):
        width = node.outputs[0].shape[-1] if node.outputs[0].shape else None
        if _is_normed(node) and isinstance(width, int) and not _is_weighed(node.outputs[0]):
            ones = shared_constant(graph, f"ones_{width}", np.ones(width, np.float32))
            replace(node, insert(node, "Mul", [insert(node, "Mul", node.inputs), ones]))


def _is_normed(node: ir.Node) -> bool:
    """Whether it is x * (1 / sqrt(mean(x ** 2) + epsilon))."""
    inverse = made_by(node.inputs[1], "Reciprocal") if node.op_type == "Mul" else None
    if inverse is None or not _is_deviation(inverse.inputs[0]):
        return False
    added = inverse.inputs[0].producer().inputs[0].producer()
    mean = next(n for v in added.inputs if (n := made_by(v, "ReduceMean")) is not None)
    square = made_by(mean.inputs[0], "Pow")
    return square is not None and square.inputs[0] is node.inputs[0]


def _is_weighed(value: ir.Value) -> bool:
    """Whether a vector is all that it is multiplied with."""
    readers = [use.node for use in value.uses()]
    return bool(readers) and all(
        node.op_type == "Mul" and any(v.is_initializer() and v.shape.rank() for v in node.inputs)
        for node in readers
    )


def _is_deviation(value: ir.Value) -> bool:
    """The root of a mean and an epsilon."""
    root = value.producer()
    return root is not None and root.op_type == "Sqrt" and _of_mean(root.inputs[0])


def _of_mean(value: ir.Value) -> bool:
    add = value.producer()
    makers = [operand.producer() for operand in add.inputs] if add is not None else []
    return any(maker is not None and maker.op_type == "ReduceMean" for maker in makers)
