"""A norm as a model's own code writes it, which no exporter of layers does."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from iq_export.model.fuse_norms import fuse_norms

NORM = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[b, s, 6] x) => (float[b, s, 6] y) {
  mean = ReduceMean <keepdims = 1> (x, axes)
  away = Sub (x, mean)
  square = Pow (away, two)
  variance = ReduceMean <keepdims = 1> (square, axes)
  more = Add (variance, epsilon)
  size = Sqrt (more)
  inverse = Reciprocal (size)
  unit = Mul (away, inverse)
  y = Mul (weight, unit)
}
"""


def parsed(text: str = NORM) -> ir.Model:
    model = onnx.parser.parse_model(text)
    arrays = {
        "two": np.float32(2), "epsilon": np.float32(1e-3), "axes": np.array([-1]),
        "weight": np.arange(1, 7, dtype=np.float32),
    }  # fmt: skip
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return np.asarray(session.run(None, {"x": x})[0])


def test_a_norm_without_a_bias() -> None:
    model, before = parsed(), parsed()
    fuse_norms(model)
    node = model.graph.outputs[0].producer()
    assert node is not None
    assert node.op_type == "LayerNormalization" and not any(node.inputs[2:])
    x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    np.testing.assert_allclose(run(model, x), run(before, x), atol=1e-5)


PLAIN = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[b, s, 6] x) => (float[b, s, 6] y) {
  square = Pow (x, two)
  mean = ReduceMean <keepdims = 1> (square, axes)
  more = Add (mean, epsilon)
  size = Sqrt (more)
  inverse = Reciprocal (size)
  unit = Mul (x, inverse)
  y = Sigmoid (unit)
}
"""


def test_a_norm_without_a_weight_has_one_of_ones() -> None:
    """Later steps fold what they like into it."""
    model, before = parsed(PLAIN), parsed(PLAIN)
    fuse_norms(model)
    node = model.graph.outputs[0].producer().inputs[0].producer()
    assert node.op_type == "RMSNormalization"
    weight = node.inputs[1]
    assert weight.is_initializer() and weight.const_value.numpy().tolist() == [1] * 6
    x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    np.testing.assert_allclose(run(model, x), run(before, x), atol=1e-5)
