"""What code writes around latents, on small graphs written down."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from iq_export.model.latents import settle_latents

# A product of one head, whose rows are [batch, seq, 6]; and a key written into both ends of zeros.
PRODUCT = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[batch, seq, 6] x) => (float[batch, seq, 2, 2] y) {
  sizes = Concat <axis = 0> (two, one, three, six)
  head = Reshape (x, sizes)
  wide = MatMul (head, w)
  back = Concat <axis = 0> (two, three, two, two)
  y = Reshape (wide, back)
}
"""
KEY = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[batch, seq, 4] x, float[batch, seq, 2] z) => (float[batch, seq, 6] y) {
  begun = Concat <axis = 2> (x, zeros)
  plain = Slice (begun, from, to, axes)
  y = Concat <axis = 2> (plain, z)
}
"""
NUMBERS = {
    "one": [1], "two": [2], "three": [3], "six": [6], "from": [0], "to": [4], "axes": [2],
}  # fmt: skip


def made(text: str, shapes: dict[str, list[str | int]]) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    arrays = {name: np.array(value) for name, value in NUMBERS.items()}
    arrays["w"] = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    arrays["zeros"] = np.zeros((2, 3, 2), np.float32)
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in arrays.items() if name in read
    )
    model.graph.value_info.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    )
    return model


def settled(model: onnx.ModelProto) -> ir.Model:
    changed = ir.from_proto(model)
    settle_latents(changed.graph)
    feeds = {
        value.name: np.random.default_rng(1).normal(size=(2, 3, shape)).astype(np.float32)
        for value in model.graph.input
        for shape in [value.type.tensor_type.shape.dim[2].dim_value]
    }
    found = [
        onnxruntime.InferenceSession(each.SerializeToString()).run(None, feeds)[0]
        for each in (model, ir.to_proto(changed))
    ]
    np.testing.assert_array_equal(*found)
    return changed


def test_a_product_of_one_head_reads_the_rows() -> None:
    shapes = {"head": ["batch", 1, "seq", 6], "wide": ["batch", 1, "seq", 4]}
    changed = settled(made(PRODUCT, shapes))
    product = next(node for node in changed.graph if node.op_type == "MatMul")
    assert product.inputs[0] is changed.graph.inputs[0]
    assert [str(size) for size in product.outputs[0].shape] == ["batch", "seq", "4"]


def test_a_product_that_something_else_reads_stays() -> None:
    shapes = {"head": ["batch", 1, "seq", 6], "wide": ["batch", 1, "seq", 4]}
    model = made(PRODUCT.replace("y = Reshape (wide, back)", "y_ = Relu (wide)\n"
                 "  y = Reshape (y_, back)"), shapes)  # fmt: skip
    product = next(node for node in settled(model).graph if node.op_type == "MatMul")
    made_by = product.inputs[0].producer()
    assert made_by is not None and made_by.op_type == "Unsqueeze"


@pytest.mark.parametrize(("to", "taken"), [(4, True), (3, False), (5, False)])
def test_a_part_that_is_taken_back_is_read_from_there(to: int, taken: bool) -> None:
    model = made(KEY, {"begun": ["batch", "seq", 6], "plain": ["batch", "seq", to]})
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = to + 2
    for value in model.graph.initializer:
        if value.name == "to":
            value.CopyFrom(onnx.numpy_helper.from_array(np.array([to]), "to"))
    joined = next(node for node in settled(model).graph if node.outputs[0].name == "y")
    assert (joined.inputs[0].name == "x") is taken
