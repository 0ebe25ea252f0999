"""Half precision: what becomes half, what stays, and which constants are refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime import InferenceSession

from iq_export.errors import GraphError
from iq_export.formats.int8_weights import INT8_WEIGHTS
from iq_export.formats.rounding import W8A8, Rounding
from iq_export.graph import io
from iq_export.graph.edit import constant
from iq_export.passes.quantize import QuantizePlan, quantize
from iq_export.passes.to_half import to_half
from iq_export.run.ort import CausalLM
from tests import planted
from tests.planted import Planted, logits

HALF, FLOAT, INT64 = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.INT64


def halved(data: Planted, *, inserted: bool = True) -> ir.Model:
    model = data.load_inserted() if inserted else data.load()
    assert to_half(model)
    return model


def values(model: ir.Model) -> dict[str, ir.Value]:
    return {value.name: value for node in model.graph for value in node.outputs}


def test_inputs_and_outputs(spiky: Planted) -> None:
    model = halved(spiky)
    types = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    assert types.pop("input_ids") == types.pop("position_ids") == INT64
    assert types.pop("attention_mask") == INT64
    assert set(types.values()) == {HALF}
    assert "logits" in types
    assert "present.3.value" in types


def test_rotary_angles_stay_float32(spiky: Planted) -> None:
    """Position 2049 is not representable in half: angles are cast after cosine and sine."""
    model = halved(spiky)
    found = values(model)
    for name in ("rotary_emb/Cast/out", "rotary_emb/Mul/out", "rotary_emb/Cos/out"):
        assert found[name].dtype == FLOAT
    assert model.graph.initializers["rotary_emb.inv_freq"].dtype == FLOAT
    rotary = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    assert len(rotary) == 8
    for node in rotary:
        assert [value.producer().op_type for value in node.inputs[1:]] == ["Cast", "Cast"]
        assert {value.dtype for value in node.inputs} == {HALF}
    assert sum(node.op_type == "Cast" for node in model.graph) == 3  # one per angle tensor, and ids


def test_weights_are_half(spiky: Planted) -> None:
    constants = halved(spiky).graph.initializers
    wide = {name for name, value in constants.items() if value.dtype == FLOAT}
    assert wide == {"rotary_emb.inv_freq"}


def test_templates_stay_attributes(spiky: Planted) -> None:
    """A function body casts them; a kernel reads them as float32."""
    nodes = [node for node in halved(spiky).graph if node.domain == "iq"]
    assert nodes
    assert all(isinstance(node.attributes["templates"].value[0], float) for node in nodes)


def test_function_close_to_the_float_graph(spiky: Planted) -> None:
    """With left pads. (ONNX Runtime on a CPU computes in float32 between half tensors.)"""
    io.save(halved(spiky), spiky.path.with_name("half.onnx"))
    rows = [window.ids for window in spiky.windows[:3]] + [[3], [4, 5]]
    exact, found = (
        logits(CausalLM(path), rows) for path in (spiky.inserted, spiky.path.with_name("half.onnx"))
    )
    assert np.isfinite(found).all()
    assert np.abs(found - exact).max() < 0.02 * np.ptp(exact)


def quantized(data: Planted, scale: float) -> ir.Model:
    model = data.load()
    down = data.sites.blocks[2].mlp.output
    quantize(model, QuantizePlan((down,), W8A8, {down.input: scale}))
    return model


def test_scales_become_half(calm: Planted) -> None:
    model = quantized(calm, 0.1)
    to_half(model)
    found = {n: v.dtype for n, v in model.graph.initializers.items() if n.endswith(".scale")}
    assert found == {
        "layers.2/mlp/Mul/out.scale": HALF,
        "layers.2.mlp.down_proj.weight.scale": HALF,
    }
    kept = {v.dtype for n, v in model.graph.initializers.items() if n.endswith("int8")}
    assert kept == {ir.DataType.INT8}
    assert values(model)["layers.2/mlp/Mul/out.int8"].dtype == ir.DataType.INT8
    io.save(model, calm.path.with_name("half.onnx"))
    InferenceSession(calm.path.with_name("half.onnx"))


@pytest.mark.parametrize("scale", [1e-6, 5.9e-5, 1e-9, 0.0])
def test_scale_underflow_is_caught_by_name(calm: Planted, scale: float) -> None:
    with pytest.raises(GraphError, match=r"Scale 'layers\.2/mlp/Mul/out\.scale' is .*below half"):
        to_half(quantized(calm, scale))


def test_smallest_scale_that_half_holds(calm: Planted) -> None:
    assert to_half(quantized(calm, float(np.finfo(np.float16).smallest_normal)))


def test_scale_overflow_is_caught_by_name(calm: Planted) -> None:
    with pytest.raises(GraphError, match=r"layers\.2/mlp/Mul/out\.scale"):
        to_half(quantized(calm, 1e5))


def test_tiny_weights_do_not_make_a_scale_underflow(calm: Planted) -> None:
    model = calm.load()
    down = calm.sites.blocks[0].mlp.output
    value = model.graph.initializers[down.weight]
    weight = value.const_value.numpy().copy()
    weight[:, 7] *= 1e-6
    value.const_value = ir.tensor(weight, name=value.name)
    quantize(model, QuantizePlan((down,), Rounding(INT8_WEIGHTS, None)))
    to_half(model)
    scale = model.graph.initializers[f"{down.weight}.scale"].const_value.numpy()
    assert scale.min() == np.finfo(np.float16).smallest_normal


def test_constant_overflow_is_caught_by_name(calm: Planted) -> None:
    """When it is written, at the latest: weights are converted one at a time."""
    model = calm.load()
    value = model.graph.initializers["layers.1.mlp.up_proj.weight"]
    weight = value.const_value.numpy().copy()
    weight[0, 0] = 70000
    value.const_value = ir.tensor(weight, name=value.name)
    with pytest.raises(GraphError, match=r"'layers\.1\.mlp\.up_proj\.weight' reaches 7e\+04"):
        to_half(model)
        io.save(model, calm.path.with_name("half.onnx"))


def test_constant_read_by_half_and_float_values(calm: Planted) -> None:
    """Each gets its own type; the float32 copy stays what it was."""
    model = calm.load()
    graph = model.graph
    two = constant(graph, "two", np.full(1, 2, np.float32))
    nodes = {node.name: node for node in graph}
    angle = nodes["rotary_emb/Mul"].outputs[0]
    doubled = ir.node("Mul", [angle, two], name="angles/doubled")
    doubled.outputs[0].name, doubled.outputs[0].dtype = "doubled", FLOAT
    graph.insert_after(angle.producer(), doubled)
    nodes["rotary_emb/Cos"].replace_input_with(0, doubled.outputs[0])
    normed = nodes["norm"].outputs[0]
    scaled = ir.node("Mul", [normed, two], name="norm/doubled")
    scaled.outputs[0].name, scaled.outputs[0].dtype = "norm.doubled", FLOAT
    graph.insert_after(nodes["norm"], scaled)
    nodes["lm_head"].replace_input_with(0, scaled.outputs[0])
    to_half(model)
    assert doubled.inputs[1].dtype == FLOAT
    assert scaled.inputs[1].dtype == HALF
    io.save(model, calm.path.with_name("half.onnx"))
    InferenceSession(calm.path.with_name("half.onnx"))


def test_the_lowest_number_of_float32_becomes_that_of_half(calm: Planted) -> None:
    """By it masks forbid: in half it would be infinite. One copy serves all that read it."""
    model = calm.load()
    graph = model.graph
    lowest = constant(graph, "lowest", np.array(np.finfo(np.float32).min))
    nodes = {node.name: node for node in graph}
    made = []
    for name, reader in (("rotary_emb/Mul", "rotary_emb/Cos"), ("norm", "lm_head")):
        value = nodes[name].outputs[0]
        for number in range(2):
            bound = ir.node("Max", [value, lowest], name=f"{name}/bound{number}")
            bound.outputs[0].name, bound.outputs[0].dtype = f"{name}.bound{number}", FLOAT
            graph.insert_after(value.producer(), bound)
            value = bound.outputs[0]
            made.append(bound)
        nodes[reader].replace_input_with(0, value)
    to_half(model)
    assert [node.inputs[1].dtype for node in made] == [FLOAT, FLOAT, HALF, HALF]
    assert made[2].inputs[1] is made[3].inputs[1]
    assert made[2].inputs[1].const_value.numpy() == -65504
    io.save(model, calm.path.with_name("half.onnx"))
    InferenceSession(calm.path.with_name("half.onnx"))


def test_output_that_depends_on_no_weight_is_refused() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 23]>
        g (int64[n] x) => (float[n] y) { [cast] y = Cast <to = 1> (x) }
    """
    with pytest.raises(GraphError, match="Output 'y' does not depend on any weight"):
        to_half(ir.from_onnx_text(text))


