"""What Q/DQ compute in ONNX Runtime, against NumPy: rounding half to even, saturation, layouts.

Every scale and range in this project is chosen with the NumPy side; if the two differed, choices
would be made for another function than the one that runs.
"""

from __future__ import annotations

from functools import lru_cache

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

fast = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**16)


def quantize(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """round-half-to-even(x / scale), saturated to [-128, 127]; arithmetic in the type of x."""
    return np.clip(np.rint(x / scale), -128, 127).astype(np.int8)


def _model(
    nodes: list[onnx.NodeProto], kinds: dict[str, int], output: int, constants: dict[str, object]
) -> ort.InferenceSession:
    value = helper.make_tensor_value_info
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "qdq",
            [value(name, kind, None) for name, kind in kinds.items()],
            [value("y", output, None)],
            [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@lru_cache(maxsize=16)
def session(op: str, kind: int, axis: int | None, block: int = 0) -> ort.InferenceSession:
    attributes = {} if axis is None else {"axis": axis}
    if block:
        attributes["block_size"] = block
    inputs, constants = ["x", "scale"], {}
    source = kind if op == "QuantizeLinear" else TensorProto.INT8
    if block:
        source = TensorProto.INT4
    elif axis is None:
        constants["zero"] = np.int8(0)
        inputs.append("zero")
    elif op == "QuantizeLinear":
        attributes["output_dtype"] = TensorProto.INT8
    node = helper.make_node(op, inputs, ["y"], **attributes)
    output = TensorProto.INT8 if op == "QuantizeLinear" else kind
    return _model([node], {"x": source, "scale": kind}, output, constants)


def run(op: str, x: np.ndarray, scale: np.ndarray, axis: int | None = None) -> np.ndarray:
    half = scale.dtype == np.float16
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    feeds = {"x": np.asarray(x), "scale": np.asarray(scale)}  # ONNX Runtime takes no scalars
    return session(op, kind, axis).run(None, feeds)[0]


def scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Powers of two, so that x / scale is exact and ties are ties in both implementations."""
    return np.exp2(rng.integers(-8, 3, size=shape)).astype(dtype)


@fast
@given(seeds, st.sampled_from([np.float32, np.float16]), st.sampled_from([None, 0, 1]))
def test_quantize_rounds_half_to_even_and_saturates(
    seed: int, dtype: type, axis: int | None
) -> None:
    rng = np.random.default_rng(seed)
    x_scale = scales(rng, () if axis is None else (6,), dtype)
    spread = x_scale if axis is None else np.expand_dims(x_scale, 1 - axis)
    halves = rng.integers(-400, 400, size=(6, 6)) / 2  # half of them ties, some out of range
    x = (halves * spread).astype(dtype)
    found = run("QuantizeLinear", x, x_scale, axis)
    np.testing.assert_array_equal(found, quantize(x, spread))


@fast
@given(seeds, st.sampled_from([np.float32, np.float16]), st.sampled_from([None, 0, 1]))
def test_dequantize_is_one_product(seed: int, dtype: type, axis: int | None) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-128, 128, size=(6, 6)).astype(np.int8)
    scale = rng.uniform(1e-3, 1, size=() if axis is None else 6).astype(dtype)
    spread = scale if axis is None else np.expand_dims(scale, 1 - axis)
    found = run("DequantizeLinear", codes, scale, axis)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, codes.astype(dtype) * spread)


@fast
@given(seeds, st.floats(1e-4, 10))
def test_quantizing_any_value_is_off_by_half_a_step_at_most(seed: int, step: float) -> None:
    rng = np.random.default_rng(seed)
    scale = np.array(step, np.float32)
    x = (rng.uniform(-127, 127, size=50) * scale).astype(np.float32)
    codes = run("QuantizeLinear", x, scale)
    back = run("DequantizeLinear", codes, scale)
    assert np.abs(back - x).max() <= 0.5 * scale * (1 + 1e-5)
    # The same within a code where x / scale is a tie but for rounding.
    assert np.abs(codes.astype(int) - quantize(x, scale)).max() <= 1


def test_ties_and_saturation_by_hand() -> None:
    x = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.4, 127.5, 500, -128.5, -128.4, -500])
    expected = [0, 2, 2, 0, -2, 126, 127, 127, 127, -128, -128, -128]
    assert run("QuantizeLinear", x, np.float32(1)).tolist() == expected


@fast
@given(seeds, st.sampled_from([np.float32, np.float16]), st.sampled_from([2, 4]))
def test_int4_is_dequantized_in_blocks_along_the_reduction_axis(
    seed: int, dtype: type, block: int
) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-8, 8, size=(8, 5)).astype(ml_dtypes.int4)
    scale = rng.uniform(1e-3, 1, size=(8 // block, 5)).astype(dtype)
    kind = TensorProto.FLOAT16 if dtype is np.float16 else TensorProto.FLOAT
    node = helper.make_node("DequantizeLinear", ["codes", "x"], ["y"], axis=0, block_size=block)
    found = _model([node], {"x": kind}, kind, {"codes": codes}).run(None, {"x": scale})[0]
    expected = codes.astype(dtype) * np.repeat(scale, block, axis=0)
    np.testing.assert_array_equal(found, expected)


def test_int4_is_stored_low_nibble_first() -> None:
    tensor = numpy_helper.from_array(np.array([1, -2, 7, -8], ml_dtypes.int4), "codes")
    assert tensor.data_type == TensorProto.INT4
    assert tensor.raw_data == bytes([0xE1, 0x87])
