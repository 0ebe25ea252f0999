"""Defects that a traced graph might have, each made in a right one: for the tests of its check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from iq_export.run.ort import Step

# Relative sizes of a wrong scale: from what nobody can miss to what rounding hides.
SCALES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 3e-6, 1e-6)
_NORMS = ("RMSNormalization", "LayerNormalization")
Mutation = Callable[[ir.Graph], bool]


def mutations(window: int | None) -> Iterator[tuple[str, Mutation]]:
    """Name and function, which changes a graph in place or says that it has no such place."""
    for size in SCALES:
        yield f"weight x (1 + {size:g})", lambda g, s=size: _scale(_linears(g)[1], 1 + s)
        yield f"norm x (1 + {size:g})", lambda g, s=size: _scale(_norms(g)[0], 1 + s)
        yield f"attention scale x (1 + {size:g})", lambda g, s=size: _attention_scale(g, 1 + s)
        yield f"frequencies x (1 + {size:g})", lambda g, s=size: _scale(_frequencies(g), 1 + s)
        yield f"scalar x (1 + {size:g})", lambda g, s=size: _scale(_scalar(g), 1 + s)
        yield f"bias x (1 + {size:g})", lambda g, s=size: _scale(_bias(g), 1 + s)
    yield "bias dropped", lambda g: _scale(_bias(g), 0)
    yield "frequencies by half", lambda g: _scale(_frequencies(g), 0.5)
    yield "lowest frequency x 1.01", lambda g: _edit(_frequencies(g), _lowest)
    yield "final norm dropped", lambda g: _edit(_norms(g)[-1], np.ones_like)
    yield "one row x 1.1", lambda g: _edit(_linears(g)[-2], lambda a: _part(a, 0, 3, 1.1))
    yield "one column x 1.1", lambda g: _edit(_linears(g)[0], lambda a: _part(a, 1, 3, 1.1))
    yield "one embedding x 1.1", lambda g: _edit(_embedding(g), lambda a: _part(a, 0, 1, 1.1))
    yield "heads swapped", _swap_heads
    yield "epsilon x 10", lambda g: _attribute(g, _NORMS, "epsilon", 10)
    yield "epsilon x 0.1", lambda g: _attribute(g, _NORMS, "epsilon", 0.1)
    yield "softcap x 1.1", lambda g: _attribute(g, ("Attention",), "softcap", 1.1)
    yield "softcap dropped", lambda g: _attribute(g, ("Attention",), "softcap", 0)
    yield "rotation interleaved", _interleave
    yield "positions of later chunks off by one", _shift_positions
    yield "keys of the past rolled by one", lambda g: _roll_past(g, "key")
    yield "values of the past rolled by one", lambda g: _roll_past(g, "value")
    yield "cache behind the new tokens", _swap_concat
    yield "own token masked", lambda g: _mask(g, -1)
    yield "next token seen", lambda g: _mask(g, 1)
    if window is not None:
        yield "window + 1", lambda g: _window(g, window, window + 1)
        yield "window - 1", lambda g: _window(g, window, window - 1)
        yield "window dropped", lambda g: _window(g, window, 1 << 20)


def _edit(value: ir.Value | None, change: Callable[[np.ndarray], np.ndarray]) -> bool:
    if value is None:
        return False
    before = value.const_value.numpy()
    after = np.asarray(change(before.copy()), before.dtype)
    value.const_value = ir.tensor(after, name=value.name)
    return not np.array_equal(before, after)


def _scale(value: ir.Value | None, factor: float) -> bool:
    return _edit(value, lambda array: array * np.float32(factor))


def _part(array: np.ndarray, axis: int, index: int, factor: float) -> np.ndarray:
    array[(slice(None),) * axis + (index,)] *= factor
    return array


def _lowest(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[-1] *= 1.01
    return array


def _constants(graph: ir.Graph, ops: Sequence[str], rank: int) -> list[ir.Value]:
    """Float constants of a rank that nodes of these ops read, in the graph's order."""
    found = [
        value
        for node in graph
        if node.op_type in ops
        for value in node.inputs
        if value is not None
        and value.is_initializer()
        and value.dtype == ir.DataType.FLOAT
        and len(value.shape) == rank
    ]
    return list(dict.fromkeys(found))


