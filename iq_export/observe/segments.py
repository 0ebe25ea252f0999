"""Cut a graph into pieces that can be run one behind the other, each with few weights.

Found by what is alive, with no name and no family: a graph may be cut behind a node where at most
one activation is still to be read (the residual stream). What depends on lengths, masks and
positions alone (rotary angles, the mask of attention) is computed again in each piece; small
integers that are made early and read late (the indices of sinks) are carried along.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from iq_export.graph.interface import Interface

# Weights of a piece, in bytes as they are run: small models stay in one piece.
SEGMENT_BYTES = 64 << 20
# What may stand between a stored weight and its reader.
_STORED_BEHIND = ("DequantizeLinear", "Transpose", "Cast")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class Segment:
    """A piece of a graph, by value names: it reads what is `carried` to it, makes `made`, and
    passes on `kept`, which includes what it passes through."""

    carried: tuple[str, ...]
    made: frozenset[str]
    kept: tuple[str, ...]


def segments(
    graph: ir.Graph, *, at: Sequence[str] = (), budget: int = SEGMENT_BYTES
) -> list[Segment]:
    """The pieces of `graph` in order.

    `at`: values behind whose producers it is cut; without, it is cut wherever that is possible and
    a piece has `budget` bytes of weights. A graph that cannot be cut is one piece.
    """
    order = _bound_nodes(graph)
    if not order:
        return [Segment((), frozenset(str(v.name) for n in graph for v in n.outputs), ())]
    place = {value: i for i, node in enumerate(order) for value in node.outputs}
    last = dict.fromkeys(place, -1)
    for i, node in enumerate(order):
        for value in reads(node):
            if value in last:
                last[value] = i
    cuts = _named_cuts(place, at) if at else _cheap_cuts(order, place, last, budget)
    free = [v for node in graph for v in node.outputs if v not in place]
    found: list[Segment] = []
    start = 0
    carried: tuple[str, ...] = ()
    for end in [*cuts, len(order) - 1]:
        made = {str(v.name) for node in order[start : end + 1] for v in node.outputs}
        if not found:
            made |= {str(value.name) for value in free}
        kept = tuple(str(v.name) for v, i in place.items() if i <= end < last[v])
        found.append(Segment(carried, frozenset(made), kept))
        start, carried = end + 1, kept
    return found


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """The values that a node reads, in its subgraphs too."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = list(attribute.as_graphs())
        else:
            continue
        for graph in graphs:
            yield from graph.outputs
            for inner in graph:
                yield from reads(inner)


def _bound_nodes(graph: ir.Graph) -> list[ir.Node]:
    """The nodes whose values depend on the tokens, or pixels, not on their number alone, in graph
    order."""
    primary = Interface.of_graph(graph).primary
    bound = {value for value in graph.inputs if primary and value.name == primary.name}
    inputs = set(graph.inputs)
    found = []
    for node in graph:
        values = list(reads(node))
        if node.op_type in ("Shape", "Size") and values[0] in inputs:
            continue
        if any(value in bound for value in values):
            bound.update(node.outputs)
            found.append(node)
    return found


def _named_cuts(place: dict[ir.Value, int], at: Collection[str]) -> list[int]:
    wanted = set(at)
    return sorted({i for value, i in place.items() if value.name in wanted})


def _cheap_cuts(
    order: Sequence[ir.Node], place: dict[ir.Value, int], last: dict[ir.Value, int], budget: int
) -> list[int]:
    heavy = np.zeros(len(order) + 1, int)  # activations that are alive behind each node
    for value, i in place.items():
        if last[value] > i and _is_activation(value):
            heavy[i] += 1
            heavy[last[value]] -= 1
    alive = np.cumsum(heavy)
    cuts, size = [], 0
    seen: set[ir.Value] = set()
    open_, behind = None, 0  # the last place to cut at, and the weights behind it
    for i, node in enumerate(order):
        more = _weights(node, seen)
        size, behind = size + more, behind + more
        if open_ is not None and behind >= budget and size > behind:
            cuts.append(open_)  # one large weight, as the head's, is a piece of its own
            size, open_ = behind, None
        if alive[i] <= 1 and i < len(order) - 1:
            open_, behind = i, 0
            if size >= budget:
                cuts.append(i)
                size, open_ = 0, None
                seen = set()
    return cuts


def _is_activation(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype in _FLOATS


def _weights(node: ir.Node, seen: set[ir.Value]) -> int:
    """Bytes of the constants that stand before `node`, but for those in `seen`."""
    total, todo = 0, list(reads(node))
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        if value.const_value is not None:
            seen.add(value)
            total += 4 * value.const_value.size  # a CPU unpacks what is smaller than float32
        else:
            producer = value.producer()
            if producer is not None and producer.op_type in _STORED_BEHIND:
                todo += [v for v in producer.inputs if v is not None]
    return total
