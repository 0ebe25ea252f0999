"""Convert a float32 graph to half precision, as a strongly typed graph states it.

- A float value is half if it depends on a weight, a float input or another half value. What is
  computed from integer inputs alone (rotary angles from positions) stays float32 and is cast where
  it meets half values: positions above 2048 are not representable in half.
- Scales of Q/DQ become half, as TensorRT wants them typed like their tensor. Each is checked: half
  is subnormal below 6.1e-5 and zero below 6e-8.
- Float32's lowest number, by which masks forbid, becomes half's.
- Weights are converted one at a time when they are written.

Precondition: float32 graph inputs and outputs. Postcondition: no float32 graph input or output.
Raises GraphError naming the tensor if a constant overflows half or a scale underflows.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from iq_export.errors import GraphError
from iq_export.graph.edit import constant, recompute
from iq_export.graph.half import HALF_MAX, HALF_SMALLEST_NORMAL
from iq_export.sinks.ops import DOMAIN

_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_FLOAT = ir.DataType.FLOAT
_HALF = ir.DataType.FLOAT16
_LOWEST = float(np.finfo(np.float32).min)


def to_half(model: ir.Model) -> bool:
    """Convert `model` in place; returns whether the graph changed."""
    graph = model.graph
    half: set[ir.Value] = set()
    wide: set[ir.Value] = set()  # float32 values that depend on integer inputs only
    for value in graph.inputs:
        if value.dtype == _FLOAT:
            value.dtype = _HALF
            half.add(value)
    casts: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        _convert_node(graph, node, half, wide, casts)
    for value in graph.outputs:
        if value in wide:
            raise GraphError(f"Output {value.name!r} does not depend on any weight.")
    return True


def _convert_node(
    graph: ir.Graph,
    node: ir.Node,
    half: set[ir.Value],
    wide: set[ir.Value],
    casts: dict[ir.Value, ir.Value],
) -> None:
    floats = [value for value in node.inputs if value is not None and _is_float(value, half, wide)]
    computed = [value for value in floats if not value.is_initializer()]
    is_half = any(value in half for value in floats) or _reads_weight(node, floats, computed)
    if is_half:
        _check_templates(node)
        for position, value in enumerate(node.inputs):
            if value is None:
                continue
            if value in wide:
                if value not in casts:
                    casts[value] = _cast(graph, value)
                node.replace_input_with(position, casts[value])
            elif value.is_initializer() and value.dtype == _FLOAT:
                if any(user in wide for user in _outputs_of_users(value)):
                    node.replace_input_with(position, _copy(graph, value))
                own = node.inputs[position]
                if own.dtype == _FLOAT:
                    _convert_constant(own, scale=_is_scale(node, position))
                half.add(own)
        if node.op_type == "Cast" and node.attributes["to"].as_int() == _FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(_HALF))
    elif node.op_type == "Cast" and node.attributes["to"].as_int() == _FLOAT:
        wide.update(node.outputs)
    for output in node.outputs:
        if is_half and node.op_type == "QuantizeLinear":
            output.dtype = node.inputs[2].dtype  # the zero point says which codes
        elif is_half and output.dtype in (_FLOAT, None) and not _gives_integer(node):
            output.dtype = _HALF
            half.add(output)
        elif _is_wide(node, output, floats, wide) and not _gives_integer(node):
            output.dtype = _FLOAT
            wide.add(output)


def _is_wide(node: ir.Node, output: ir.Value, floats: list[ir.Value], wide: set[ir.Value]) -> bool:
    """A float of wide values; or of constants alone, like one of two rotations, chosen."""
    computed = [value for value in floats if not value.is_initializer()]
    if computed:
        return all(value in wide for value in computed)
    if node.op_type == "ConstantOfShape":
        value = node.attributes.get("value")
        return value is None or value.as_tensor().dtype == _FLOAT
    return output.dtype == _FLOAT or (output.dtype is None and bool(floats))


def _is_float(value: ir.Value, half: set[ir.Value], wide: set[ir.Value]) -> bool:
    """By its type, or by what it was computed from where the file states no type."""
    return value in half or value in wide or value.dtype == _FLOAT


def _reads_weight(node: ir.Node, floats: list[ir.Value], computed: list[ir.Value]) -> bool:
    """A lookup or dequantization of constants alone: the first half values of the graph."""
    return bool(floats) and not computed and node.op_type in {"Gather", "Transpose", *_QDQ}


def _gives_integer(node: ir.Node) -> bool:
    return node.op_type in {
        "SinkDetect",
        "Shape",
        "ArgMin",
        "ArgMax",
        "Greater",
        "Less",
        "Equal",
        "QuantizeLinear",
        "GreaterOrEqual",
        "LessOrEqual",
        "IsNaN",
        "IsInf",
    } or (node.op_type == "Cast" and node.attributes["to"].as_int() not in (_FLOAT, _HALF))


def _is_scale(node: ir.Node, position: int) -> bool:
    return node.op_type in _QDQ and position == 1


def _outputs_of_users(value: ir.Value) -> list[ir.Value]:
    return [output for user, _ in value.uses() for output in user.outputs]


def _cast(graph: ir.Graph, value: ir.Value) -> ir.Value:
    node = ir.node("Cast", [value], {"to": int(_HALF)}, name=f"{value.name}/to_half")
    node.outputs[0].name = f"{value.name}.half"
    node.outputs[0].dtype, node.outputs[0].shape = _HALF, value.shape
    producer = value.producer()
    assert producer is not None
    graph.insert_after(producer, node)
    return node.outputs[0]


def _copy(graph: ir.Graph, value: ir.Value) -> ir.Value:
    name = f"{value.name}.half"
    if name in graph.initializers:
        return graph.initializers[name]
    return constant(graph, name, value.const_value.numpy())


def _convert_constant(value: ir.Value, *, scale: bool) -> None:
    if scale:
        _check_scale(str(value.name), value.const_value.numpy())

    def half(array: np.ndarray) -> np.ndarray:
        if array.size == 1 and array.item() <= _LOWEST:
            return np.full_like(array, -HALF_MAX, dtype=np.float16)
        top = float(np.abs(array).max(initial=0))
        if np.isinf(top):  # half has that too: what a router's mask writes
            top = float(np.abs(array[np.isfinite(array)]).max(initial=0))
        if top > HALF_MAX:
            raise GraphError(
                f"Constant {value.name!r} reaches {top:.4g}, beyond half precision's {HALF_MAX:g}; "
                "use --dtype fp32."
            )
        return array.astype(np.float16)

    recompute(value, half, dtype=_HALF)


def _check_templates(node: ir.Node) -> None:
    """Templates are written into half tensors; SinkDetect compares in float32."""
    if node.domain != DOMAIN or node.op_type == "SinkDetect":
        return
    top = max(map(abs, node.attributes["templates"].as_floats()), default=0.0)
    if top > HALF_MAX:
        raise GraphError(
            f"A template of {node.name!r} reaches {top:.4g}, beyond half precision's "
            f"{HALF_MAX:g}; use --dtype fp32."
        )


def _check_scale(name: str, scale: np.ndarray) -> None:
    low, high = float(scale.min()), float(scale.max())
    if low < HALF_SMALLEST_NORMAL:
        raise GraphError(
            f"Scale {name!r} is {low:.3g}, below half precision's smallest normal number "
            f"({HALF_SMALLEST_NORMAL:.3g}); it would lose digits or become zero. Use --dtype fp32."
        )
    if high > HALF_MAX:
        raise GraphError(f"Scale {name!r} is {high:.3g}, beyond half precision. Use --dtype fp32.")
