"""Give what code makes of latents the form that products and attention have elsewhere.

Latents stand in a cache as one head, `[batch, 1, seq, features]`, and products read them there; a
key is written into two ends of an empty tensor. Here such products read `[batch, seq, features]`,
and the key is a Concat.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from iq_export.model.written_out import constant_of, insert, made_by


def settle_latents(graph: ir.Graph) -> None:
    """Rewrite `graph` in place; what it computes stays. Constants must be initializers."""
    for node in list(graph):
        if node.op_type == "Slice":
            _take_part(node)
        elif node.op_type == "MatMul":
            _read_rows(node)
    for node in list(graph):
        if node.op_type == "Reshape" and _makes_one_head(node):
            axis = graph.initializers.get(_AXIS)
            if axis is None:
                tensor = ir.tensor(np.array([1], np.int64), name=_AXIS)
                axis = ir.Value(name=_AXIS, const_value=tensor, type=ir.TensorType(tensor.dtype))
                axis.shape = ir.Shape([1])
                graph.register_initializer(axis)
            out = insert(node, "Unsqueeze", [node.inputs[0], axis])
            out.shape = node.outputs[0].shape
            node.outputs[0].replace_all_uses_with(out)


_AXIS = "one_head_axis"


def _take_part(node: ir.Node) -> None:
    """A Slice that takes back what a Concat joined reads it from there."""
    joined = made_by(node.inputs[0], "Concat")
    starts, ends, axes = (constant_of(value) for value in (*node.inputs[1:4], None)[:3])
    steps = constant_of(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
    given = [array for array in (starts, ends, axes, steps) if array is not None]
    rank = len(node.inputs[0].shape or ())
    if joined is None or not rank or len(given) < 4 or any(array.size != 1 for array in given):
        return
    begin, end, along, step = (int(array.item()) for array in given)
    axis = joined.attributes["axis"].as_int()
    if (along - axis) % rank or step != 1:
        return
    place = 0
    for operand in joined.inputs:
        size = None if operand is None or operand.shape is None else operand.shape[axis]
        if operand is None or not isinstance(size, int):
            return
        if (begin, end) == (place, place + size):
            node.outputs[0].replace_all_uses_with(operand)
            return
        place += size


def _makes_one_head(node: ir.Node) -> bool:
    """Whether it is a Reshape `[a, b, c] -> [a, 1, b, c]`."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if before is None or after is None or len(before) != 3 or len(after) != 4:
        return False
    return after[1] == 1 and [str(after[axis]) for axis in (0, 2, 3)] == [str(x) for x in before]


def _read_rows(node: ir.Node) -> None:
    """A product of one head reads the rows of which that was made, if only Reshapes follow it."""
    made, weight, out = made_by(node.inputs[0], "Reshape"), node.inputs[1], node.outputs[0]
    if made is None or not _makes_one_head(made) or weight is None or len(weight.shape or ()) != 2:
        return
    readers = out.consumers()
    if out.is_graph_output() or any(reader.op_type != "Reshape" for reader in readers):
        return
    if any(_has_zero(reader) for reader in readers):
        return
    node.replace_input_with(0, made.inputs[0])
    assert made.inputs[0].shape is not None and out.shape is not None
    out.shape = ir.Shape([*made.inputs[0].shape[:2], out.shape[3]])


def _has_zero(node: ir.Node) -> bool:
    """Whether a Reshape takes sizes of the axes of its input, or may."""
    sizes = node.inputs[1]
    if sizes is None or sizes.is_initializer():
        known = constant_of(sizes)
        return known is None or 0 in known
    return False  # computed, from sizes that are none
