"""Attention that is written out, found from its Softmax, as one op that keeps keys and values with
their own heads."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from iq_export.graph.edit import shared_constant
from iq_export.model.written_out import constant_of, insert, made_by, replace, scalar, scaled

# A score that is lower than all others by this is never attended to.
_NEVER = -1e4


@dataclass
class _Scores:
    """What is added to `query @ keys * factor` in front of a Softmax, and the mask that chooses."""

    product: ir.Node
    factor: float = 1.0
    added: list[ir.Value] = field(default_factory=list)
    allowed: ir.Value | None = None  # boolean, true: attend
    forbidden: ir.Value | None = None  # boolean, true: do not


def fuse_attention(model: ir.Model) -> int:
    """Replace each attention of `[batch, heads, seq, head_dim]`; returns how many were."""
    count = 0
    for node in list(model.graph):
        if node.op_type == "Softmax" and _is_last_axis(node):
            count += _fuse(node)
    if count:
        common.RemoveUnusedNodesPass()(model)
        common.ShapeInferencePass()(model)
    return count


def _is_last_axis(softmax: ir.Node) -> bool:
    axis = softmax.attributes.get("axis")
    shape = softmax.outputs[0].shape
    return axis is None or axis.as_int() in (-1, len(shape or ()) - 1)


def _fuse(softmax: ir.Node) -> bool:
    out = _weighted(softmax.outputs[0])
    scores = _scores(softmax.inputs[0])
    if out is None or scores is None or out.inputs[1] is None:
        return False
    query, query_factor = _unscaled(scores.product.inputs[0])
    turned, key_factor = _unscaled(scores.product.inputs[1])
    key = _key(turned, out)
    if key is None:
        return False
    key, key_more = _unscaled(key)
    key, value = _own_heads(key, out.inputs[1])
    heads, key_heads, value_heads = map(_heads, (query, key, value))
    if not heads or not key_heads or key_heads != value_heads or heads % key_heads:
        return False
    if not _spread(scores) or _batch(key) != _batch(query):
        return False
    factor = scores.factor * query_factor * key_factor * key_more
    made = insert(out, "Attention", [query, key, value, *_mask(scores, out)], {"scale": factor})
    replace(out, made)
    return True


def _spread(scores: _Scores) -> bool:
    """Whether the masks together have a column for each key and a row for each query, as the op of
    ONNX Runtime needs it."""
    masks = [v for v in (*scores.added, scores.allowed, scores.forbidden) if v is not None]
    shapes = [tuple(mask.shape) for mask in masks if mask.shape is not None]
    if len(shapes) < len(masks):
        return False
    return not masks or all(
        any(len(shape) >= -axis and shape[axis] != 1 for shape in shapes) for axis in (-1, -2)
    )


def _batch(value: ir.Value) -> object:
    """1 for a batch that is stretched over all rows."""
    shape = value.shape
    return 1 if shape is not None and shape[0] == 1 else None


def _weighted(weights: ir.Value) -> ir.Node | None:
    """The MatMul of the attention's weights, which may be zeros where they are NaN, and values."""
    for use in weights.uses():
        guard = use.node
        if guard.op_type == "Where" and guard.inputs[2] is weights and scalar(guard.inputs[1]) == 0:
            test = made_by(guard.inputs[0], "IsNaN")
            if test is not None and test.inputs[0] is weights and len(weights.uses()) == 2:
                return _weighted(guard.outputs[0])
    uses = list(weights.uses())
    if len(uses) != 1 or weights.is_graph_output():
        return None
    node = uses[0].node
    return node if node.op_type == "MatMul" and uses[0].idx == 0 else None


def _scores(value: ir.Value | None) -> _Scores | None:
    """What stands between `value` and the product of queries and keys."""
    node = None if value is None else value.producer()
    if node is None or value is None:
        return None
    if node.op_type == "MatMul":
        computed = not any(operand.is_initializer() for operand in node.inputs)
        return _Scores(node) if computed else None
    if (found := scaled(value)) is not None:
        scores = _scores(found[0])
        if scores is None or scores.added:
            return None  # what was added would be scaled as well
        scores.factor *= found[1]
        return scores
    if node.op_type == "Add":
        for one, other in (node.inputs, reversed(node.inputs)):
            scores = _scores(one)
            if scores is not None and other is not None:
                return _add(scores, other)
    if node.op_type == "Where":
        condition, one, other = node.inputs
        if _is_never(other) and (scores := _scores(one)) is not None:
            return _choose(scores, condition, allowed=True)
        if _is_never(one) and (scores := _scores(other)) is not None:
            return _choose(scores, condition, allowed=False)
    return None


