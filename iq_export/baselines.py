"""Baselines that a bundle is measured against: what people would do without this compiler.

They are graphs in memory whose constants are computed when they are read: no weights are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir

from iq_export.formats.int8_activations import INT8
from iq_export.formats.rounding import W8A8, Rounding
from iq_export.graph import io
from iq_export.graph.edit import copied
from iq_export.graph.sites import Sites
from iq_export.observe.walk import Graph
from iq_export.passes.order import begin
from iq_export.passes.quantize import QuantizePlan, quantize
from iq_export.passes.to_half import to_half

if TYPE_CHECKING:
    from iq_export.pipeline import Rewrite
    from iq_export.saved_decisions import Recalled

_DOMAIN = "com.microsoft"


def baselines(done: Rewrite | Recalled) -> dict[str, ir.Model]:
    """The bundle's baselines by label.

    W8A8: round-to-nearest, static per-tensor absmax of the same calibration data. Int4: ONNX
    Runtime's MatMulNBits at the same block sizes. Nothing quantized, or a model that half precision
    cannot hold: plain half precision.
    """
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


def plain_half(rewrite: Rewrite | Recalled) -> ir.Model:
    """The baseline: the traced graph in half precision, whatever becomes of it."""
    model = io.load(rewrite.traced)
    to_half(model)
    return model


def round_to_nearest(rewrite: Rewrite | Recalled) -> ir.Model:
    """The baseline: the traced graph, absmax of all calibration tokens, nothing else."""
    scales = {name: INT8.scale(absmax) for name, absmax in rewrite.absmax.items() if absmax}
    base, _ = begin(io.load(rewrite.traced))
    model = quantized_graph(base.model, base.sites, scales)
    if rewrite.chosen.half:
        to_half(model)
    return model


def quantized_graph(
    source: Graph,
    sites: Sites,
    scales: Mapping[str, float],
    rounding: Rounding = W8A8,
) -> ir.Model:
    """The float32 graph `source` with its weights rounded to nearest when it is saved; `scales` are
    those of activations."""
    model = copied(source) if isinstance(source, ir.Model) else io.load(source)
    quantize(model, QuantizePlan(tuple(sites.linears), rounding, scales))
    return model
