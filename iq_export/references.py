"""Baselines that a bundle is measured against: what people would do without this compiler."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iq_export.compile import CompileOptions
    from iq_export.rewrite import Rewrite


def write_baseline(done: Rewrite, options: CompileOptions) -> tuple[str, Path]:
    """Write round-to-nearest at the bundle's bits into the work folder: `(label, file)`.

    W8A8: static per-tensor absmax of the same calibration data. Int4: ONNX Runtime's MatMulNBits
    at the same block sizes.
    """
    from iq_export.rewrite import round_to_nearest

    folder = done.quantized.parent
    if not done.blocks:
        round_to_nearest(done, folder / "round_to_nearest.onnx", options.dtype)
        return "round-to-nearest w8a8", folder / "round_to_nearest.onnx"
    path = folder / "matmulnbits.onnx"
    _matmul_nbits(done, path)
    return "onnxruntime MatMulNBits RTN", path


def _matmul_nbits(done: Rewrite, path: Path) -> None:
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
