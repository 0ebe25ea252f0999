"""Where Q/DQ stand, and that ONNX Runtime loads and computes what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime import InferenceSession

from iq_export.decide.codes import CodeStore
from iq_export.formats.base import WeightFormat
from iq_export.formats.int4_weights import INT4_WEIGHTS
from iq_export.formats.int8_weights import INT8_WEIGHTS
from iq_export.formats.rounding import W8A8, Rounding
from iq_export.graph import io
from iq_export.passes.quantize import QuantizePlan, quantize
from iq_export.passes.rotate import rotate
from iq_export.passes.to_half import to_half
from iq_export.run.ort import CausalLM
from tests.planted import Planted, logits

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


def w8a8(data: Planted, *, half: bool = False, rotated: bool = False) -> ir.Model:
    """The inserted graph with a made-up scale at every product's input."""
    model = data.load_inserted()
    if rotated:
        rotate(model, {x.mlp.output.node: (x.mlp.output, 64) for x in data.sites.blocks})
    nodes = {node.name: node for node in model.graph}
    inputs = [str(nodes[linear.node].inputs[0].name) for linear in data.sites.linears]
    quantize(model, QuantizePlan(tuple(data.sites.linears), W8A8, dict.fromkeys(inputs, 0.05)))
    if half:
        to_half(model)
    return model


def w4a16(data: Planted, *, half: bool = False) -> ir.Model:
    model = data.load_inserted()
    quantize(model, QuantizePlan(tuple(data.sites.linears), Rounding(INT4_WEIGHTS, None)))
    if half:
        to_half(model)
    return model


def saved(data: Planted, model: ir.Model, name: str = "quantized.onnx") -> str:
    path = data.path.with_name(name)
    io.save(model, path)
    return str(path)


def products(model: ir.Model, data: Planted) -> dict[str, ir.Node]:
    names = {linear.node for linear in data.sites.linears}
    return {node.name: node for node in model.graph if node.name in names}


def test_every_product_reads_dequantized_values_only(spiky: Planted) -> None:
    found = products(w8a8(spiky), spiky)
    assert len(found) == 28
    for node in found.values():
        assert [value.producer().op_type for value in node.inputs] == ["DequantizeLinear"] * 2


def test_one_pair_per_producer(spiky: Planted) -> None:
    """Shared by q, k and v, and by gate and up: four activation pairs per block."""
    model = w8a8(spiky)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == 4 * 4
    found = products(model, spiky)
    for names in (("self_attn/q", "self_attn/k", "self_attn/v"), ("mlp/gate", "mlp/up")):
        assert len({found[f"layers.1/{name}_proj"].inputs[0] for name in names}) == 1


def test_sinks_are_clamped_before_quantization(spiky: Planted) -> None:
    found = products(w8a8(spiky), spiky)
    (sinks,) = spiky.sinks
    for block in sinks.lifecycle.clamp_blocks:
        quantizer = found[f"layers.{block}/mlp/down_proj"].inputs[0].producer().inputs[0].producer()
        assert quantizer.op_type == "QuantizeLinear"
        assert quantizer.inputs[0].producer().op_type == "SinkClampInsert"
    for i in (2, 3):
        for product in ("self_attn/q", "mlp/up"):
            quantizer = found[f"layers.{i}/{product}_proj"].inputs[0].producer().inputs[0]
            inserted = quantizer.producer().inputs[0].producer()
            assert inserted.op_type == "SinkClampInsert"
            assert inserted.inputs[0].name in sinks.norms


def test_detection_reads_the_value_before_quantization(spiky: Planted) -> None:
    detect = next(node for node in w8a8(spiky).graph if node.op_type == "SinkDetect")
    assert detect.inputs[0].name == "layers.1/mlp/Mul/out"


def test_activation_pairs_are_symmetric_int8(spiky: Planted) -> None:
    """At opset 21 and later a QuantizeLinear without a zero point would give uint8."""
    for node in w8a8(spiky).graph:
        if node.op_type == "QuantizeLinear":
            _, scale, zero = (value.const_value for value in node.inputs)
            assert (scale.shape, scale.dtype) == ((), FLOAT)
            assert (zero.shape, zero.dtype, int(zero.numpy())) == ((), ir.DataType.INT8, 0)
            (dequantize,) = node.outputs[0].consumers()
            assert dequantize.inputs[1] is node.inputs[1]
            assert dequantize.inputs[2] is node.inputs[2]


def test_weights_have_one_scale_per_output(spiky: Planted) -> None:
    model = w8a8(spiky)
    for linear in spiky.sites.linears:
        node = products(model, spiky)[linear.node].inputs[1].producer()
        assert node.attributes["axis"].as_int() == 1
        codes, scale = (value.const_value for value in node.inputs)
        assert codes.dtype == ir.DataType.INT8
        assert tuple(codes.shape) == (linear.in_features, linear.out_features)
        assert tuple(scale.shape) == (linear.out_features,)
        assert (np.abs(codes.numpy()).max(0) == 127).all()


def test_everything_else_stays(spiky: Planted) -> None:
    """Norms, attention, embedding and head read what they read before."""
    before = {node.name: node for node in spiky.load_inserted().graph}
    chosen = {linear.node for linear in spiky.sites.linears}
    for node in w8a8(spiky).graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") and node.name not in chosen:
            expected = [value and value.name for value in before[node.name].inputs]
            assert [value and value.name for value in node.inputs] == expected


