"""GELU and SiLU that are written out, in any spelling: recognised by their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iq_export.model.written_out import insert, replace, scalar

Values = NDArray[np.float64]

_POINTS = np.linspace(-6, 6, 97)
# Constants are rounded to float32; the two forms of GELU differ by 4e-4.
_TOLERANCE = 2e-6
_BEFORE, _AFTER = 6, 5  # nodes in front of an anchor and behind it

_erf = np.vectorize(math.erf, otypes=[np.float64])
_OPS: dict[str, Callable[..., Values]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Pow": np.power,
    "Neg": np.negative, "Reciprocal": np.reciprocal, "Erf": _erf, "Tanh": np.tanh, "Exp": np.exp,
}  # fmt: skip


def _sigmoid(x: Values) -> Values:
    return 1 / (1 + np.exp(-x))


def _gelu(place: ir.Node, x: ir.Value) -> ir.Value:
    return insert(place, "Gelu", [x], {"approximate": "none"})


def _gelu_tanh(place: ir.Node, x: ir.Value) -> ir.Value:
    return insert(place, "Gelu", [x], {"approximate": "tanh"})


def _silu(place: ir.Node, x: ir.Value) -> ir.Value:
    return insert(place, "Mul", [x, insert(place, "Sigmoid", [x])])


# The op that every spelling has once -> what the function is, and how it is made.
_FORMS: dict[str, tuple[Values, Callable[[ir.Node, ir.Value], ir.Value]]] = {
    "Erf": (_POINTS * (1 + _erf(_POINTS / math.sqrt(2))) / 2, _gelu),
    "Tanh": (
        _POINTS * (1 + np.tanh(math.sqrt(2 / math.pi) * (_POINTS + 0.044715 * _POINTS**3))) / 2,
        _gelu_tanh,
    ),
    "Exp": (_POINTS * _sigmoid(_POINTS), _silu),
}


def fuse_activations(graph: ir.Graph) -> int:
    """Replace each of `_FORMS`; returns how many were.

    Between x and the result stand elementwise ops and scalars alone, so the result is a function of
    one number: it is computed at some points, and compared.
    """
    count = 0
    for node in list(graph):
        if node.op_type not in _FORMS or node.graph is None:
            continue
        expected, make = _FORMS[node.op_type]
        for x, out in _candidates(node):
            found = _value(out, {x: _POINTS})
            if found is not None and np.allclose(found, expected, rtol=0, atol=_TOLERANCE):
                last = out.producer()
                assert last is not None
                replace(last, make(last, x))
                count += 1
                break
    return count


def _candidates(anchor: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Pairs of values in front of and behind `anchor`, the nearest first."""
    before: list[ir.Value] = []
    edge = [anchor.inputs[0]]
    for _ in range(_BEFORE):
        edge = [v for v in dict.fromkeys(edge) if v is not None and v not in before]
        before += [value for value in edge if scalar(value) is None]
        makers = [node for v in edge if (node := v.producer()) and node.op_type in _OPS]
        edge = [value for node in makers for value in node.inputs]
    after: list[ir.Value] = []
    edge = [anchor.outputs[0]]
    for _ in range(_AFTER):
        users = [use.node for v in edge for use in v.uses() if use.node.op_type in _OPS]
        edge = [value for node in dict.fromkeys(users) for value in node.outputs]
        after += edge
    yield from ((x, out) for out in after for x in before)


def _value(value: ir.Value | None, known: dict[ir.Value, Values]) -> Values | None:
    """The value where `known` is given; None if it depends on more than that and scalars."""
    if value is None:
        return None
    if value not in known:
        number, node = scalar(value), value.producer()
        if number is not None:
            known[value] = np.float64(number) * np.ones_like(_POINTS)
        elif node is None or node.op_type not in _OPS:
            return None
        else:
            operands = [_value(operand, known) for operand in node.inputs]
            if any(operand is None for operand in operands):
                return None
            with np.errstate(all="ignore"):
                known[value] = _OPS[node.op_type](*operands)
    return known[value]
