"""Carry the few loudest channels of a product's input beside its quantizer, in half precision.

`x W = Q(x masked) W + x[S] W[S]` for a fixed set S of a few channels: what stretches the static
range of all others (or would be clipped by it) is multiplied exactly, at |S| / in_features of the
product's cost. S is constant, so this is two products of fixed shape (the decomposition of
LLM.int8(), arXiv 2208.07339, with the channels chosen at compile time).

Postcondition: the same function; the value before the mask keeps its name, so sinks are detected
and clamped there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from iq_export.graph.edit import constant, own_constant, recompute
from iq_export.graph.sites import Linear


def side_channels(model: ir.Model, chosen: Mapping[str, tuple[Linear, np.ndarray]]) -> bool:
    """Give the products in `chosen` (node name -> product, channel numbers) a side path."""
    graph = model.graph
    nodes = {node.name: node for node in graph}
    for name, (linear, channels) in chosen.items():
        node = nodes[name]
        value, weight, output = node.inputs[0], own_constant(graph, node, 1), node.outputs[0]
        readers = list(output.uses())
        keep = np.ones(linear.in_features, np.float32)
        keep[channels] = 0
        small = constant(
            graph, f"{weight.name}.side", np.zeros((channels.size, linear.out_features), "f4")
        )
        small.const_value = _rows_of(weight.const_value, channels, small.name)
        picked = ir.node(
            "Gather",
            [value, constant(graph, f"{name}.side_channels", channels.astype(np.int64))],
            {"axis": -1},
            name=f"{name}/side_gather",
        )
        aside = ir.node("MatMul", [picked.outputs[0], small], name=f"{name}/side")
        masked = ir.node(
            "Mul", [value, constant(graph, f"{name}.side_mask", keep)], name=f"{name}/side_mask"
        )
        total = ir.node("Add", [output, aside.outputs[0]], name=f"{name}/side_add")
        for new in (picked, aside, masked, total):
            new.outputs[0].name = f"{new.name}.out"
            new.outputs[0].dtype = value.dtype
        masked.outputs[0].shape = value.shape
        total.outputs[0].shape = output.shape
        node.replace_input_with(0, masked.outputs[0])
        recompute(weight, partial(_without, channels=channels))
        graph.insert_before(node, [picked, aside, masked])
        graph.insert_after(node, total)
        for reader, position in readers:
            reader.replace_input_with(position, total.outputs[0])
    return bool(chosen)


def _rows_of(source: ir.TensorProtocol, channels: np.ndarray, name: str) -> ir.LazyTensor:
    shape = ir.Shape([channels.size, source.shape.numpy()[1]])
    return ir.LazyTensor(
        lambda: ir.Tensor(source.numpy()[channels], name=name),
        dtype=source.dtype, shape=shape, name=name,
    )  # fmt: skip


def _without(weight: np.ndarray, channels: np.ndarray) -> np.ndarray:
    kept = weight.copy()
    kept[channels] = 0
    return kept
