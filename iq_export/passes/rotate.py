"""Rotate the down-projection input by a block Hadamard matrix, its transpose in the weight.

`x W = (x H)(H^T W)` for an orthogonal H. The rotated activation has no channel that stands out, so
a per-tensor int8 range wastes little (QuaRot's online rotation, arXiv 2404.00456). As standard ops
the product costs `block / out_features` of the down-projection's own multiplications.

Postcondition: the same function; the value before the rotation keeps its name, so the sinks are
detected and clamped on unrotated values.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from iq_export.graph.edit import own_constant, recompute, shared_constant
from iq_export.graph.sites import Linear


def hadamard(size: int) -> np.ndarray:
    """Orthonormal symmetric Hadamard matrix (Sylvester), float32 `[size, size]`, size = 2^n."""
    matrix = np.ones((1, 1), np.float32)
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    if matrix.shape[0] != size:
        raise ValueError(f"a Hadamard matrix of Sylvester's form needs a power of two, not {size}")
    return matrix / np.float32(np.sqrt(size))


def rotate(model: ir.Model, rotations: Mapping[str, tuple[Linear, int]]) -> bool:
    """Rotate the inputs of the products in `rotations` (node name -> product, block size)."""
    graph = model.graph
    nodes = {node.name: node for node in graph}
    for name, (_, block) in rotations.items():
        node = nodes[name]
        value, weight = node.inputs[0], own_constant(graph, node, 1)
        assert value is not None
        node.replace_input_with(0, rotated_value(graph, value, block, f"{name}/rotate"))
        recompute(weight, partial(rotate_rows, block=block))
    return bool(rotations)


def rotated_value(graph: ir.Graph, value: ir.Value, block: int, name: str) -> ir.Value:
    """`value H` block by block as standard ops, right after `value`; its readers stay as they are.

    The value may be a residual that later nodes read too, hence the place.
    """
    matrix = shared_constant(graph, f"iq.hadamard.{block}", hadamard(block))
    width = value.shape[-1]
    assert isinstance(width, int)
    groups = width // block
    split = shared_constant(
        graph, f"iq.split.{groups}.{block}", np.array([0, 0, groups, block], np.int64)
    )
    join = shared_constant(graph, f"iq.join.{width}", np.array([0, 0, width], np.int64))
    apart = ir.node("Reshape", [value, split], name=f"{name}_split")
    turned = ir.node("MatMul", [apart.outputs[0], matrix], name=name)
    joined = ir.node("Reshape", [turned.outputs[0], join], name=f"{name}_join")
    for new in (apart, turned, joined):
        new.outputs[0].name = f"{new.name}.out"
        new.outputs[0].dtype = value.dtype
    joined.outputs[0].shape = value.shape
    graph.insert_after(value.producer(), [apart, turned, joined])
    return joined.outputs[0]


def rotate_rows(weight: np.ndarray, block: int) -> np.ndarray:
    """`H^T W` block by block: `[in, out]` -> `[in, out]`."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // block, block, columns)
    return np.matmul(hadamard(block).T, blocks).reshape(rows, columns)


def rotate_columns(rows: np.ndarray, block: int) -> np.ndarray:
    """`x H` block by block: `[tokens, features]` -> `[tokens, features]`."""
    tokens, features = rows.shape
    return (rows.reshape(tokens, features // block, block) @ hadamard(block)).reshape(rows.shape)
