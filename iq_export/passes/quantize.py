"""Place QuantizeLinear/DequantizeLinear pairs (placement as TensorRT fuses it).

- One pair per activation tensor, shared by all products that read it, straight in front of them;
  SinkClampInsert stands before it, never between DequantizeLinear and MatMul.
- int8 weights become constants behind a per-output-channel DequantizeLinear, int4 weights behind a
  blocked one (opset >= 21).
- Norms, attention products, activations functions, embeddings and the LM head are not touched.

Precondition: float32 graph, scales from the plan. Postcondition: every product named in the plan
reads only DequantizeLinear outputs (activations too, if they have scales).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from iq_export.graph.edit import constant, shared_constant
from iq_export.graph.sites import Linear
from iq_export.quant.weights import int4_blocked, int8_per_channel, int8_scales

FLOAT_BITS = 32
INT8_MAX = 127
_ZERO_POINT = "iq.zero_point.int8"


@dataclass(frozen=True)
class QuantizePlan:
    """What to quantize. `activations`: value name -> scale. `weight_bits`: 8, 4 or 32 (as it is).

    `blocks`: weight name -> int4 block size. `importance`: weight name -> float32 `[in]`.
    `activation_max`: the largest code of an activation; less than int8's is for study, with a Clip.
    `codes`: weight name -> codes and scales, where they are rounded already.
    """

    linears: tuple[Linear, ...]
    weight_bits: int
    activations: Mapping[str, float] = field(default_factory=dict)
    blocks: Mapping[str, int] = field(default_factory=dict)
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)
    activation_max: int = INT8_MAX
    codes: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


def quantize(model: ir.Model, plan: QuantizePlan) -> bool:
    """Rewrite all products of `plan`; returns whether the graph changed."""
    graph = model.graph
    nodes = {node.name: node for node in graph}
    dequantized: dict[str, ir.Value] = {}
    for linear in plan.linears:
        node = nodes[linear.node]
        value = node.inputs[0]
        assert value is not None and value.name is not None
        if value.name in plan.activations:
            if value.name not in dequantized:
                scale = plan.activations[value.name]
                dequantized[value.name] = _activation_pair(graph, value, scale, plan.activation_max)
            node.replace_input_with(0, dequantized[value.name])
        if plan.weight_bits == FLOAT_BITS:
            continue
        weight = node.inputs[1]
        assert weight is not None
        block = plan.blocks.get(linear.weight)
        if linear.weight in plan.codes:
            new = _given_weight(graph, weight, node, block, plan.codes, linear.weight)
        elif plan.weight_bits == 8:
            new = _int8_weight(graph, weight, node)
        else:
            assert block is not None
            new = _int4_weight(graph, weight, node, block, plan.importance.get(linear.weight))
        node.replace_input_with(1, new)
    RemoveUnusedNodesPass()(model)  # the float weights
    return bool(plan.linears)


def _activation_pair(graph: ir.Graph, value: ir.Value, scale: float, most: int) -> ir.Value:
    name = str(value.name)
    if most < INT8_MAX:
        value = _clipped(graph, value, scale, most)
    scale_value = constant(graph, f"{name}.scale", np.array(scale, np.float32))
    zero = shared_constant(graph, _ZERO_POINT, np.array(0, np.int8))
    q = ir.node("QuantizeLinear", [value, scale_value, zero], name=f"{name}/quantize")
    dq = ir.node("DequantizeLinear", [q.outputs[0], scale_value, zero], name=f"{name}/dequantize")
    q.outputs[0].name, dq.outputs[0].name = f"{name}.int8", f"{name}.dequantized"
    q.outputs[0].dtype, q.outputs[0].shape = ir.DataType.INT8, value.shape
    dq.outputs[0].dtype, dq.outputs[0].shape = ir.DataType.FLOAT, value.shape
    producer = value.producer()
    assert producer is not None
    graph.insert_after(producer, [q, dq])
    return dq.outputs[0]


def _clipped(graph: ir.Graph, value: ir.Value, scale: float, most: int) -> ir.Value:
    """`value` bounded so that int8 codes stay within `[-most - 1, most]`."""
    low = constant(graph, f"{value.name}.low", np.array(-(most + 1) * scale, np.float32))
    high = constant(graph, f"{value.name}.high", np.array(most * scale, np.float32))
    clip = ir.node("Clip", [value, low, high], name=f"{value.name}/clip")
    clip.outputs[0].name = f"{value.name}.clipped"
    clip.outputs[0].dtype, clip.outputs[0].shape = value.dtype, value.shape
    producer = value.producer()
    assert producer is not None
    graph.insert_after(producer, clip)
    return clip.outputs[0]


def _int8_weight(graph: ir.Graph, weight: ir.Value, node: ir.Node) -> ir.Value:
    source = weight.const_value
    codes = ir.LazyTensor(
        lambda: ir.Tensor(int8_per_channel(source.numpy())[0]),
        dtype=ir.DataType.INT8,
        shape=ir.Shape(source.shape.numpy()),
        name=f"{weight.name}.int8",
    )
    scales = int8_scales(source.numpy())
    return _weight_dequantize(graph, weight, node, codes, scales, {"axis": 1})


def _given_weight(
    graph: ir.Graph,
    weight: ir.Value,
    node: ir.Node,
    block: int | None,
    codes: Mapping[str, tuple[np.ndarray, np.ndarray]],
    key: str,
) -> ir.Value:
    kind = ir.DataType.INT8 if block is None else ir.DataType.INT4
    tensor = ir.LazyTensor(
        lambda: ir.Tensor(codes[key][0], dtype=kind),
        dtype=kind,
        shape=ir.Shape(weight.const_value.shape.numpy()),
        name=f"{weight.name}.{kind.name.lower()}",
    )
    attributes = {"axis": 1} if block is None else {"axis": 0, "block_size": block}
    return _weight_dequantize(graph, weight, node, tensor, codes[key][1], attributes)


def _int4_weight(
    graph: ir.Graph, weight: ir.Value, node: ir.Node, block: int, importance: np.ndarray | None
) -> ir.Value:
    source = weight.const_value
    codes, scales = int4_blocked(source.numpy(), block, importance)
    tensor = ir.Tensor(codes, dtype=ir.DataType.INT4, name=f"{weight.name}.int4")
    attributes = {"axis": 0, "block_size": block}
    return _weight_dequantize(graph, weight, node, tensor, scales, attributes)


def _weight_dequantize(
    graph: ir.Graph,
    weight: ir.Value,
    node: ir.Node,
    codes: ir.TensorProtocol,
    scales: np.ndarray,
    attributes: dict[str, int],
) -> ir.Value:
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