def test_float_weights_are_gone(spiky: Planted) -> None:
    model = w8a8(spiky)
    assert not {linear.weight for linear in spiky.sites.linears} & set(model.graph.initializers)


def test_weights_are_rounded_when_written(spiky: Planted) -> None:
    codes = w8a8(spiky).graph.initializers["layers.0.mlp.down_proj.weight.int8"].const_value
    assert isinstance(codes, ir.LazyTensor)


def test_int4_weights_are_blocked_along_the_reduction_axis(spiky: Planted) -> None:
    model = w4a16(spiky)
    assert not any(node.op_type == "QuantizeLinear" for node in model.graph)
    for linear in spiky.sites.linears:
        node = products(model, spiky)[linear.node]
        assert node.inputs[0].producer().op_type != "DequantizeLinear"
        dequantize = node.inputs[1].producer()
        size = dequantize.attributes["block_size"].as_int()
        assert dequantize.attributes["axis"].as_int() == 0
        assert size == (128 if linear.in_features == 128 else 64)
        codes, scale = (value.const_value for value in dequantize.inputs)
        assert codes.dtype == ir.DataType.INT4
        assert tuple(scale.shape) == (linear.in_features // size, linear.out_features)


def test_value_without_a_scale_stays_in_float(calm: Planted) -> None:
    model = calm.load()
    (block, *_) = calm.sites.blocks
    quantize(model, QuantizePlan(block.mlp.linears, W8A8, {block.mlp.output.input: 0.1}))
    nodes = {node.name: node for node in model.graph}
    assert nodes[block.mlp.inputs[0].node].inputs[0].producer().op_type == "RMSNormalization"
    assert nodes[block.mlp.output.node].inputs[0].producer().op_type == "DequantizeLinear"
    assert nodes[block.attention.output.node].inputs[1].producer() is None


def test_weight_shared_by_two_products(calm: Planted) -> None:
    """Rounded once, dequantized in front of each."""
    model = calm.load()
    first, second = (calm.sites.blocks[i].mlp.output for i in (0, 1))
    nodes = {node.name: node for node in model.graph}
    nodes[second.node].replace_input_with(1, nodes[first.node].inputs[1])
    quantize(model, QuantizePlan((first, second), Rounding(INT8_WEIGHTS, None)))
    InferenceSession(saved(calm, model, "shared.onnx"))


@pytest.mark.parametrize("format_", [INT8_WEIGHTS, INT4_WEIGHTS])
def test_stored_codes_are_in_no_graph_in_memory(
    calm: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: WeightFormat
) -> None:
    """They are read from the disk when the graph is written: those of 7 B weights take 7 GB."""
    model, linears = calm.load(), calm.sites.blocks[0].mlp.linears
    nodes, store = {node.name: node for node in model.graph}, CodeStore(tmp_path / "codes")
    right = {}
    for linear in linears:
        right[linear.weight] = format_.round(nodes[linear.node].inputs[1].const_value.numpy())
        store.add(linear.weight, *right[linear.weight])
    reads: list[str] = []
    load = np.load
    monkeypatch.setattr(np, "load", lambda path: (reads.append(path.name), load(path))[1])
    quantize(model, QuantizePlan(linears, Rounding(format_, None), codes=store))
    assert not reads
    path = Path(saved(calm, model, "stored.onnx"))
    assert len(reads) >= len(linears)
    written = io.load(path).graph.initializers
    for name, (codes, scales) in right.items():
        assert (written[f"{name}.{format_.dtype.name.lower()}"].const_value.numpy() == codes).all()
        assert (written[f"{name}.scale"].const_value.numpy() == scales).all()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_w8a8_loads_in_a_plain_session(delimited: Planted, half: bool, rotated: bool) -> None:
    """All optimizers on: ONNX Runtime's propagation of Q/DQ has refused graphs before."""
    path = saved(delimited, w8a8(delimited, half=half, rotated=rotated))
    InferenceSession(path)
    found = logits(CausalLM(path), [window.ids for window in delimited.windows[:2]])
    assert np.isfinite(found).all()


@pytest.mark.parametrize("half", [False, True])
def test_w4a16_loads_in_a_plain_session(delimited: Planted, half: bool) -> None:
    path = saved(delimited, w4a16(delimited, half=half))
    InferenceSession(path)
    rows = [window.ids for window in delimited.windows[:2]]
    exact = logits(CausalLM(delimited.inserted), rows)
    found = logits(CausalLM(path), rows)
    # 4-bit weights are coarse, but the logits still follow those of the float graph.
    assert np.corrcoef(exact.ravel(), found.ravel())[0, 1] > 0.95


def test_tied_embedding_is_stored_once(spiky: Planted) -> None:
    """The head reads the transposed embedding, in half precision too."""
    model = w8a8(spiky, half=True)
    saved(spiky, model)
    shapes = [tuple(value.shape) for value in model.graph.initializers.values()]
    vocab, hidden = spiky.decoder.vocab, spiky.decoder.hidden
    assert shapes.count((vocab, hidden)) + shapes.count((hidden, vocab)) == 1
    weights = sum(linear.in_features * linear.out_features for linear in spiky.sites.linears)
    tables = 2 * hidden * (vocab + spiky.decoder.positions)
    size = spiky.path.with_name("quantized.onnx.data").stat().st_size
    assert size < 1.15 * (weights + tables)
