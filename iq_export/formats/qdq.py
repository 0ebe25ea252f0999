"""How codes stand in a graph: QuantizeLinear, DequantizeLinear and their constants.

The type of the zero point is that of the codes; it is always 0. A scale follows the tensor that
it belongs to when the graph is halved.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from iq_export.graph.edit import constant, insert_behind, shared_constant


def zero_point(graph: ir.Graph, dtype: ir.DataType) -> ir.Value:
    return shared_constant(graph, f"iq.zero_point.{dtype.name.lower()}", np.array(0, dtype.numpy()))


def quantize(
    value: ir.Value, scale: ir.Value, zero: ir.Value, *, name: str, output: str
) -> ir.Node:
    """A node, not yet in the graph, that gives the codes called `output`."""
    node = ir.node("QuantizeLinear", [value, scale, zero], name=name)
    codes = node.outputs[0]
    codes.name, codes.shape = output, value.shape
    assert zero.dtype is not None
    codes.dtype = zero.dtype
    return node


def dequantize(
    codes: ir.Value, scale: ir.Value, zero: ir.Value, *, name: str, output: str
) -> ir.Node:
    """A node, not yet in the graph, that gives float32 values called `output`."""
    node = ir.node("DequantizeLinear", [codes, scale, zero], name=name)
    value = node.outputs[0]
    value.name, value.dtype, value.shape = output, ir.DataType.FLOAT, codes.shape
    return node


def activation_pair(
    graph: ir.Graph, value: ir.Value, scale: float, dtype: ir.DataType, *, name: str
) -> ir.Value:
    """Both right behind `value`; `name`: of the tensor that is quantized."""
    scale_value = constant(graph, f"{name}.scale", np.array(scale, np.float32))
    zero = zero_point(graph, dtype)
    codes = f"{name}.{dtype.name.lower()}"
    q = quantize(value, scale_value, zero, name=f"{name}/quantize", output=codes)
    dq = dequantize(
        q.outputs[0], scale_value, zero, name=f"{name}/dequantize", output=f"{name}.dequantized"
    )
    insert_behind(graph, value, [q, dq])
    return dq.outputs[0]


def dequantized_weight(
    graph: ir.Graph,
    weight: ir.Value,
    node: ir.Node,
    codes: ir.TensorProtocol,
    scales: np.ndarray,
    attributes: dict[str, int],
) -> ir.Value:
    """Constant codes of `weight` behind a DequantizeLinear, in front of the product `node`."""
    assert codes.name is not None
    stored = graph.initializers.get(codes.name)
    if stored is None:  # else another product has the same weight
        stored = ir.Value(
            name=codes.name,
            const_value=codes,
            type=ir.TensorType(codes.dtype),
            shape=ir.Shape(codes.shape.numpy()),
        )
        graph.register_initializer(stored)
        constant(graph, f"{weight.name}.scale", scales)
    scale_value = graph.initializers[f"{weight.name}.scale"]
    dq = ir.node(
        "DequantizeLinear", [stored, scale_value], attributes, name=f"{node.name}/dequantize_weight"
    )
    dq.outputs[0].name = f"{dq.name}/out"
    dq.outputs[0].dtype, dq.outputs[0].shape = ir.DataType.FLOAT, stored.shape
    graph.insert_before(node, dq)
    return dq.outputs[0]


def unsigned(graph: ir.Graph) -> None:
    """Let int8 codes of activations be uint8 around 128, which is the same numbers: where nothing
    but DequantizeLinear with the same zero point reads them, and the graph does not give them out.
    """
    for node in list(graph):
        if node.op_type != "QuantizeLinear" or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        codes, zero = node.outputs[0], node.inputs[2]
        readers = list(codes.consumers())
        if codes.is_graph_output() or any(
            x.op_type != "DequantizeLinear" or len(x.inputs) < 3 or x.inputs[2] is not zero
            for x in readers
        ):
            continue
        value = zero.const_value
        if (
            value is None
            or value.dtype != ir.DataType.INT8
            or value.size > 1
            or value.numpy().any()
        ):
            continue
        middle = shared_constant(graph, "iq.zero_point.uint8.middle", np.array(128, np.uint8))
        codes.dtype = ir.DataType.UINT8
        for each in (node, *readers):
            each.replace_input_with(2, middle)
