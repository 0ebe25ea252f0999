"""Mixtures of experts: traced as marks, written out as one MLP for each expert.

transformers holds the weights of all experts of a layer as one tensor, and leaves to whoever
registers a function how they are multiplied. Ours marks where tokens go to their experts, the
products there, and where they come back; what stands between (gates, activations) is traced as it
is written. `write_experts` makes of the marks what a graph has:

- The pairs of a token and an expert that it chose are counted into places, expert by expert: a
  CumSum and a ScatterElements, since TensorRT for RTX has no NonZero, and its TopK is short.
- Each expert takes its tokens (Slice, Gather), and its products are MatMuls with `[in, out]`
  weights on `[1, rows, features]`; there may be no rows.
- Their results are joined, brought back in the order of the pairs, and summed by the router's
  weights.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from iq_export.graph.edit import shared_constant
from iq_export.graph.stored import StoredTensor
from iq_export.model.scopes import SCOPES

EXPERTS = "iq_export_onnx"
DOMAIN = "iq_export.experts"
_TO, _FROM, _PRODUCT, _BIAS = "ToExperts", "FromExperts", "ExpertMatMul", "ExpertAdd"
# What the halves of a product are called that a Split takes apart.
_HALVES = {"gate_up_proj": ("gate_proj", "up_proj")}


def mark_experts(model: Any) -> None:
    """Let the experts of a transformers model be marked when it is traced, if it has some that are
    given their function."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(EXPERTS, _marked)
    _set_implementation(model, EXPERTS)


def unmark_experts(model: Any) -> None:
    """Let them compute as their own code says."""
    _set_implementation(model, "eager")


def _set_implementation(model: Any, name: str) -> None:
    if any(hasattr(module, "is_concatenated") for module in model.modules()):
        model.set_experts_implementation(name)


def _marked(experts: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """transformers' experts interface: tokens `[tokens, hidden]`, the experts of each and their
    weights `[tokens, k]` -> `[tokens, hidden]`."""
    tokens, count = top_k_index.shape
    rows = tokens * count

    def product(value: Any, name: str) -> Any:
        weight = getattr(experts, name)
        turned = experts.is_transposed
        shape = (1, rows, weight.shape[2 if turned else 1])
        made = _mark(_PRODUCT, [value, weight], shape, transposed=int(turned))
        if experts.has_bias:
            made = _mark(_BIAS, [made, getattr(experts, f"{name}_bias")], shape)
        return made

    hidden = hidden_states.shape[-1]
    value = _mark(_TO, [hidden_states, top_k_index], (1, rows, hidden))
    if experts.has_gate:
        value = experts._apply_gate(product(value, "gate_up_proj"))
    else:
        value = experts.act_fn(product(value, "up_proj"))
    value = product(value, "down_proj")
    if experts.has_post_expert_norm:
        value = experts.post_expert_norm(value)
    marked = [value, top_k_index, top_k_weights.to(hidden_states.dtype)]
    return _mark(_FROM, marked, (tokens, hidden), experts=experts.num_experts)


def _mark(kind: str, inputs: list[Any], shape: tuple[Any, ...], **attributes: int) -> Any:
    import torch

    kept: dict[str, Any] = dict(attributes)
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", inputs, kept, dtype=inputs[0].dtype, shape=shape, version=1
    )


def marked(graph: ir.Graph) -> bool:
    """Whether experts were traced."""
    return any(node.domain == DOMAIN for node in graph)


def write_experts(graph: ir.Graph) -> None:
    """Write every mark of `graph` out, in place."""
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == _FROM:
            _Mixture(graph, node).write()


