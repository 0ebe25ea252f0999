"""Place QuantizeLinear/DequantizeLinear pairs (placement as TensorRT fuses it).

- One pair per activation tensor, shared by all products that read it, straight in front of them;
  SinkClampInsert stands before it, never between DequantizeLinear and MatMul.
- Weights become constants behind a DequantizeLinear; how, their format knows.
- Norms, attention products, activations functions, embeddings and the LM head are not touched.

Precondition: float32 graph, scales from the plan. Postcondition: every product named in the plan
reads only DequantizeLinear outputs (activations too, if they have scales).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from iq_export.errors import GraphError
from iq_export.formats.base import StoredCodes
from iq_export.formats.rounding import Rounding
from iq_export.graph.sites import Convolution, Linear


@dataclass(frozen=True)
class QuantizePlan:
    """What to quantize, in which formats. `scales`: value name -> that of an activation.

    `importance`: weight name -> float32 `[in]`. `codes`: by weight name, where they are rounded
    already.
    """

    linears: tuple[Linear, ...]
    rounding: Rounding
    scales: Mapping[str, float] = field(default_factory=dict)
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)
    codes: Mapping[str, StoredCodes] = field(default_factory=dict)


def quantize(model: ir.Model, plan: QuantizePlan) -> bool:
    """Rewrite all products of `plan`; returns whether the graph changed.

    Raises GraphError for a graph of an opset that does not know a format's type.
    """
    weights, activations = plan.rounding.weights, plan.rounding.activations
    if weights is None and activations is None:
        return False
    _check_opset(model, plan.rounding)
    graph = model.graph
    nodes = {node.name: node for node in graph}
    dequantized: dict[str, ir.Value] = {}
    for linear in plan.linears:
        node = nodes[linear.node]
        value, weight = node.inputs[0], node.inputs[1]
        assert value is not None and value.name is not None and weight is not None
        if activations is not None and value.name in plan.scales:
            if value.name not in dequantized:
                scale = plan.scales[value.name]
                dequantized[value.name] = activations.write(graph, value, scale)
            node.replace_input_with(0, dequantized[value.name])
        if weights is not None:
            importance, stored = plan.importance.get(linear.weight), plan.codes.get(linear.weight)
            new = weights.write(graph, weight, node, importance=importance, stored=stored)
            node.replace_input_with(1, new)
    RemoveUnusedNodesPass()(model)  # the float weights
    return bool(plan.linears)


def quantize_convolutions(
    model: ir.Model,
    convolutions: Sequence[Convolution],
    rounding: Rounding,
    scales: Mapping[str, float],
) -> bool:
    """Rewrite those that read a value in `scales`; returns whether the graph changed. A weight has
    one scale per output channel; a bias stays as it is."""
    weights, activations = rounding.weights, rounding.activations
    nodes = {node.name: node for node in model.graph}
    dequantized: dict[str, ir.Value] = {}
    written: dict[tuple[str, int], ir.Value] = {}  # convolutions may share a weight
    for each in convolutions:
        if activations is None or weights is None or each.input not in scales:
            continue
        node = nodes[each.node]
        value, weight = node.inputs[0], node.inputs[1]
        assert value is not None and weight is not None
        if each.input not in dequantized:
            dequantized[each.input] = activations.write(model.graph, value, scales[each.input])
        node.replace_input_with(0, dequantized[each.input])
        key = (str(weight.name), each.axis)
        if key not in written:
            written[key] = weights.write_channels(model.graph, weight, node, each.axis)
        node.replace_input_with(1, written[key])
    RemoveUnusedNodesPass()(model)
    return bool(dequantized)


def _check_opset(model: ir.Model, rounding: Rounding) -> None:
    opset = model.opset_imports.get("", 0)
    for found in (rounding.weights, rounding.activations):
        if found is not None and opset < found.opset:
            raise GraphError(
                f"The graph has opset {opset}, and {found.type_name} {found.role} need "
                f"{found.opset}: use a newer opset, or another recipe."
            )
