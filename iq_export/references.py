"""Baselines that a bundle is measured against: what people would do without this compiler."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iq_export.compile import CompileOptions
    from iq_export.rewrite import Recalled, Rewrite


def write_baselines(done: Rewrite | Recalled, options: CompileOptions) -> dict[str, Path]:
    """Write the bundle's baselines into the work folder: label -> file.

    W8A8: round-to-nearest, static per-tensor absmax of the same calibration data. Int4: ONNX
    Runtime's MatMulNBits at the same block sizes. Nothing quantized, or a model that half precision
    cannot hold: plain half precision.
    """
    from iq_export.rewrite import plain_half, round_to_nearest

    folder = done.quantized.parent
    found: dict[str, Path] = {}
    if done.scale_exponent or done.recipe.weights is None:
        found["plain fp16"] = folder / "plain_half.onnx"
        plain_half(done, found["plain fp16"])
    if done.blocks:
        found["onnxruntime MatMulNBits RTN"] = folder / "matmulnbits.onnx"
        _matmul_nbits(done, found["onnxruntime MatMulNBits RTN"])
    elif done.recipe.weights is not None:
        found["round-to-nearest w8a8"] = folder / "round_to_nearest.onnx"
        round_to_nearest(done, found["round-to-nearest w8a8"], options.dtype)
    return found


def _matmul_nbits(done: Rewrite | Recalled, path: Path) -> None:
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer

    logging.getLogger(matmul_nbits_quantizer.__name__).setLevel(logging.WARNING)  # a line per node
    model = onnx.load(done.traced)
    sizes = {linear.node: done.blocks[linear.weight] for linear in done.linears}
    for size in sorted(set(sizes.values())):
        # `nodes_to_include` would add to the products that it takes anyway.
        others = [
            node.name
            for node in model.graph.node
            if node.op_type == "MatMul" and sizes.get(node.name) != size
        ]
        quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
            model, block_size=size, is_symmetric=True, nodes_to_exclude=others
        )
        quantizer.process()
        model = quantizer.model.model
    onnx.save(model, path, save_as_external_data=True, location=path.name + ".data")
