"""Apply the power of two in an attention's scale to the query, before the product with the keys.

`Attention` scales behind its product: without the scale, q.k may be larger than half precision's
largest number where the scores themselves are not, and what a softmax makes of infinities is NaN.
A power of two changes no digit. It is a product of its own and not folded into the weight in front,
which would make the scale of an int8 weight smaller than half can hold; a backend fuses it with
what stands before it. What is left of the scale lies in [1, 2), so that no product is larger than
its score.

Postcondition: the same function, to the bit unless a query is subnormal; one node more for each
attention.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from iq_export.graph.attention import attention_scale
from iq_export.graph.edit import constant


def scale_queries(model: ir.Model, attentions: Collection[str]) -> list[str]:
    """Rewrite the `Attention` nodes named; returns those whose scale has a power of two to move."""
    changed = []
    for node in list(model.graph):
        if node.name in attentions and attention_scale(node) < 1:
            _scale(model.graph, node)
            changed.append(str(node.name))
    return changed


def _scale(graph: ir.Graph, node: ir.Node) -> None:
    scale, query = attention_scale(node), node.inputs[0]
    assert query is not None
    factor = 2.0 ** math.floor(math.log2(scale))
    name = f"{node.name}/scale_query"
    power = constant(graph, f"{name}.factor", np.array(factor, np.float32))
    product = ir.node("Mul", [query, power], name=name)
    scaled = product.outputs[0]
    scaled.name, scaled.dtype, scaled.shape = f"{name}/out", query.dtype, query.shape
    graph.insert_before(node, product)
    node.replace_input_with(0, scaled)
    node.attributes["scale"] = ir.AttrFloat32("scale", scale / factor)
