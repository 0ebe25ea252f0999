"""A tiny model with the three sink ops, and the TensorRT that may be missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

HIDDEN = 8
TEMPLATES = np.linspace(-90.0, 110.0, 2 * HIDDEN, dtype=np.float32).reshape(2, HIDDEN)
MakeModel = Callable[..., Path]


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


@pytest.fixture
def sink_model(tmp_path: Path) -> MakeModel:
    """Writes Detect -> ClampInsert -> MatMul -> Restore, x [batch, seq, 8] in half precision."""
    onnx = pytest.importorskip("onnx")
    from iq_export.sinks import ops

    def make(*, namespace: str = "iq", opset: int = 23, seq_axis: str = "seq") -> Path:
        attributes = {
            "domain": "iq",
            "templates": [float(v) for v in TEMPLATES.ravel()],
            "template_shape": list(TEMPLATES.shape),
            "plugin_namespace": namespace,
            "plugin_version": "1",
        }
        node = onnx.helper.make_node
        info = onnx.helper.make_tensor_value_info
        half, boolean = onnx.TensorProto.FLOAT16, onnx.TensorProto.BOOL
        rows = ["batch", seq_axis]
        graph = onnx.helper.make_graph(
            [
                node("SinkDetect", ["x", "first", "valid"], ["i"], threshold=80.0, **attributes),
                node("SinkClampInsert", ["x", "i"], ["clamped"], **attributes),
                node("MatMul", ["clamped", "w"], ["product"]),
                node("SinkRestore", ["product", "i"], ["y"], **attributes),
            ],
            "sinks",
            [
                info("x", half, [*rows, HIDDEN]),
                info("first", boolean, rows),
                info("valid", boolean, rows),
            ],
            [info("y", half, [*rows, HIDDEN])],
            initializer=[onnx.numpy_helper.from_array(np.eye(HIDDEN, dtype=np.float16), "w")],
        )
        imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("iq", 1)]
        model = onnx.helper.make_model(
            graph, functions=ops.functions(opset), opset_imports=imports, ir_version=11
        )
        onnx.checker.check_model(model)
        path = tmp_path / "sinks.onnx"
        onnx.save(model, path)
        return path

    return make


@pytest.fixture
def int4_model(tmp_path: Path) -> Path:
    """One MatMul of half activations with int4 weights, blocks of 64 on the reduction axis."""
    onnx = pytest.importorskip("onnx")
    rows, columns, block = 128, 64, 64
    weight = onnx.helper.make_tensor(
        "w", onnx.TensorProto.INT4, [rows, columns], np.resize(np.arange(-8, 8), rows * columns)
    )
    scale = np.full((rows // block, columns), 0.01, np.float16)
    half = onnx.TensorProto.FLOAT16
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node(
                "DequantizeLinear", ["w", "s"], ["f"], axis=0, block_size=block, name="proj/dq"
            ),
            onnx.helper.make_node("MatMul", ["x", "f"], ["y"], name="proj"),
        ],
        "w4a16",
        [info("x", half, ["batch", "seq", rows])],
        [info("y", half, ["batch", "seq", columns])],
        initializer=[weight, onnx.numpy_helper.from_array(scale, "s")],
    )
    imports = [onnx.helper.make_opsetid("", 21)]
    path = tmp_path / "int4.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path
