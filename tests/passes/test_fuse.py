"""Fusing on the planted models: the same function, and a reason for what is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from iq_export.graph import io
from iq_export.graph.edit import constant
from iq_export.passes.fuse import Fusion, fuse
from iq_export.passes.rotate import hadamard
from iq_export.pipeline import Rewrite, rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.run.ort import CausalLM
from iq_export.sinks.ops import DOMAIN, FUSED_OPS
from tests import planted
from tests.planted import Decoder, logits
from tests.test_pipeline import calibration

Make = Callable[..., Rewrite]
ROWS = [window.ids for window in planted.windows(Decoder(), count=4, seed=9)]
POST_NORMS = replace(Decoder(), post_norms=True)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(decoder, dtype)`: a quantized planted model, made once."""
    made: dict[object, Rewrite] = {}

    def get(decoder: Decoder, dtype: str = "fp32") -> Rewrite:
        if (decoder, dtype) not in made:
            folder = tmp_path_factory.mktemp("fuse")
            (folder / "work").mkdir()
            made[decoder, dtype] = rewrite(
                planted.save(decoder, folder), folder / "work", load_recipe("w8a8"), dtype,
                replace(calibration(decoder), insertion="norm"), Progress(quiet=True),
            )  # fmt: skip
        return made[decoder, dtype]

    return get


def fused(done: Rewrite) -> tuple[Path, Fusion]:
    """The fused graph beside the quantized one, whose weights it shares."""
    model = io.load(done.quantized)
    fusion = fuse(model)
    path = done.quantized.with_name("fused.onnx")
    io.save_skeleton(model, path)
    return path, fusion


def distance(path: Path, reference: Path) -> float:
    """Relative squared error of the logits."""
    exact, found = (logits(CausalLM(p, round_half=True), ROWS) for p in (reference, path))
    exact = exact.astype(np.float64)
    return float(((found - exact) ** 2).sum() / (exact**2).sum())


@pytest.mark.parametrize("decoder", [planted.WITH_DELIMITER, planted.TWO_BIRTHS, POST_NORMS])
def test_logits_are_those_of_the_unfused_graph(make: Make, decoder: Decoder) -> None:
    done = make(decoder)
    path, fusion = fused(done)
    assert fusion.ops and fusion.absorbed
    assert distance(path, done.quantized) < 1e-10
    onnx.checker.check_model(path)


def test_half_is_as_near_to_the_traced_graph(make: Make) -> None:
    """Fewer roundings, at other places: codes at the edge of a step fall to the other side."""
    done = make(planted.WITH_DELIMITER, "fp16")
    path, _ = fused(done)
    assert distance(path, done.quantized) < 1e-3
    assert distance(path, done.traced) < 2 * distance(done.quantized, done.traced)


def test_what_is_fused_and_why_the_rest_is_not(make: Make) -> None:
    done = make(planted.WITH_DELIMITER)
    path, fusion = fused(done)
    assert fusion.ops == {
        "AddRmsNormInsertQuantize": 4,
        "AddRmsNormQuantize": 3,
        "SiluMulClampSideQuantize": 1,
        "SiluMulSideQuantize": 2,
    }
    assert fusion.reasons == {
        "reads Reshape, neither a norm nor a gated product": 4,
        "its norm reads Reshape, not a residual Add": 1,  # the rotation behind the embedding
        "sinks are detected on the product": 1,
    }
    graph = onnx.load(path, load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node if node.domain == DOMAIN)
    assert {kind: count for kind, count in kinds.items() if kind in FUSED_OPS} == fusion.ops
    assert kinds.total() == done.sink_nodes - fusion.absorbed + sum(fusion.ops.values())
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == len(fusion.refused)


def test_weights_stay_in_the_file_of_the_unfused_graph(make: Make) -> None:
    path, _ = fused(make(planted.WITH_DELIMITER))
    weights = [t for t in onnx.load(path, load_external_data=False).graph.initializer
               if t.data_location == onnx.TensorProto.EXTERNAL]  # fmt: skip
    assert weights
    assert {entry.value for t in weights for entry in t.external_data if entry.key == "location"} \
        == {"model.onnx.data"}  # fmt: skip
    assert path.stat().st_size < 400_000


def test_a_graph_without_quantizers_stays_as_it_is(spiky: planted.Planted) -> None:
    model = spiky.load_inserted()
    before = [node.name for node in model.graph]
    assert fuse(model) == Fusion({}, 0, ())
    assert [node.name for node in model.graph] == before