@pytest.mark.parametrize("kind", ["SinkClampInsert", "SinkRestore"])
def test_template_overflow_is_caught_by_name(spiky: Planted, kind: str) -> None:
    model = spiky.load_inserted()
    node = next(node for node in model.graph if node.op_type == kind)
    huge = [7e4, *node.attributes["templates"].as_floats()[1:]]
    node.attributes["templates"] = ir.AttrFloat32s("templates", huge)
    with pytest.raises(GraphError, match=rf"template of '{node.name}' reaches 7e\+04"):
        to_half(model)


def test_detection_template_may_overflow(spiky: Planted) -> None:
    """It is compared in float32, and an overflowed row is clipped before."""
    model = spiky.load_inserted()
    node = next(node for node in model.graph if node.op_type == "SinkDetect")
    huge = [7e4, *node.attributes["templates"].as_floats()[1:]]
    node.attributes["templates"] = ir.AttrFloat32s("templates", huge)
    assert to_half(model)


def test_graph_that_states_no_inner_types(tmp_path: Path) -> None:
    """As exporters write them: types of inputs, outputs and weights only."""
    model = planted.proto(planted.NO_SPIKES)
    model.graph.ClearField("value_info")
    onnx.save(model, tmp_path / "untyped.onnx")
    half = io.load(tmp_path / "untyped.onnx")
    to_half(half)
    io.save(half, tmp_path / "half.onnx")
    exact, found = (
        logits(CausalLM(tmp_path / name), [[1, 2, 3]]) for name in ("untyped.onnx", "half.onnx")
    )
    np.testing.assert_allclose(found, exact, atol=0.02 * np.ptp(exact))


