"""Reading and replacing operators that are written out as primitive ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

_SMALL = 64  # elements of a constant that is read


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The elements of a small initializer; None for anything else."""
    tensor = None if value is None or not value.is_initializer() else value.const_value
    return tensor.numpy() if tensor is not None and tensor.size <= _SMALL else None


def scalar(value: ir.Value | None) -> float | None:
    """The only element of a constant; None for anything else."""
    array = constant_of(value)
    return float(array.item()) if array is not None and array.size == 1 else None


def made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node that makes `value`, if it is an `op`."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None


def scaled(value: ir.Value) -> tuple[ir.Value, float] | None:
    """`(x, factor)` where `value` is x * factor or x / (1 / factor), with a constant factor."""
    node = value.producer()
    if node is None or node.op_type not in ("Mul", "Div"):
        return None
    left, right = node.inputs
    if (factor := scalar(right)) is not None and factor != 0:
        return left, factor if node.op_type == "Mul" else 1 / factor
    if node.op_type == "Mul" and (factor := scalar(left)) is not None:
        return right, factor
    return None


def insert(
    place: ir.Node,
    op: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Value:
    """The output of a new node in front of `place`, of the same module."""
    node = ir.node(op, inputs, attributes)
    node.metadata_props.update(place.metadata_props)
    node.outputs[0].dtype = dtype
    assert place.graph is not None
    place.graph.insert_before(place, node)
    return node.outputs[0]


def replace(node: ir.Node, made: ir.Value) -> None:
    """Let `made` stand for the only output of `node`, under its name, and remove `node`."""
    out, graph = node.outputs[0], node.graph
    assert graph is not None
    made.shape, made.type = made.shape or out.shape, out.type or made.type
    name = out.name
    ir.convenience.replace_all_uses_with(out, made, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    out.name, made.name = None, name


def is_plain(gemm: ir.Node) -> bool:
    """Whether a Gemm is a product and a bias, and no more."""
    defaults = (("transA", 0), ("alpha", 1.0), ("beta", 1.0))
    return all(
        name not in gemm.attributes or gemm.attributes[name].value == default
        for name, default in defaults
    )


def as_matmul(gemm: ir.Node) -> None:
    """Write a plain Gemm as a MatMul and the Add of its bias."""
    value, weight, *bias = gemm.inputs
    turned = gemm.attributes.get("transB")
    if turned is not None and turned.as_int():
        weight = insert(gemm, "Transpose", [weight], {"perm": [1, 0]})
    out = insert(gemm, "MatMul", [value, weight])
    if bias and bias[0] is not None:
        out = insert(gemm, "Add", [out, bias[0]])
    replace(gemm, out)