def _add(scores: _Scores, mask: ir.Value) -> _Scores | None:
    """A mask of zeros and very low values chooses; anything else is added."""
    where = made_by(mask, "Where")
    if where is not None:
        condition, one, other = where.inputs
        if scalar(one) == 0 and _is_never(other):
            return _choose(scores, condition, allowed=True)
        if scalar(other) == 0 and _is_never(one):
            return _choose(scores, condition, allowed=False)
    scores.added.append(mask)
    return scores


def _choose(scores: _Scores, condition: ir.Value | None, *, allowed: bool) -> _Scores | None:
    if scores.allowed is not None or scores.forbidden is not None:
        return None
    if allowed:
        scores.allowed = condition
    else:
        scores.forbidden = condition
    return scores


def _is_never(value: ir.Value | None) -> bool:
    number = scalar(value)
    return number is not None and number <= _NEVER


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    factor = 1.0
    while (found := scaled(value)) is not None:
        value, factor = found[0], factor * found[1]
    return value, factor


def _key(turned: ir.Value, place: ir.Node) -> ir.Value | None:
    """The keys `[batch, heads, total, head_dim]` of which `turned` has the last axes exchanged."""
    node = turned.producer()
    if node is None:
        return None
    if node.op_type == "Transpose":
        order = _order(node)
        if order == [0, 1, 3, 2]:
            return node.inputs[0]
        if order == [0, 2, 3, 1]:
            key = insert(place, "Transpose", [node.inputs[0]], {"perm": [0, 2, 1, 3]})
            if (shape := turned.shape) is not None:
                key.shape = ir.Shape([shape[0], shape[1], shape[3], shape[2]])
            return key
    if node.op_type == "Reshape":  # all heads of a batch as one axis for the time of a Transpose
        inner = made_by(node.inputs[0], "Transpose")
        flat = made_by(inner.inputs[0], "Reshape") if inner is not None else None
        if flat is not None and inner is not None and _order(inner) == [0, 2, 1]:
            key = flat.inputs[0]
            before, after = key.shape, turned.shape
            if before is not None and after is not None and len(before) == len(after) == 4:
                return key if (before[1], before[3]) == (after[1], after[2]) else None
    return None


def _order(transpose: ir.Node) -> list[int]:
    """The order of a Transpose's axes; [] where it does not say, and turns all of them around."""
    found = transpose.attributes.get("perm")
    return [] if found is None else list(found.as_ints())


def _own_heads(key: ir.Value, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Keys and values before each of their heads was repeated for a group of query heads."""
    pair = (_unrepeated(key), _unrepeated(value))
    return pair if None not in pair else (key, value)


def _unrepeated(value: ir.Value) -> ir.Value | None:
    merge = made_by(value, "Reshape")
    expand = made_by(merge.inputs[0], "Expand") if merge is not None else None
    split = made_by(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if split is None:
        return None
    axes, own, shape = constant_of(split.inputs[1]), split.inputs[0], value.shape
    if axes is None or axes.tolist() != [2] or _heads(own) is None or _heads(value) is None:
        return None
    return own if shape is not None and own.shape[3] == shape[3] else None


def _heads(value: ir.Value | None) -> int | None:
    """How many heads `[batch, heads, seq, head_dim]` has; None for anything else."""
    match tuple(value.shape or ()) if value is not None else ():
        case (_, int(heads), _, int()):
            return heads
    return None


def _mask(scores: _Scores, place: ir.Node) -> list[ir.Value]:
    """What the op takes as a mask: nothing, what to attend to, or what to add."""
    allowed = scores.allowed
    if scores.forbidden is not None:
        allowed = insert(place, "Not", [scores.forbidden], dtype=ir.DataType.BOOL)
    if not scores.added:
        return [] if allowed is None else [allowed]
    added = scores.added[0]
    for more in scores.added[1:]:
        added = insert(place, "Add", [added, more])
    if allowed is not None:
        assert place.graph is not None
        never = shared_constant(place.graph, "never", np.array(_NEVER, np.float32))
        added = insert(place, "Where", [allowed, added, never])
    return [added]
