"""Hold the KV cache in the codes of a format (int8), one scale per tensor.

- This step's keys and values pass QuantizeLinear and join the cache of codes; behind it the whole
  passes DequantizeLinear in front of the Attention.
- SinkClampInsert ops on keys and values move behind that: the templates of the sinks are read in
  the graph's own precision, and scales need not hold them. The cache keeps, for each lifecycle,
  which rows are sinks, int32: an input `[batch, past]` and an output `[batch, total]`.

Precondition: float32 graph; keys and values join the cache by a Concat of a graph input whose
output is a graph output; every lifecycle is inserted with its keys and values (not the norm form).
Postcondition: these inputs and outputs hold codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from iq_export.errors import GraphError
from iq_export.formats import qdq
from iq_export.formats.base import CacheFormat
from iq_export.formats.int8_cache import INT8_CACHE
from iq_export.graph.edit import constant
from iq_export.graph.interface import PAST, Role, axes_of, name_of
from iq_export.graph.sites import AttentionSite, Sites
from iq_export.sinks.ops import DOMAIN

# What gives a lifecycle's index: one detection, or the union of those at several blocks.
_INDEX_OPS = ("SinkDetect", "Where")


def quantize_cache(
    model: ir.Model,
    sites: Sites,
    scales: Mapping[str, float],
    cache: CacheFormat = INT8_CACHE,
) -> bool:
    """Rewrite all layers; `scales` maps the names of each site's key and value to their scale.

    Raises GraphError naming the attention that is no single op or has no cache of this form.
    """
    graph = model.graph
    nodes = {node.name: node for node in graph}
    inserts: list[ir.Node] = []
    joined: ir.Node | None = None
    done: set[str] = set()  # layers may share keys and values
    for block in sites.blocks:
        site = block.attention.attention
        if site is None:
            raise GraphError(
                f"The attention before node {block.attention.output.node!r} is no single Attention "
                "op, so its KV cache cannot be int8: use recipe w8a8."
            )
        for position, name in ((1, site.key), (2, site.value)):
            if name in done:
                continue
            done.add(name)
            joined = _cache_of(nodes[site.node], position, site)
            inserts += _quantize_one(graph, joined, scales[name], cache)
    assert joined is not None
    _cache_indices(graph, inserts, joined)
    return True


def _cache_of(attention: ir.Node, position: int, site: AttentionSite) -> ir.Node:
    """The Concat of past and new rows in front of `attention`."""
    present = attention.inputs[position]
    node = None if present is None else present.producer()
    if (
        node is None
        or node.op_type != "Concat"
        or not node.inputs[0].is_graph_input()
        or not node.outputs[0].is_graph_output()
    ):
        raise GraphError(
            f"Node {site.node!r} does not read its keys and values from a Concat with the KV "
            "cache, so the cache cannot be int8: use recipe w8a8."
        )
    return node


def _quantize_one(
    graph: ir.Graph, concat: ir.Node, scale: float, cache: CacheFormat
) -> list[ir.Node]:
    """Rewrite the cache that `concat` joins; returns the ops that insert templates, now behind it,
    the last one first."""
    past, new = concat.inputs
    present = concat.outputs[0]
    ops: list[ir.Node] = []  # the last one is applied first
    while (op := new.producer()) is not None and _inserts(op):
        ops.append(op)
        new = op.inputs[0]
    scale_value = constant(graph, f"{present.name}.scale", np.array(scale, np.float32))
    zero = qdq.zero_point(graph, cache.dtype)
    q = qdq.quantize(
        new, scale_value, zero, name=f"{present.name}/quantize", output=f"{present.name}.new"
    )
    dq = qdq.dequantize(
        present, scale_value, zero,
        name=f"{present.name}/dequantize", output=f"{present.name}.dequantized",
    )  # fmt: skip
    readers = [use for use in present.uses() if use.node is not dq]
    concat.replace_input_with(1, q.outputs[0])
    past.dtype = present.dtype = cache.dtype
    for op in ops:
        graph.remove(op)
    chain = [dq, *reversed(ops)]
    for op, before in zip(chain[1:], chain, strict=False):
        op.replace_input_with(0, before.outputs[0])
        op.outputs[0].shape = present.shape
    for reader, position in readers:
        reader.replace_input_with(position, chain[-1].outputs[0])
    graph.insert_before(concat, q)
    graph.insert_after(concat, chain)
    return ops


def _inserts(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type == "SinkClampInsert"


def _cache_indices(graph: ir.Graph, inserts: Sequence[ir.Node], cache: ir.Node) -> None:
    """Let the ops on keys and values read the index of all rows, those of the cache first."""
    past, present = cache.inputs[0], cache.outputs[0]
    assert past is not None and past.shape is not None and present.shape is not None
    rows = axes_of(Role.PAST).index(PAST)
    totals: dict[ir.Value, ir.Value] = {}
    # Found before the first is changed: a key and a value share the nodes of an index per head.
    for reader, position in dict.fromkeys(_reader_of_index(op) for op in inserts):
        index = reader.inputs[position]
        assert index is not None
        if index not in totals:
            before = ir.Value(
                name=name_of(Role.PAST_SINKS, len(totals)),
                type=ir.TensorType(ir.DataType.INT32),
                shape=ir.Shape([past.shape[0], past.shape[rows]]),
            )
            concat = ir.node("Concat", [before, index], {"axis": 1}, name=f"{index.name}/cache")
            total = concat.outputs[0]
            total.name = name_of(Role.PRESENT_SINKS, len(totals))
            total.dtype = ir.DataType.INT32
            total.shape = ir.Shape([present.shape[0], present.shape[rows]])
            producer = index.producer()
            assert producer is not None
            graph.insert_after(producer, concat)
            graph.inputs.append(before)
            graph.outputs.append(total)
            totals[index] = total
        reader.replace_input_with(position, totals[index])


def _reader_of_index(op: ir.Node) -> tuple[ir.Node, int]:
    """The node, and which input, that reads the index of the rows that `op` writes: `op` itself, or
    the first of those that make an index per head of it."""
    reader, position = op, 1
    while True:
        index = reader.inputs[position]
        maker = None if index is None else index.producer()
        if maker is None or maker.op_type in _INDEX_OPS:
            return reader, position
        reader, position = maker, 0