def _linears(graph: ir.Graph) -> list[ir.Value]:
    return _constants(graph, ("MatMul", "Gemm", "Transpose"), 2)


def _norms(graph: ir.Graph) -> list[ir.Value | None]:
    return [*_constants(graph, _NORMS, 1)] or [None]


def _embedding(graph: ir.Graph) -> ir.Value | None:
    return next(iter(_constants(graph, ("Gather",), 2)), None)


def _bias(graph: ir.Graph) -> ir.Value | None:
    """Of a linear in the middle: one of the keys moves all scores alike, and nothing with them."""
    found = [v for v in _constants(graph, ("Add", "Gemm"), 1) if "k_proj" not in v.name]
    return found[len(found) // 2] if found else None


def _scalar(graph: ir.Graph) -> ir.Value | None:
    found = [v for v in _constants(graph, ("Mul", "Div"), 0) if v.const_value.numpy() != 0]
    return found[0] if found else None


def _frequencies(graph: ir.Graph) -> ir.Value | None:
    """What positions are multiplied with, from the cosine upwards."""
    cosines = [node for node in graph if node.op_type == "Cos"]
    pending, seen = list(cosines[:1]), set()
    while pending:
        node = pending.pop()
        for value in node.inputs:
            if value is None or value in seen:
                continue
            seen.add(value)
            if value.is_initializer() and value.dtype == ir.DataType.FLOAT:
                if value.const_value.size > 1:
                    return value
            elif value.producer() is not None:
                pending.append(value.producer())
    return None


def _attention_scale(graph: ir.Graph, factor: float) -> bool:
    for node in graph:
        if node.op_type == "Attention":
            head = node.inputs[0].shape[-1]
            scale = node.attributes["scale"].as_float() if "scale" in node.attributes else None
            node.attributes["scale"] = ir.AttrFloat32("scale", (scale or head**-0.5) * factor)
            return True
    return False


def _attribute(graph: ir.Graph, ops: Sequence[str], name: str, factor: float) -> bool:
    changed = False
    for node in graph:
        if node.op_type in ops and name in node.attributes:
            value = node.attributes[name].as_float()
            node.attributes[name] = ir.AttrFloat32(name, value * factor)
            changed = changed or value != 0
    return changed


def _interleave(graph: ir.Graph) -> bool:
    rotations = [node for node in graph if node.op_type == "RotaryEmbedding"]
    for node in rotations:
        node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)
    return bool(rotations)


def _swap_heads(graph: ir.Graph) -> bool:
    """The first two heads of the values' projection change places."""
    attention = next((node for node in graph if node.op_type == "Attention"), None)
    if attention is None or attention.inputs[2].shape is None:
        return False
    heads, size = attention.inputs[2].shape[1], attention.inputs[2].shape[3]
    if not isinstance(heads, int) or heads < 2:
        return False
    value = next((v for v in _linears(graph) if "v_proj" in v.name), None)

    def swap(array: np.ndarray) -> np.ndarray:
        order = np.arange(array.shape[1])
        order[: 2 * size] = np.r_[size : 2 * size, 0:size]
        return array[:, order]

    return _edit(value, swap)


def _constant(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(
        name=name,
        const_value=tensor,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape),
    )
    graph.register_initializer(value)
    return value


def _insert(graph: ir.Graph, value: ir.Value, make: Callable[[ir.Value], list[ir.Node]]) -> bool:
    """Put nodes between `value` and all that reads it; the last one's output stands for it."""
    users = list(value.uses())
    if not users:
        return False
    nodes = make(value)
    graph.insert_before(graph[0], nodes)
    for use in users:
        use.node.replace_input_with(use.idx, nodes[-1].outputs[0])
    return True


