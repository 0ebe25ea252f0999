"""Give every row the same size in front of a quantizer, where a norm behind takes the size out.

A branch that ends in a norm of its own (product -> norm -> residual Add) does not depend on the
size of the product's input rows but for the norm's epsilon: nothing in training kept it, and tokens
differ in it by orders of magnitude. One static range for all of them rounds the small rows (the
sinks of such models among them) to nothing, and the norm makes that error as large as any other.

1. Each row is divided by its largest magnitude in front of the product (and of its rotation and
   quantizer), so that the static per-tensor scale suits every token.
2. The product's row is multiplied by it again: the norm's epsilon sees what it saw.

Precondition: float32 graph, before rotation and quantization. Postcondition: the same function, up
to rounding.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from iq_export.graph.edit import shared_constant
from iq_export.graph.sites import NORM_OPS, Linear, Sites

# A row of zeros (a clamped sink) stays one. Half's smallest normal number.
_LEAST = 6.1035e-05


def level_rows(model: ir.Model, sites: Sites) -> list[Linear]:
    """Level the input rows of every output product with a norm right behind; returns these. Those
    of experts stay: of no rows, ONNX Runtime's ReduceMax gives a wrong shape."""
    graph = model.graph
    nodes = {node.name: node for node in graph}
    found = []
    for route in (route for branch in sites.branches for route in branch.routes):
        if route.rows is None:
            linear, node = route.output, nodes[route.output.node]
            readers = node.outputs[0].consumers()
            if len(readers) == 1 and readers[0].op_type in NORM_OPS:
                _level(graph, node)
                found.append(linear)
    return found


def _level(graph: ir.Graph, product: ir.Node) -> None:
    least = shared_constant(graph, "level.least", np.array(_LEAST, np.float32))
    last = shared_constant(graph, "level.axis", np.array([-1], np.int64))
    value, output = product.inputs[0], product.outputs[0]
    (norm,) = output.consumers()
    name = f"{product.name}/level"
    magnitude = ir.node("Abs", [value], name=f"{name}_abs")
    peak = ir.node("ReduceMax", [magnitude.outputs[0], last], {"keepdims": 1}, name=f"{name}_peak")
    size = ir.node("Max", [peak.outputs[0], least], name=f"{name}_size")
    level = ir.node("Div", [value, size.outputs[0]], name=name)
    back = ir.node("Mul", [output, size.outputs[0]], name=f"{name}_back")
    for node, like in ((magnitude, value), (level, value), (back, output)):
        node.outputs[0].shape = like.shape
    for node in (peak, size):
        node.outputs[0].shape = ir.Shape([*value.shape[:-1], 1])
    for node in (magnitude, peak, size, level, back):
        node.outputs[0].name, node.outputs[0].dtype = f"{node.name}/out", value.dtype
    graph.insert_before(product, [magnitude, peak, size, level])
    product.replace_input_with(0, level.outputs[0])
    graph.insert_after(product, back)
    norm.replace_input_with(0, back.outputs[0])
