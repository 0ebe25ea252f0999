"""A graph run part after part in ONNX Runtime, with the weights of one part in memory.

Parts are stretches of the graph's nodes; what one gives to later ones stays in memory for all calls
until it is no longer needed. All calls run through a part before the next one begins, so that each
weight is read once however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iq_export.graph import io
from iq_export.run.ort import Ids, literal_session, run_session

# Bytes of weights up to which nodes are taken together; a larger weight is a part of its own.
PART_BYTES = 1 << 27
_INLINE_BYTES = 1024

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Call:
    """Tokens of some rows, the later ones of which may continue the former: `chunks` are input ids
    `[batch, seq]`, mask `[batch, past + seq]` and positions `[batch, seq]`, one after the other;
    `past` is the cache before the first, key and value of every layer (empty: none)."""

    chunks: tuple[tuple[Ids, Ids, Ids], ...]
    past: tuple[NDArray[np.float32], ...] = ()


@dataclass
class _Part:
    nodes: list[ir.Node]
    inputs: list[ir.Value] = field(default_factory=list)
    weights: list[ir.Value] = field(default_factory=list)
    inline: list[ir.Value] = field(default_factory=list)
    outputs: list[ir.Value] = field(default_factory=list)


def logits_in_parts(
    path: Path, calls: Sequence[Call], *, part_bytes: int = PART_BYTES
) -> list[list[NDArray[np.float32]]]:
    """Logits `[batch, seq, vocab]` of every chunk of every call by the causal LM at `path`.

    No optimizer is on. Raises GraphError if ONNX Runtime cannot load or run the graph, or it is
    none of a causal LM, ModelError if a weight cannot be read.
    """
    return logits_of(io.load(path), path.name, calls, part_bytes=part_bytes)


def logits_of(
    model: ir.Model, where: str, calls: Sequence[Call], *, part_bytes: int = PART_BYTES
) -> list[list[NDArray[np.float32]]]:
    """`logits_in_parts` of a graph in memory, called `where` in messages; the types of its values
    must be known where it is cut."""
    names = ("input_ids", "attention_mask", "position_ids")
    kept: list[list[Arrays]] = [
        [dict(zip(names, chunk, strict=True)) for chunk in call.chunks] for call in calls
    ]
    _run(model, where, kept, calls, {"logits"}, part_bytes)
    return [[values["logits"] for values in chunks] for chunks in kept]


def outputs_of(
    model: ir.Model, where: str, feeds: Sequence[Arrays], *, part_bytes: int = PART_BYTES
) -> list[Arrays]:
    """All outputs, by name, of a graph without a cache for each of `feeds`; else as `logits_of`."""
    kept = [[dict(each)] for each in feeds]
    wanted = {str(value.name) for value in model.graph.outputs}
    _run(model, where, kept, [Call(())] * len(kept), wanted, part_bytes)
    return [{name: values[name] for name in sorted(wanted)} for (values,) in kept]


def _run(
    model: ir.Model,
    where: str,
    kept: list[list[Arrays]],
    calls: Sequence[Call],
    wanted_outputs: set[str],
    part_bytes: int,
) -> None:
    """Run the chunks of every call, `kept`, which hold their inputs and then the outputs."""
    parts = _parts(model, part_bytes)
    caches = [v for v in model.graph.inputs if str(v.name).startswith("past_key_values.")]
    for number, part in enumerate(parts):
        later = {value for other in parts[number + 1 :] for value in other.inputs}
        needed = {str(value.name) for value in later} | wanted_outputs
        session = literal_session(_proto(model, part, kept[0][0]), where)
        weights = {str(v.name): v.const_value.numpy() for v in part.weights if v.const_value}
        wanted = [str(value.name) for value in part.outputs]
        read = [value for value in part.inputs if value in caches]
        for call, chunks in zip(calls, kept, strict=True):
            past = {str(v.name): _past(v, caches.index(v), call) for v in read}
            for values in chunks:
                crossing = {str(v.name): values[str(v.name)] for v in part.inputs if v not in read}
                found = run_session(session, wanted, weights | crossing | past, where)
                past = {name: found[name.replace("past_key_values", "present")] for name in past}
                values |= {name: array for name, array in found.items() if name in needed}
        del session, weights
        for values in (values for chunks in kept for values in chunks):
            for name in values.keys() - needed:
                del values[name]


def _past(value: ir.Value, index: int, call: Call) -> NDArray[Any]:
    if call.past:
        return call.past[index]
    assert value.shape is not None
    _, heads, _, width = value.shape
    batch = len(call.chunks[0][0])
    return np.zeros((batch, int(str(heads)), 0, int(str(width))), np.float32)


def _parts(model: ir.Model, part_bytes: int) -> list[_Part]:
    """The graph's nodes cut where a part's weights would be more than `part_bytes`, but never
    between a layer's cache as it comes and as it goes: it is passed on from chunk to chunk."""
    nodes = list(model.graph)
    place = {node: number for number, node in enumerate(nodes)}
    closed = [True] * len(nodes)
    by_layer: dict[str, list[int]] = {}
    for value in model.graph.inputs:
        if str(value.name).startswith("past_key_values."):
            layer = str(value.name).split(".")[1]
            by_layer.setdefault(layer, []).extend(place[use.node] for use in value.uses())
    for value in model.graph.outputs:
        if str(value.name).startswith("present.") and (maker := value.producer()) is not None:
            by_layer.setdefault(str(value.name).split(".")[1], []).append(place[maker])
    for where in by_layer.values():
        closed[min(where) : max(where)] = [False] * (max(where) - min(where))
    if any(a.type in _GRAPHS for node in nodes for a in node.attributes.values()):
        closed = [False] * len(nodes)  # a subgraph reads values that are no input of its node
    bounds, start, cut = [0], 0, 0
    seen: set[ir.Value] = set()
    for number, node in enumerate(nodes):
        fresh = {v for v in node.inputs if v is not None and _is_large(v)} - seen
        if fresh and cut > start and sum(map(_nbytes, seen | fresh)) > part_bytes:
            bounds.append(cut)
            start = cut
            seen = {v for n in nodes[start:number] for v in n.inputs if v and _is_large(v)}
        seen |= fresh | {v for v in node.inputs if v is not None and _is_large(v)}
        if closed[number]:
            cut = number + 1
    ends = [*bounds[1:], len(nodes)]
    return [_part(model, nodes[a:b]) for a, b in zip(bounds, ends, strict=True)]


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _part(model: ir.Model, nodes: list[ir.Node]) -> _Part:
    part, inside = _Part(nodes), set(nodes)
    used = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None)
    if any(a.type in _GRAPHS for node in nodes for a in node.attributes.values()):
        used |= dict.fromkeys([*model.graph.inputs, *model.graph.initializers.values()])
    for value in used:
        if value.const_value is not None and value.is_initializer():
            (part.weights if _is_large(value) else part.inline).append(value)
        elif value.producer() not in inside:
            part.inputs.append(value)
    for node in nodes:
        part.outputs += [
            value for value in node.outputs
            if value.is_graph_output() or any(use.node not in inside for use in value.uses())
        ]  # fmt: skip
    return part


def _proto(model: ir.Model, part: _Part, known: Arrays) -> bytes:
    """The part as a model of its own, whose weights are inputs: they are not copied then."""
    import onnx

    def described(value: ir.Value) -> onnx.ValueInfoProto:
        info = ir.serde.serialize_value(value)
        if not info.HasField("type") and value.name in known:
            kind = onnx.helper.np_dtype_to_tensor_dtype(known[value.name].dtype)
            info.type.tensor_type.elem_type = kind
        return info

    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in part.nodes],
        "part",
        [described(value) for value in (*part.inputs, *part.weights)],
        [described(value) for value in part.outputs],
        [
            onnx.numpy_helper.from_array(v.const_value.numpy(), v.name)
            for v in part.inline
            if v.const_value
        ],
    )
    opsets = [onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items()]
    functions = [ir.serde.serialize_function(f) for f in model.functions.values()]
    made = onnx.helper.make_model(
        graph, opset_imports=opsets, functions=functions, ir_version=model.ir_version
    )
    return bytes(made.SerializeToString())


def _is_large(value: ir.Value) -> bool:
    return value.is_initializer() and _nbytes(value) > _INLINE_BYTES


def _nbytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes
