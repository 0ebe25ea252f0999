"""Small edits that several passes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy as shallow

import numpy as np
import onnx_ir as ir


def copied(model: ir.Model) -> ir.Model:
    """A copy that may be changed; constants are shared, and read when they are needed."""
    copy = model.clone()
    separate_types(copy.graph)
    return copy


def separate_types(graph: ir.Graph) -> None:
    """Give the values of a cloned graph types of their own: onnx_ir's clone shares them, and to set
    a value's dtype changes its type in place."""
    values = [v for node in graph for v in node.outputs]
    for value in (*graph.inputs, *graph.initializers.values(), *values):
        value.type = shallow(value.type)


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register an initializer."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name,
        const_value=tensor,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
    )
    graph.register_initializer(value)
    return value


def shared_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The initializer with `array` that is called `name`, or, where a file has another one of that
    name, `name_` and so on; registered if the graph does not have it yet."""
    while (found := graph.initializers.get(name)) is not None:
        known = found.const_value
        if known is not None and tuple(known.shape.numpy()) == array.shape:
            values = known.numpy()
            if values.dtype == array.dtype and np.array_equal(values, array):
                return found
        name += "_"
    return constant(graph, name, array)


def own_constant(graph: ir.Graph, node: ir.Node, position: int) -> ir.Value:
    """The initializer at input `position` of `node`, copied first if other nodes read it too."""
    value = node.inputs[position]
    if len(value.uses()) == 1:
        return value
    name = f"{value.name}.of.{node.name}"
    tensor = value.const_value
    kind = shallow(value.type)
    copy = ir.Value(name=name, const_value=tensor, type=kind, shape=value.shape)
    graph.register_initializer(copy)
    node.replace_input_with(position, copy)
    return copy


def insert_behind(graph: ir.Graph, value: ir.Value, nodes: ir.Node | Sequence[ir.Node]) -> None:
    """Place `nodes` right behind what makes `value`; in front of all others if it is an input."""
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)


def recompute(
    value: ir.Value,
    change: Callable[[np.ndarray], np.ndarray],
    *,
    dtype: ir.DataType | None = None,
) -> None:
    """Let an initializer hold `change(itself)`, computed each time it is read or written.

    Nothing is kept in memory. `dtype` is the result's type, the old one's if None.
    """
    old = value.const_value
    kind = dtype or old.dtype

    def compute() -> ir.Tensor:
        return ir.Tensor(change(old.numpy()).astype(kind.numpy(), copy=False), name=old.name)

    shape = ir.Shape(old.shape.numpy())
    value.const_value = ir.LazyTensor(compute, dtype=kind, shape=shape, name=old.name)
    value.dtype = kind
