"""Baselines that a bundle is measured against: what people would do without this compiler.

They are graphs in memory whose constants are computed when they are read: no weights are written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from iq_export.graph import io

if TYPE_CHECKING:
    from iq_export.pipeline import Recalled, Rewrite

_DOMAIN = "com.microsoft"


def baselines(done: Rewrite | Recalled) -> dict[str, ir.Model]:
    """The bundle's baselines by label.

    W8A8: round-to-nearest, static per-tensor absmax of the same calibration data. Int4: ONNX
    Runtime's MatMulNBits at the same block sizes. Nothing quantized, or a model that half precision
    cannot hold: plain half precision.
    """
    from iq_export.pipeline import plain_half, round_to_nearest

    found: dict[str, ir.Model] = {}
    if done.scale_exponent or done.recipe.weights is None:
        found["plain fp16"] = plain_half(done)
    if done.blocks:
        found["onnxruntime MatMulNBits RTN"] = _matmul_nbits(done)
    elif done.recipe.weights is not None:
        found["round-to-nearest w8a8"] = round_to_nearest(done)
    return found


def _matmul_nbits(done: Rewrite | Recalled) -> ir.Model:
    model = io.load(done.traced)
    nodes = {node.name: node for node in model.graph}
    model.opset_imports[_DOMAIN] = 1
    for linear in done.linears:
        _replace(model.graph, nodes[linear.node], done.blocks[linear.weight])
    return model


def _replace(graph: ir.Graph, product: ir.Node, block: int) -> None:
    """Let MatMulNBits take the place of a MatMul, its weight rounded by ONNX Runtime."""
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    weight = product.inputs[1]
    assert weight is not None and weight.const_value is not None
    source = weight.const_value
    config = nbits.DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True)
    quantizer = nbits.DefaultWeightOnlyQuantizer(config)
    rows, columns = source.shape.numpy()

    def constant(part: int, dtype: ir.DataType, *shape: int) -> ir.Value:
        name = f"{weight.name}.of.{product.name}.{('codes', 'scales')[part]}"
        tensor = ir.LazyTensor(
            lambda: ir.Tensor(quantizer.qbits_block_quant(source.numpy())[part], name=name),
            dtype=dtype, shape=ir.Shape(shape), name=name,
        )  # fmt: skip
        value = ir.Value(
            name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor
        )
        graph.register_initializer(value)
        return value

    count = -(-rows // block)
    codes = constant(0, ir.DataType.UINT8, columns, count, block // 2)
    scales = constant(1, ir.DataType.FLOAT, columns, count)
    node = ir.node(
        "MatMulNBits",
        [product.inputs[0], codes, scales],
        {"K": rows, "N": columns, "bits": 4, "block_size": block},
        domain=_DOMAIN,
        name=f"{product.name}_Q4",
    )
    ir.convenience.replace_nodes_and_values(
        graph, product, [product], [node], product.outputs, node.outputs
    )
    if not weight.uses():
        del graph.initializers[str(weight.name)]