class _Mixture:
    """The experts of one layer; `end` is where they give their rows back."""

    def __init__(self, graph: ir.Graph, end: ir.Node) -> None:
        self.graph, self.end = graph, end
        self.begin, self.region = _region(end)
        self.count = end.attributes["experts"].as_int()
        self.scope = end.metadata_props.get(SCOPES, "")

    def write(self) -> None:
        (value, chosen), weights = self.begin.inputs, self.end.inputs[2]
        k, hidden, real = _width(chosen), _width(value), value.dtype
        rows = (1, None, hidden)
        flat = self._add("Reshape", [value, self._ints(1, -1, hidden)], real, rows)
        place, tokens, starts, ends = self._places(chosen, k)
        results = []
        for number in range(self.count):
            limits = [self._add("Gather", [each, self._ints(number)]) for each in (starts, ends)]
            taken = self._add("Slice", [tokens, *limits, self._ints(1)], shape=(1, None))
            index = self._add("Squeeze", [taken, self._ints(0)], shape=(None,))
            own = self._add("Gather", [flat, index], real, rows, axis=1)
            results.append(self._expert(number, own))
        joined = self._add("Concat", results, real, rows, axis=1)
        back = self._add("Gather", [joined, place], real, rows, axis=1)
        apart = self._add("Reshape", [back, self._ints(-1, k, hidden)], real, (None, k, hidden))
        column = self._add("Unsqueeze", [weights, self._ints(2)], weights.dtype, (None, k, 1))
        weighed = self._add("Mul", [apart, column], real, (None, k, hidden))
        total = self._add("ReduceSum", [weighed, self._ints(1)], real, keepdims=0)
        total.shape = self.end.outputs[0].shape
        self.end.outputs[0].replace_all_uses_with(total)
        self.graph.remove([self.end, *reversed(self.region), self.begin], safe=True)

    def _places(self, chosen: ir.Value, k: int) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """Of every pair its place among all, `[pairs]`; of every place its token, `[1, pairs]`;
        and where each expert's places begin and end, `[experts]`."""
        zero, one = self._int(0), self._int(1)
        first, last = self._ints(0), self._ints(1)
        pairs = self._add("Reshape", [chosen, self._ints(-1)])
        column = self._add("Unsqueeze", [pairs, last])
        equal = self._add("Equal", [column, self._ints(*range(self.count))], ir.DataType.BOOL)
        hits = self._add("Cast", [equal], to=int(ir.DataType.INT64))
        ranks = self._add("CumSum", [hits, zero])
        counts = self._add("ReduceSum", [hits, first], keepdims=0)
        ends = self._add("CumSum", [counts, zero])
        starts = self._add("Sub", [ends, counts])
        placed = self._add("Sub", [self._add("Add", [ranks, starts]), one])
        place = self._add("ReduceSum", [self._add("Mul", [hits, placed]), last], keepdims=0)
        size = self._add("Squeeze", [self._add("Shape", [pairs]), first])
        numbers = self._add("Range", [zero, size, one])
        order = self._add("ScatterElements", [pairs, place, numbers], axis=0)
        tokens = self._add("Div", [order, self._int(k)])
        return place, self._add("Unsqueeze", [tokens, first]), starts, ends

    def _expert(self, number: int, own: ir.Value) -> ir.Value:
        """The result of a copy of the region for one expert, which reads its `own` rows."""
        values: dict[ir.Value | None, ir.Value] = {self.begin.outputs[0]: own}
        for node in self.region:
            if node.outputs[0] in values:
                continue  # the Split of a product that was made in halves
            self.scope = node.metadata_props.get(SCOPES, "")
            if node.domain == DOMAIN:
                self._weighted(node, number, values)
                continue
            copy = ir.Node(
                node.domain, node.op_type, [values.get(v, v) for v in node.inputs],
                list(node.attributes.values()), num_outputs=len(node.outputs),
                version=node.version, metadata_props=dict(node.metadata_props),
            )  # fmt: skip
            self.graph.insert_before(self.end, copy)
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                values[old], new.type = new, old.type
                new.dtype = old.dtype or ir.DataType.FLOAT
                if old.shape is not None:
                    new.shape = ir.Shape([1, None, *list(old.shape)[2:]])
        self.scope = self.end.metadata_props.get(SCOPES, "")
        return values[self.end.inputs[0]]

    def _weighted(
        self, node: ir.Node, number: int, values: dict[ir.Value | None, ir.Value]
    ) -> None:
        """One expert's product, in halves where a Split takes it apart, or the addition of its
        bias."""
        source = node.inputs[1]
        base, _, called = str(source.name).rpartition(".")
        read, scope = values[node.inputs[0]], self.scope
        if node.op_type == _BIAS:
            name = f"{base}.{number}.{called}"
            bias = self._part(source, number, name, slice(None), turned=False)
            width = _width(source)
            values[node.outputs[0]] = self._add("Add", [read, bias], read.dtype, (1, None, width))
            return
        turned = bool(node.attributes["transposed"].as_int())  # [in, out] as it is stored
        split = None if turned else _halved(node.outputs[0])
        outs = node.outputs if split is None else split.outputs
        names = _HALVES.get(called, (f"{called}.0", f"{called}.1")) if split else (called,)
        size = source.const_value.shape.numpy()[2 if turned else 1] // len(outs)
        for place, (name, out) in enumerate(zip(names, outs, strict=True)):
            rows = slice(place * size, (place + 1) * size)
            full = f"{base}.{number}.{name}.weight"
            weight = self._part(source, number, full, rows, turned=turned)
            self.scope = _deeper(scope, f"{number}.{name}")
            values[out] = self._add("MatMul", [read, weight], read.dtype, (1, None, size))
        values.setdefault(node.outputs[0], values[outs[0]])

    def _part(
        self, source: ir.Value, number: int, name: str, rows: slice, *, turned: bool
    ) -> ir.Value:
        """An initializer for one expert's matrix, or some of its rows, as `[in, out]`; or for its
        vector."""
        tensor = source.const_value
        shape = tuple(tensor.shape.numpy())[1:]
        start, stop, _ = rows.indices(shape[0]) if not turned else (0, shape[0], 1)
        flip = len(shape) == 2 and not turned
        made: ir.LazyTensor
        if isinstance(tensor, StoredTensor):
            place = tensor.place.part(number, start, stop)
            made = StoredTensor(place, name, transposed=flip)
        else:
            wanted = (stop - start, *shape[1:])

            def read() -> ir.Tensor:
                array = tensor.numpy()[number, start:stop]
                return ir.Tensor(np.ascontiguousarray(array.T if flip else array), name=name)

            made = ir.LazyTensor(
                read, dtype=tensor.dtype, shape=ir.Shape(wanted[::-1] if flip else wanted),
                name=name,
            )  # fmt: skip
        value = ir.Value(
            name=name, shape=made.shape, type=ir.TensorType(made.dtype), const_value=made
        )
        self.graph.initializers.add(value)
        return value

    def _add(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType | None = ir.DataType.INT64,
        shape: Sequence[int | None] | None = None,
        **attributes: int,
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        node.metadata_props[SCOPES] = self.scope
        out = node.outputs[0]
        out.dtype = dtype
        out.shape = None if shape is None else ir.Shape(shape)
        self.graph.insert_before(self.end, node)
        return out

    def _ints(self, *values: int) -> ir.Value:
        array = np.array(values, np.int64)
        return shared_constant(self.graph, f"ints_{'_'.join(map(str, values))}", array)

    def _int(self, value: int) -> ir.Value:
        return shared_constant(self.graph, f"int_{value}", np.array(value, np.int64))


def _width(value: ir.Value) -> int:
    """The size of its last axis."""
    size = None if value.shape is None else value.shape[-1]
    assert isinstance(size, int)
    return size


def _region(end: ir.Node) -> tuple[ir.Node, list[ir.Node]]:
    """Where the tokens of `end` go to their experts, and what stands between, in graph order."""
    begin, seen = None, set()
    todo = [end.inputs[0].producer()]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.domain == DOMAIN and node.op_type == _TO:
            begin = node
        else:
            todo += [value.producer() for value in node.inputs if value is not None]
    assert begin is not None and end.graph is not None
    behind, region = {begin}, []
    for node in end.graph:
        if node in seen and any(v is not None and v.producer() in behind for v in node.inputs):
            behind.add(node)
            region.append(node)
    return begin, region


def _halved(value: ir.Value) -> ir.Node | None:
    """The Split that alone reads `value`, and takes its last axis apart in the middle."""
    nodes = value.consumers()
    if len(nodes) != 1 or nodes[0].op_type != "Split" or len(nodes[0].outputs) != 2:
        return None
    axis = nodes[0].attributes.get("axis")
    widths = {None if out.shape is None else out.shape[-1] for out in nodes[0].outputs}
    last = axis is not None and axis.as_int() in (-1, 2)
    return nodes[0] if last and len(widths) == 1 and widths != {None} else None


def _deeper(scope: str, name: str) -> str:
    """The scope of a module called `name` inside."""
    scopes = ast.literal_eval(scope) if scope else [""]
    inner = f"{scopes[-2]}.{name}" if len(scopes) > 1 else name
    return repr([*scopes[:-1], inner, scopes[-1]])