# A block of a graph by hand: what stands in front of one quantizer.
WIDTH = 8


def block(
    *, norm: str = "RMSNormalization", epsilon: float | None = 1e-6, bias: bool = False
) -> ir.Model:
    """x, branch -> Add -> norm -> SinkClampInsert -> QuantizeLinear, and the sum as an output."""

    def value(name: str, kind: ir.DataType, *shape: str | int) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))

    real, rows = ir.DataType.FLOAT, ("batch", "seq")
    x, branch = (value(name, real, *rows, WIDTH) for name in ("x", "branch"))
    index = value("index", ir.DataType.INT32, *rows)
    graph = ir.Graph([x, branch, index], [], nodes=[], opset_imports={"": 23}, name="block")
    weight = constant(graph, "weight", np.linspace(0.5, 2, WIDTH, dtype=np.float32))
    scale = constant(graph, "scale", np.array(0.02, np.float32))
    zero = constant(graph, "zero", np.array(0, np.int8))
    add = ir.node("Add", [x, branch], name="add")
    inputs = [add.outputs[0], weight]
    if bias:
        inputs.append(constant(graph, "bias", np.linspace(-1, 1, WIDTH, dtype=np.float32)))
    options: dict[str, int | float] = {"axis": -1}
    if epsilon is not None:
        options["epsilon"] = epsilon
    normed = ir.node(norm, inputs, options, name="norm")
    templates = {
        "templates": ir.AttrFloat32s("templates", [float(v) for v in range(WIDTH)]),
        "template_shape": [1, WIDTH],
        "plugin_namespace": "iq",
        "plugin_version": "1",
    }
    insert = ir.node("SinkClampInsert", [normed.outputs[0], index], templates, domain=DOMAIN,
                     name="insert")  # fmt: skip
    quantizer = ir.node("QuantizeLinear", [insert.outputs[0], scale, zero], name="quantize")
    back = ir.node("DequantizeLinear", [quantizer.outputs[0], scale, zero], name="dequantize")
    more = ir.node("Neg", [add.outputs[0]], name="more")
    for node in (add, normed, insert, quantizer, back, more):
        node.outputs[0].name = f"{node.name}/out"
        node.outputs[0].dtype, node.outputs[0].shape = real, x.shape
        graph.append(node)
    quantizer.outputs[0].dtype = ir.DataType.INT8
    graph.outputs.extend([back.outputs[0], more.outputs[0]])
    model = ir.Model(graph, ir_version=11)
    io.add_sink_functions(model)
    return model


def run(model: ir.Model) -> list[np.ndarray]:
    import onnxruntime

    rng = np.random.default_rng(0)
    feeds = {
        name: rng.standard_normal((2, 5, WIDTH)).astype(np.float32) for name in ("x", "branch")
    }
    feeds["index"] = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1]], np.int32)
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    return [np.asarray(v) for v in session.run(None, feeds)]


@pytest.mark.parametrize(
    ("norm", "bias", "op"),
    [
        ("RMSNormalization", False, "AddRmsNormInsertQuantize"),
        ("LayerNormalization", True, "AddLayerNormInsertQuantize"),
        ("LayerNormalization", False, "AddLayerNormInsertQuantize"),
    ],
)
@pytest.mark.parametrize("epsilon", [1e-3, None])
def test_every_norm(norm: str, bias: bool, op: str, epsilon: float | None) -> None:
    model = block(norm=norm, bias=bias, epsilon=epsilon)
    plain = run(model)
    assert fuse(model) == Fusion({op: 1}, 1, ())
    (node,) = [node for node in model.graph if node.domain == DOMAIN]
    assert node.attributes["epsilon"].as_float() == pytest.approx(epsilon or 1e-5)
    for found, expected in zip(run(model), plain, strict=True):
        assert np.allclose(found, expected, atol=1e-6)


def _nodes(model: ir.Model) -> dict[str, ir.Node]:
    return {str(node.name): node for node in model.graph}


def _read(model: ir.Model, name: str) -> None:
    node = ir.node("Neg", [_nodes(model)[name].outputs[0]], name="spy")
    node.outputs[0].name = "spy/out"
    model.graph.append(node)


def _output(model: ir.Model, name: str) -> None:
    model.graph.outputs.append(_nodes(model)[name].outputs[0])