def _shift_positions(graph: ir.Graph) -> bool:
    inputs = {value.name: value for value in graph.inputs}

    def make(value: ir.Value) -> list[ir.Node]:
        past = ir.node("Shape", [inputs["past_key_values.0.key"]], {"start": 2, "end": 3})
        sign = ir.node("Sign", past.outputs)
        return [past, sign, ir.node("Sub", [value, sign.outputs[0]])]

    return _insert(graph, inputs["position_ids"], make)


def _roll_past(graph: ir.Graph, kind: str) -> bool:
    inputs = {value.name: value for value in graph.inputs}
    ends = [_constant(graph, f"roll.{i}", np.array([n])) for i, n in enumerate((0, 1, 1 << 40, 2))]
    zero, one, end, axis = ends

    def make(value: ir.Value) -> list[ir.Node]:
        head = ir.node("Slice", [value, zero, one, axis])
        tail = ir.node("Slice", [value, one, end, axis])
        joined = [tail.outputs[0], head.outputs[0]]
        return [head, tail, ir.node("Concat", joined, {"axis": 2})]

    return _insert(graph, inputs[f"past_key_values.1.{kind}"], make)


def _swap_concat(graph: ir.Graph) -> bool:
    for node in graph:
        names = [value.name or "" for value in node.inputs if value is not None]
        if node.op_type == "Concat" and names and names[0].startswith("past_key_values.1.key"):
            first, second = node.inputs[0], node.inputs[1]
            node.replace_input_with(0, second)
            node.replace_input_with(1, first)
            return True
    return False


def _mask(graph: ir.Graph, shift: int) -> bool:
    """Move the diagonal of the causal mask."""
    node = next((n for n in graph if n.op_type == "LessOrEqual"), None)
    if node is None:
        return False
    moved = ir.node("Add", [node.inputs[1], _constant(graph, "diagonal", np.array(shift))])
    graph.insert_before(node, moved)
    node.replace_input_with(1, moved.outputs[0])
    return True


def _window(graph: ir.Graph, window: int, other: int) -> bool:
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or value.dtype != ir.DataType.INT64:
                continue
            if node.op_type in ("Sub", "Add") and abs(int(value.const_value.numpy())) == window:
                sign = 1 if int(value.const_value.numpy()) > 0 else -1
                node.replace_input_with(index, _constant(graph, "window", np.array(sign * other)))
                return True
    return False


class DoubleGraph:
    """A float32 graph computed in float64, by ONNX's own reference: `forward` as of `CausalLM`."""

    def __init__(self, path: Path) -> None:
        model = onnx.load(path)
        self._past = [v.name for v in model.graph.input if v.name.startswith("past_key")]
        self._shapes = {
            v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input
        }
        _widen(model)
        self._names = [v.name for v in model.graph.output]
        self._inputs = {v.name for v in model.graph.input}
        self._session = ReferenceEvaluator(model)

    def forward(
        self, ids: Any, mask: Any, positions: Any, past: Any = None, *, need_present: bool = True
    ) -> Step:
        if past is None:
            shapes = (self._shapes[name] for name in self._past)
            past = [np.zeros((len(ids), shape[1], 0, shape[3])) for shape in shapes]
        feeds = dict(zip(self._past, [np.asarray(p, np.float64) for p in past], strict=True))
        feeds |= {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {name: value for name, value in feeds.items() if name in self._inputs}
        found = dict(zip(self._names, self._session.run(None, feeds), strict=True))
        logits = found.pop("logits")
        return Step(logits, list(found.values()))


def _widen(model: onnx.ModelProto) -> None:
    float_, double = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
    for tensor in model.graph.initializer:
        if tensor.data_type == float_:
            wide = onnx.numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == float_:
            value.type.tensor_type.elem_type = double
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == float_:
                attribute.i = double
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == float_:
                wide = onnx.numpy_helper.to_array(attribute.t).astype(np.float64)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(wide))
