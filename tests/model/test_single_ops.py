"""Attention and norms that a model's own code writes out, on small graphs written down."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from iq_export.model.single_ops import join_attention, join_layer_norms

ATTENTION = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[1, 2, s, 4] q, float[1, 2, t, 4] k, float[1, 2, t, 4] v, bool[1, 1, s, t] mask)
  => (float[1, 2, s, 4] y) {
  turned = Transpose <perm = [0, 1, 3, 2]> (k)
  number = Cast <to = 1> (mask)
  scores = MatMul (q, turned)
  SCALED
  shares = Softmax <axis = -1> (last)
  mixed = MatMul (shares, v)
  y = Identity (mixed)
}
"""
FORMS = {
    "scale, then mask": "scaled = Div (scores, two)\n  last = Add (scaled, number)",
    "mask, then scale": "masked = Add (scores, number)\n  last = Mul (masked, half)",
    "no scale": "last = Add (scores, number)",
}
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


def parsed(text: str) -> ir.Model:
    model = onnx.parser.parse_model(text)
    arrays = {
        "two": np.float32(2), "half": np.float32(0.5), "epsilon": np.float32(1e-3),
        "axes": np.array([-1]), "weight": np.arange(1, 7, dtype=np.float32),
    }  # fmt: skip
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(array), name)
        for name, array in arrays.items()
        if any(name in node.input for node in model.graph.node)
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize("form", FORMS)
def test_a_boolean_mask_that_is_added_hides_tokens(form: str) -> None:
    model = parsed(ATTENTION.replace("SCALED", FORMS[form]))
    join_attention(model.graph)
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert model.graph.outputs[0].producer().inputs[0] is attention.outputs[0]
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 2, n, 4)).astype(np.float32) for n in (3, 5, 5))
    mask = np.tril(np.ones((3, 5), bool), 2)[None, None]
    scores = q @ k.transpose(0, 1, 3, 2) * (1.0 if form == "no scale" else 0.5)
    weights = np.exp(np.where(mask, scores, -np.inf))
    expected = weights / weights.sum(-1, keepdims=True) @ v
    found = run(model, q=q, k=k, v=v, mask=mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_mask_of_numbers_is_left_as_it_is() -> None:
    text = ATTENTION.replace("SCALED", FORMS["no scale"]).replace("bool[1", "int64[1")
    model = parsed(text)
    join_attention(model.graph)
    assert "Attention" not in {node.op_type for node in model.graph}


def test_a_norm_without_a_bias() -> None:
    model, before = parsed(NORM), parsed(NORM)
    join_layer_norms(model)
    node = model.graph.outputs[0].producer()
    assert (node.op_type, len(node.inputs)) == ("LayerNormalization", 2)
    x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    np.testing.assert_allclose(run(model, x=x), run(before, x=x), atol=1e-5)