def test_floats_of_constants_alone_stay_float32(tmp_path: Path) -> None:
    """One of two rotations, chosen by the positions, and ones made on the spot (a norm without a
    weight): both are cast where they meet half values."""
    text = """
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[n, 2] x, int64[n, 1] positions) => (float[n, 2] y)
        <float[2] short = {1.0, 0.5}, float[2] long = {0.5, 0.25}, int64 limit = {2}>
        {
            most = ReduceMax <keepdims = 0> (positions)
            beyond = Greater (most, limit)
            rotation = Where (beyond, long, short)
            numbers = Cast <to = 1> (positions)
            angles = Mul (numbers, rotation)
            cosines = Cos (angles)
            turned = Mul (x, cosines)
            size = Shape <start = 1, end = 2> (x)
            ones = ConstantOfShape <value = float[1] {1.0}> (size)
            y = RMSNormalization <epsilon = 0.001> (turned, ones)
        }
    """
    model = ir.from_onnx_text(text)
    to_half(model)
    found = values(model)
    assert found["rotation"].dtype == found["angles"].dtype == FLOAT
    assert found["turned"].dtype == found["y"].dtype == HALF
    ir.save(model, tmp_path / "half.onnx")
    ir.save(ir.from_onnx_text(text), tmp_path / "full.onnx")
    x, positions = np.array([[1, 2], [3, -1]], np.float32), np.array([[1], [5]])
    full, half = (
        InferenceSession(tmp_path / name).run(None, {"x": feed, "positions": positions})[0]
        for name, feed in (("full.onnx", x), ("half.onnx", x.astype(np.float16)))
    )
    np.testing.assert_allclose(half, full, atol=2e-3)
