"""Undo what code does to run its products on `[batch * seq, features]`.

Some models flatten the tokens in front of a product, or of a whole MLP with its norm and its
residual addition, and restore the axes behind it. A product is then a Gemm between two Reshapes,
and the residual stream changes its shape within a block. What stands between works row by row: the
Reshapes go, and a Gemm becomes a MatMul and the Add of its bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from iq_export.graph.sites import NORM_OPS
from iq_export.model.written_out import as_matmul, is_plain

_BY_ELEMENT = frozenset({
    "Add", "Cast", "Clip", "Div", "Erf", "Gelu", "Identity", "LeakyRelu", "Max", "Min", "Mul",
    "Neg", "Pow", "Relu", "Sigmoid", "Softplus", "Sub", "Tanh",
})  # fmt: skip
_PRODUCTS = frozenset({"Gemm", "MatMul"})


@dataclass
class _Region:
    """Nodes that work on flat rows, the Reshapes that make these and those that end them, in the
    order in which they were found (each once). `axes`: what was flattened."""

    axes: tuple[object, object]
    inside: dict[ir.Node, None] = field(default_factory=dict)
    entries: dict[ir.Node, None] = field(default_factory=dict)
    exits: dict[ir.Node, None] = field(default_factory=dict)


def unflatten(graph: ir.Graph) -> None:
    """Let products read `[batch, seq, features]`, wherever all that stands between a Reshape to two
    axes and one back is known to work row by row.

    A Reshape that also joins or splits heads stays, with the sizes of its output left to whoever
    settles them.
    """
    done: set[ir.Node] = set()
    for node in list(graph):
        if node not in done and _flattens(node):
            region = _region(node)
            if region is not None:
                done |= {*region.entries, *region.exits}
                _widen(graph, region)


def _flattens(node: ir.Node) -> bool:
    """Whether it is a Reshape `[a, b, ...] -> [a * b, features]`."""
    if node.op_type != "Reshape":
        return False
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if before is None or after is None or len(before) < 3 or len(after) != 2:
        return False
    width = 1
    for size in before[2:]:
        if not isinstance(size, int):
            return False
        width *= size
    return after[1] == width


def _region(start: ir.Node) -> _Region | None:
    """All that works on the same flat rows as `start`; None if a node among it does not."""
    axes = _axes(start.inputs[0])
    if axes is None:
        return None
    found = _Region(axes)
    todo = [start]
    while todo:
        node = todo.pop()
        if node in found.inside or node in found.entries or node in found.exits:
            continue
        if _flattens(node):
            if _axes(node.inputs[0]) != found.axes:
                return None
            found.entries[node] = None
        elif _ends(node, found.axes):
            found.exits[node] = None
            continue
        elif _by_row(node):
            found.inside[node] = None
            for value in node.inputs:
                if value is not None and not _is_constant(value):
                    producer = value.producer()
                    if producer is None:
                        return None
                    todo.append(producer)
        else:
            return None
        if any(value.is_graph_output() for value in node.outputs):
            return None
        todo += node.outputs[0].consumers()
    return found


def _ends(node: ir.Node, axes: tuple[object, object]) -> bool:
    """Whether it is a Reshape to `axes` and more, or to sizes of which none is its input's."""
    if node.op_type != "Reshape":
        return False
    sizes = node.inputs[1].const_value
    return _axes(node.outputs[0]) == axes or sizes is None or 0 not in sizes.numpy()


def _axes(value: ir.Value) -> tuple[object, object] | None:
    """The first two axes of a value that has more, all others fixed; two without a name may differ,
    so they are none."""
    shape = value.shape
    if shape is None or len(shape) < 3 or not all(isinstance(size, int) for size in shape[2:]):
        return None
    first, second = (size if isinstance(size, int) else size.value for size in shape[:2])
    return None if first is None or second is None else (first, second)


def _by_row(node: ir.Node) -> bool:
    """Whether it works on every row of `[rows, features]` alone, and as well with more axes."""
    if node.op_type in _PRODUCTS:
        return is_plain(node) and all(
            _is_constant(value) for value in node.inputs[1:] if value is not None
        )
    if node.op_type in NORM_OPS:
        axis = node.attributes.get("axis")
        return axis is None or axis.as_int() in (-1, 1)
    constants = [v.shape for v in node.inputs if v is not None and v.is_initializer()]
    return node.op_type in _BY_ELEMENT and all(s is not None and len(s) <= 1 for s in constants)


def _is_constant(value: ir.Value) -> bool:
    """A stored weight, or one that is transposed as it is read."""
    producer = value.producer()
    turned = producer is not None and producer.op_type == "Transpose"
    return value.is_initializer() or (turned and producer.inputs[0].is_initializer())


def _widen(graph: ir.Graph, region: _Region) -> None:
    first = next(iter(region.entries)).inputs[0]
    for entry in region.entries:
        source, flat = entry.inputs[0], entry.outputs[0]
        if len(source.shape or ()) == 3:
            flat.replace_all_uses_with(source)
            graph.remove(entry, safe=True)
        else:  # heads are joined
            flat.shape = _wider(source, flat)
    for node in region.inside:
        node.outputs[0].shape = _wider(first, node.outputs[0])
        if node.op_type in NORM_OPS:
            node.attributes["axis"] = ir.AttrInt64("axis", -1)
        elif node.op_type == "Gemm":
            as_matmul(node)
    for leave in region.exits:
        out = leave.outputs[0]
        whole = _axes(out) == region.axes and len(out.shape or ()) == 3  # else heads are split
        if whole and not out.is_graph_output():
            out.replace_all_uses_with(leave.inputs[0])
            graph.remove(leave, safe=True)


def _wider(source: ir.Value, flat: ir.Value) -> ir.Shape | None:
    """The shape of a flat value on the axes of `source`."""
    if source.shape is None or flat.shape is None:
        return None
    return ir.Shape([source.shape[0], source.shape[1], flat.shape[-1]])
