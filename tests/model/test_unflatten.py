"""Products on flattened tokens, on small graphs written down."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from iq_export.model.unflatten import unflatten

# As models write it: one product between two Reshapes, whose first joins heads; a whole branch with
# its norm and residual addition; a product whose weight is transposed as it is read.
PRODUCT = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[batch, seq, 2, 3] x) => (float[batch, seq, 4] y) {
  flat = Reshape (x, flat_shape)
  product = Gemm (flat, w, b)
  y_ = Reshape (product, back)
  y = Relu (y_)
}
"""
BRANCH = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[batch, seq, 6] x) => (float[batch, seq, 6] y) {
  flat = Reshape (x, flat_shape)
  normed = LayerNormalization <axis = 1> (flat, gain)
  inner = Gemm <transB = 1> (normed, up, b)
  active = Relu (inner)
  turned = Transpose <perm = [1, 0]> (down)
  outer = MatMul (active, turned)
  total = Add (flat, outer)
  y_ = Reshape (total, back)
  y = Relu (y_)
}
"""
ODD = BRANCH.replace("Relu (inner)", "Softmax <axis = 0> (inner)")
SIZES = {"w": (6, 4), "b": (4,), "gain": (6,), "up": (4, 6), "down": (6, 4)}


def graph(text: str, width: int) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=size).astype(np.float32) for name, size in SIZES.items()}
    arrays |= {"flat_shape": np.array([-1, 6]), "back": np.array([2, 3, width])}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name)
        for name, array in arrays.items()
        if any(name in node.input for node in model.graph.node)
    )
    for name, size in (("flat", 6), ("product", 4), ("inner", 4), ("active", 4), ("total", 6),
                       ("normed", 6), ("outer", 6)):  # fmt: skip
        if any(name in node.output for node in model.graph.node):
            model.graph.value_info.append(
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", size])
            )
    model.graph.value_info.append(
        onnx.helper.make_tensor_value_info("y_", onnx.TensorProto.FLOAT, ["batch", "seq", width])
    )
    return model


def run(model: onnx.ModelProto, shape: tuple[int, ...]) -> np.ndarray:
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize(
    ("text", "shape", "width", "left"),
    [
        (PRODUCT, (2, 3, 2, 3), 4, ["Reshape", "MatMul", "Add", "Relu"]),
        (BRANCH, (2, 3, 6), 6, ["LayerNormalization", "Transpose", "MatMul", "Add", "Relu",
                                "Transpose", "MatMul", "Add", "Relu"]),
    ],
)  # fmt: skip
def test_products_read_tokens(
    text: str, shape: tuple[int, ...], width: int, left: list[str]
) -> None:
    before = graph(text, width)
    model = ir.from_proto(before)
    unflatten(model.graph)
    model.graph.sort()
    assert sorted(node.op_type for node in model.graph) == sorted(left)
    for node in model.graph:
        if node.op_type == "Reshape":  # as `tidy` settles it
            sizes = ir.tensor(np.array([0, 0, 6]), name="joined")
            value = ir.Value(name="joined", const_value=sizes, type=ir.TensorType(sizes.dtype))
            model.graph.register_initializer(value)
            node.replace_input_with(1, value)
        if node.op_type == "MatMul":
            assert [str(size) for size in node.outputs[0].shape or ()][:2] in ([], ["batch", "seq"])
    np.testing.assert_allclose(run(ir.to_proto(model), shape), run(before, shape), atol=1e-6)


def test_what_mixes_rows_stays() -> None:
    model = ir.from_proto(graph(ODD, 6))
    unflatten(model.graph)
    assert [node.op_type for node in model.graph].count("Reshape") == 2
    assert "Gemm" in {node.op_type for node in model.graph}


def test_axes_without_a_name_are_not_taken_for_each_other() -> None:
    proto = graph(BRANCH, 6)
    for value in [*proto.graph.input, *proto.graph.value_info]:
        for size in value.type.tensor_type.shape.dim:
            size.ClearField("dim_param")
    model = ir.from_proto(proto)
    unflatten(model.graph)
    assert [node.op_type for node in model.graph].count("Reshape") == 2
