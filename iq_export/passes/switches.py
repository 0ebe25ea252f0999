"""Make every activation quantizer switchable, to measure in one session what each one costs.

Precondition: a graph after `quantize`. Postcondition: a scalar bool input per quantizer; where it
is false, the products behind it read the unrounded value. For measuring only: never shipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def switch_name(activation: str) -> str:
    """Name of the graph input that switches the quantizer of the value `activation`."""
    return f"iq.switch.{activation}"


def add_switches(model: ir.Model, activations: Sequence[str]) -> None:
    """Add a switch to the quantizer of every value in `activations`."""
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    for name in activations:
        exact, rounded = values[name], values[f"{name}.dequantized"]
        switch = ir.Value(
            name=switch_name(name), type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([])
        )
        graph.inputs.append(switch)
        choose = ir.node("Where", [switch, rounded, exact], name=f"{name}/switch")
        choose.outputs[0].name = f"{name}.switched"
        choose.outputs[0].dtype, choose.outputs[0].shape = exact.dtype, exact.shape
        for reader, position in list(rounded.uses()):
            if reader is not choose:
                reader.replace_input_with(position, choose.outputs[0])
        graph.insert_after(rounded.producer(), choose)
