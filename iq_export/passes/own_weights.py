"""Give every product of the blocks a weight of its own, where the file has one for several.

Layers may share their weights, and exporters merge equal constants. But a smoothing factor, a
rotation and the codes of a rounded weight belong to one product: they depend on what it reads.
What is decided is filed under the weight's name, so a name must mean one product.

Postcondition: the same function; no weight of `sites` has a second reader. The copies are names for
the same bytes of the data file. `find_sites` finds the new names.
"""

from __future__ import annotations

import onnx_ir as ir

from iq_export.graph.edit import own_constant
from iq_export.graph.sites import Sites


def own_weights(model: ir.Model, sites: Sites) -> list[str]:
    """Copy every weight that another node reads too; returns the products' node names."""
    nodes = {node.name: node for node in model.graph}
    changed = []
    for linear in sites.linears:
        if len(nodes[linear.node].inputs[1].uses()) > 1:
            own_constant(model.graph, nodes[linear.node], 1)
            changed.append(linear.node)
    return changed
