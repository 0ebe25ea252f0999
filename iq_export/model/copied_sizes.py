"""Reshapes whose sizes are read from a Shape: constants, with 0 for what is copied.

Then shapes can be inferred, and an engine need not follow the arithmetic.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from iq_export.graph.edit import shared_constant
from iq_export.model.written_out import constant_of, made_by

# What gives a result of the same leading axes as its first input, if the others are constants.
_KEEPING = frozenset({
    "MatMul", "Add", "Sub", "Mul", "Div", "Gelu", "Relu", "Sigmoid", "Tanh", "Identity", "Cast",
    "LayerNormalization", "RMSNormalization", "Split",
})  # fmt: skip


def copy_sizes(graph: ir.Graph) -> None:
    """Settle each size that is read of a fixed axis, and the sizes of each Reshape of which all but
    one are fixed or its input's own at the same place; remove a Reshape that changes nothing.

    Shapes must have been inferred as far as they can be.
    """
    for node in list(graph):
        if node.op_type in ("Gather", "Slice"):
            _settle_size(graph, node)
        elif node.op_type == "Reshape":
            _settle_reshape(graph, node)


def _settle_size(graph: ir.Graph, node: ir.Node) -> None:
    """A Gather or Slice of a Shape that reads one fixed axis is a constant."""
    out = node.outputs[0]
    read = _axis_read(out)
    if read is None or out.shape is None or read[0].shape is None:
        return
    size = read[0].shape[read[1]]
    if isinstance(size, int):
        array = np.full(tuple(out.shape.numpy()), size, np.int64)
        known = shared_constant(graph, f"size_{size}_{array.ndim}", array)
        out.replace_all_uses_with(known)


def _settle_reshape(graph: ir.Graph, node: ir.Node) -> None:
    source, shape = node.inputs[0], node.inputs[0].shape
    stated = constant_of(node.inputs[1])
    allowed = node.attributes.get("allowzero")
    if allowed is not None and allowed.as_int() and stated is not None and 0 in stated:
        return  # an axis of none
    sizes = _sizes(node.inputs[1], source)
    if sizes is None:
        return
    node.attributes.pop("allowzero", None)
    open_places = [place for place, size in enumerate(sizes) if size in (None, -1)]
    if len(open_places) > 1:
        return
    fixed = [-1 if place in open_places else int(size or 0) for place, size in enumerate(sizes)]
    features = shape[-1] if shape is not None and len(shape) else None
    kept = fixed[: len(shape or ()) - 1]
    if isinstance(features, int) and not any(kept) and open_places:
        inner = [size for size in fixed[len(kept) :] if size != -1]
        if 0 not in inner:
            fixed[open_places[0]] = features // math.prod(inner)
    if not any(kept) and fixed[len(kept) :] == [features] and not node.outputs[0].is_graph_output():
        node.outputs[0].replace_all_uses_with(source)
        return
    name = "_".join(["sizes", *map(str, fixed)])
    node.replace_input_with(1, shared_constant(graph, name, np.array(fixed, np.int64)))


def _sizes(value: ir.Value, source: ir.Value) -> list[int | None] | None:
    """Each size: fixed (-1: what is left), 0 if it is that of `source` at this place, else None."""
    known = constant_of(value)
    if known is not None:
        return [int(size) for size in known]
    whole = made_by(value, "Shape")
    if whole is not None and not whole.attributes and (like := whole.inputs[0]).shape is not None:
        return [
            size if isinstance(size, int) else 0 if _same_axis(like, axis, source) else None
            for axis, size in enumerate(like.shape)
        ]
    concat = made_by(value, "Concat")
    sizes: list[int | None] = []
    for piece in concat.inputs if concat is not None else ():
        known = constant_of(piece)
        if known is not None:
            if 0 in known:
                return None
            sizes += [int(size) for size in known]
        elif piece.shape is None or list(piece.shape) != [1]:
            return None
        else:
            read = _axis_read(piece)
            copied = read is not None and read[1] == len(sizes) and _same_axis(*read, source)
            sizes.append(0 if copied else None)
    return sizes or None


def _axis_read(piece: ir.Value | None) -> tuple[ir.Value, int] | None:
    """`(value, axis)` where `piece` is the size of that axis."""
    while piece is not None and (node := piece.producer()) is not None:
        if node.op_type in ("Unsqueeze", "Squeeze", "Cast", "Reshape", "Identity"):
            piece = node.inputs[0]
            continue
        whole = made_by(node.inputs[0], "Shape") if node.inputs else None
        if node.op_type == "Shape":
            first, last = (node.attributes.get(name) for name in ("start", "end"))
            start = 0 if first is None else first.as_int()
            one = last is not None and last.as_int() == start + 1 and start >= 0
            return (node.inputs[0], start) if one else None
        if whole is None or whole.attributes.get("start") is not None:
            return None
        if node.op_type == "Gather":
            index = constant_of(node.inputs[1])
            if index is not None and index.size == 1 and index.item() >= 0:
                return whole.inputs[0], int(index.item())
        if node.op_type == "Slice":
            begin, stop = (constant_of(value) for value in node.inputs[1:3])
            if begin is not None and stop is not None and 0 <= begin.item() == stop.item() - 1:
                return whole.inputs[0], int(begin.item())
        return None
    return None


def _same_axis(one: ir.Value, axis: int, other: ir.Value) -> bool:
    """Whether both have the same size there: they are one value, or the axis is in front of the
    last and both are made of one value, token by token."""
    if one is other:
        return True
    before_last = one.shape is not None and axis < len(one.shape) - 1
    return before_last and _origin(one) is _origin(other)


def _origin(value: ir.Value) -> ir.Value:
    while (node := value.producer()) is not None and node.op_type in _KEEPING:
        computed = [v for v in node.inputs if v is not None and not v.is_initializer()]
        constant = [v for v in node.inputs if v is not None and v.is_initializer()]
        limit = 2 if node.op_type == "MatMul" else 1
        if len(computed) != 1 or any(len(v.shape or ()) > limit for v in constant):
            return value
        if node.op_type == "MatMul" and node.inputs[0] is not computed[0]:
            return value
        if node.op_type == "Split" and not _is_last(node.attributes.get("axis"), computed[0]):
            return value
        value = computed[0]
    return value


def _is_last(axis: ir.Attr | None, value: ir.Value) -> bool:
    return axis is not None and axis.as_int() in (-1, len(value.shape or ()) - 1)