def _second_lifecycle(model: ir.Model) -> None:
    first, quantizer = _nodes(model)["insert"], _nodes(model)["quantize"]
    node = ir.node("SinkClampInsert", [first.outputs[0], first.inputs[1]], first.attributes.copy(),
                   domain=DOMAIN, name="second")  # fmt: skip
    node.outputs[0].name = "second/out"
    quantizer.replace_input_with(0, node.outputs[0])
    model.graph.insert_before(quantizer, node)


def _unsigned(model: ir.Model) -> None:
    zero = constant(model.graph, "unsigned", np.array(0, np.uint8))
    _nodes(model)["quantize"].replace_input_with(2, zero)


def _broadcast(model: ir.Model) -> None:
    model.graph.inputs[1].shape = ir.Shape(["batch", "seq", 1])


def _late_index(model: ir.Model) -> None:
    """An index that is computed from the sum itself."""
    nodes = _nodes(model)
    peak = ir.node("ReduceMax", [nodes["add"].outputs[0], constant(
        model.graph, "last", np.array([-1]))], {"keepdims": 0}, name="peak")  # fmt: skip
    cast = ir.node("Cast", [peak.outputs[0]], {"to": int(ir.DataType.INT32)}, name="late")
    for node in (peak, cast):
        node.outputs[0].name = f"{node.name}/out"
    cast.outputs[0].dtype = ir.DataType.INT32
    model.graph.insert_after(nodes["add"], [peak, cast])
    nodes["insert"].replace_input_with(1, cast.outputs[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: _read(m, "norm"), "a value within is read by Neg too"),
        (lambda m: _read(m, "insert"), "a value within is read by Neg too"),
        (lambda m: _output(m, "add"), "an output of the graph lies within"),
        (lambda m: _output(m, "norm"), "an output of the graph lies within"),
        (_second_lifecycle, "two lifecycles insert their templates here"),
        (_unsigned, "its codes are not int8"),
        (lambda m: _nodes(m)["quantize"].resize_inputs(2), "its codes are not int8"),
        (_broadcast, "its residual Add is of two shapes"),
        (_late_index, "its sink index depends on what is fused"),
    ],
)
def test_norms_that_are_left(change: Callable[[ir.Model], None], reason: str) -> None:
    model = block()
    change(model)
    before = [node.name for node in model.graph]
    fusion = fuse(model)
    assert fusion.reasons == {reason: 1}
    assert fusion.refused[0].node == "quantize"
    assert [node.name for node in model.graph] == before


def _matrix(model: ir.Model, change: Callable[[np.ndarray], np.ndarray]) -> None:
    node = next(node for node in model.graph if str(node.name).endswith("mlp/down_proj/rotate"))
    name = str(node.inputs[1].name)
    for user, position in list(node.inputs[1].uses()):
        other = constant(
            model.graph, f"{name}.{user.name}", change(node.inputs[1].const_value.numpy())
        )
        user.replace_input_with(position, other)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: _matrix(m, lambda a: a[::-1].copy()), "by another matrix than Hadamard's"),
        (
            lambda m: [
                node.attributes.__setitem__(
                    "templates",
                    ir.AttrFloat32s(
                        "templates", [1.0] * len(node.attributes["templates"].as_floats())
                    ),
                )
                for node in m.graph
                if "/clamp." in str(node.name)
            ],
            "what is inserted is not zero",
        ),
        (
            lambda m: [
                node.replace_input_with(
                    1, constant(m.graph, f"{node.name}.other", np.ones(128, "f4"))
                )
                for node in m.graph
                if str(node.name).endswith("/side_mask")
            ],
            "its mask does not belong to its side channels",
        ),
    ],
)
def test_products_that_are_left(
    make: Make, change: Callable[[ir.Model], object], reason: str
) -> None:
    model = io.load(make(planted.WITH_DELIMITER).quantized)
    change(model)
    reasons = fuse(model).reasons
    assert [r for r in reasons if reason in r], reasons


def test_hadamard_entries_are_those_of_the_graph(make: Make) -> None:
    """In half a block of 128 has an entry that is not 1 / sqrt(128)."""
    model = io.load(make(planted.WITH_DELIMITER).quantized)
    _matrix(model, lambda a: np.sign(hadamard(len(a))) * np.float32(0.1251))
    fuse(model)
    factors = {
        node.attributes["factor"].as_float()
        for node in model.graph
        if node.op_type.startswith("SiluMul")
    }
    assert factors == {float(np.float32(0.1251))}
