"""Codes in a graph that is measured: the same numbers, and int8 products of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from iq_export.formats import qdq
from iq_export.formats.int8_weights import INT8_WEIGHTS
from iq_export.run import ort

ROWS, WIDTH, OUT, SCALE = 40, 64, 32, 0.05


def two_products(rng: np.random.Generator, *, out: bool = False) -> ir.Model:
    """Two products that read one quantized activation; `out`: the graph gives its codes out."""
    x = ir.val("x", ir.DataType.FLOAT, [ROWS, WIDTH])
    start = ir.node("Identity", [x], name="start")
    start.outputs[0].name, start.outputs[0].dtype = "start", ir.DataType.FLOAT
    graph = ir.Graph([x], [], nodes=[start], opset_imports={"": 23}, name="two")
    value = qdq.activation_pair(graph, start.outputs[0], SCALE, ir.DataType.INT8, name="start")
    for name in ("a", "b"):
        weight = ir.Value(name=f"{name}.weight", const_value=None)
        weight.const_value = ir.tensor(rng.standard_normal((WIDTH, OUT)).astype(np.float32))
        product = ir.node("MatMul", [value, weight], name=name)
        product.outputs[0].name, product.outputs[0].dtype = name, ir.DataType.FLOAT
        graph.append(product)
        codes, scales = INT8_WEIGHTS.round(weight.const_value.numpy())
        stored = ir.tensor(codes, name=f"{name}.codes")
        product.replace_input_with(
            1, qdq.dequantized_weight(graph, weight, product, stored, scales, {"axis": 1})
        )
        graph.outputs.append(product.outputs[0])
    if out:
        codes_value = next(n for n in graph if n.op_type == "QuantizeLinear").outputs[0]
        graph.outputs.append(codes_value)
    return ir.Model(graph, ir_version=10)


def exact(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    codes = np.clip(np.rint(x / np.float32(SCALE)), -128, 127).astype(np.int64)
    found = []
    for name in ("a", "b"):
        tensors = (model.graph.initializers[f"{name}.{end}"] for end in ("codes", "weight.scale"))
        weight, scale = (tensor.const_value.numpy() for tensor in tensors)
        found.append((codes @ weight.astype(np.int64)) * (np.float64(np.float32(SCALE)) * scale))
    return found


@pytest.mark.parametrize("size", [1.0, 5.0])  # 5: many codes are at the ends
def test_products_of_one_activation_are_exact_and_in_int8(tmp_path: Path, size: float) -> None:
    rng = np.random.default_rng(3)
    model = two_products(rng)
    x = size * rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    right = exact(model, x)
    qdq.unsigned(model.graph)
    session = ort.model_session(model, ("CPUExecutionProvider",), "two")
    for found, wanted in zip(session.run(None, {"x": x}), right, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


def test_only_codes_that_nobody_else_reads_are_unsigned() -> None:
    rng = np.random.default_rng(3)
    for out, kind in ((False, ir.DataType.UINT8), (True, ir.DataType.INT8)):
        model = two_products(rng, out=out)
        qdq.unsigned(model.graph)
        (quantize,) = (n for n in model.graph if n.op_type == "QuantizeLinear")
        assert quantize.outputs[0].dtype == kind
        assert quantize.inputs[2].dtype == kind


def test_both_products_run_in_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor's are exact; elsewhere none does, not even one that could."""
    made = ort._session_options
    x = np.ones((ROWS, WIDTH), np.float32)

    def kernels(exact: bool) -> list[str]:
        folder = tmp_path / str(exact)
        folder.mkdir()

        def profiled(*args: object, **options: object) -> object:
            found = made(*args, **options)  # type: ignore[arg-type]
            found.enable_profiling, found.profile_file_prefix = True, str(folder / "run")
            return found

        monkeypatch.setattr(ort, "_session_options", profiled)
        monkeypatch.setattr(ort, "_exact_int8", lambda: exact)
        session = ort.model_session(
            two_products(np.random.default_rng(3)), ("CPUExecutionProvider",), "two"
        )
        session.run(None, {"x": x})
        events = json.loads(Path(session.end_profiling()).read_text())
        return [e["args"]["op_name"] for e in events if e["name"].endswith("_kernel_time")]

    assert kernels(True).count("MatMulIntegerToFloat") == 2
    assert kernels(False).count("MatMul") == 2
