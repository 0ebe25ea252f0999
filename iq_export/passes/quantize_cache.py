"""Hold the KV cache in the codes of a format (int8), one scale per tensor.

- This step's keys and values pass QuantizeLinear and join the cache of codes; behind it the whole
  passes DequantizeLinear in front of the Attention.
- SinkClampInsert ops on keys and values move behind that: the templates of the sinks are read in
  the graph's own precision, and scales need not hold them. The cache keeps, for each lifecycle,
  which rows are sinks: `past_sinks.N` -> `present_sinks.N`, int32 `[batch, past]` -> `[batch,
  total]`.

Precondition: float32 graph; keys and values join the cache by a Concat whose output is the graph
output `present.*`; every lifecycle is inserted with its keys and values (not the norm form).
Postcondition: `past_key_values.*` and `present.*` hold codes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from iq_export.errors import GraphError
from iq_export.formats import qdq
from iq_export.formats.base import CacheFormat
from iq_export.formats.int8_cache import INT8_CACHE
from iq_export.graph.edit import constant
from iq_export.graph.sites import AttentionSite, Sites
from iq_export.passes.insert_sinks import index_name
from iq_export.sinks.ops import DOMAIN


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
    past_and_present: tuple[ir.Value, ir.Value] | None = None
    for block in sites.blocks:
        site = block.attention.attention
        if site is None:
            raise GraphError(
                f"The attention before node {block.attention.output.node!r} is no single Attention "
                "op, so its KV cache cannot be int8: use recipe w8a8."
            )
        for position, name in ((1, site.key), (2, site.value)):
            concat = _cache_of(nodes[site.node], position, site)
            past_and_present = _quantize_one(graph, concat, scales[name], cache)
    assert past_and_present is not None
    _cache_indices(graph, *past_and_present)
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
) -> tuple[ir.Value, ir.Value]:
    past, new = concat.inputs
    present = concat.outputs[0]
    ops: list[ir.Node] = []  # the last one is applied first
    while (op := new.producer()) is not None and op.domain == DOMAIN:
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
    return past, present


def _cache_indices(graph: ir.Graph, past: ir.Value, present: ir.Value) -> None:
    """Let the ops on keys and values read the index of all rows, those of the cache first."""
    assert past.shape is not None and present.shape is not None
    rows = -2  # [batch, heads, rows, head_dim] or [batch, rows, features]
    values = {value.name: value for node in graph for value in node.outputs}
    for number in itertools.count():
        index = values.get(index_name(number))
        if index is None:
            return
        before = ir.Value(
            name=f"past_sinks.{number}",
            type=ir.TensorType(ir.DataType.INT32),
            shape=ir.Shape([past.shape[0], past.shape[rows]]),
        )
        concat = ir.node("Concat", [before, index], {"axis": 1}, name=f"{index.name}/cache")
        total = concat.outputs[0]
        total.name = f"present_sinks.{number}"
        total.dtype = ir.DataType.INT32
        total.shape = ir.Shape([present.shape[0], present.shape[rows]])
        producer = index.producer()
        assert producer is not None
        for user, position in list(index.uses()):
            attends = f"iq/sinks.{number}/attend." in str(user.name)
            if attends or str(user.name).startswith(f"{index.name}.heads"):
                user.replace_input_with(position, total)
        graph.insert_after(producer, concat)
        graph.inputs.append(before)
        graph.outputs.append(total)
