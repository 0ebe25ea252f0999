"""Norms, activations, products and attention that are written out, in the spellings of several
exporters: each becomes the single op, and the graph computes what it did."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from onnxruntime import InferenceSession

from iq_export.errors import GraphError
from iq_export.graph import io
from iq_export.model.recompose import check_same, is_written_out, recompose
from tests import planted

HIDDEN, HEADS, KV_HEADS, SIZE = 16, 4, 2, 8
SIZES = {"batch": 2, "seq": 5, "total": 7}
CONSTANTS = {
    "two": 2.0, "one": 1.0, "half": 0.5, "three": 3.0, "minus_half": -0.5, "eps": 1e-5,
    "sqrt2": 2**0.5, "inverse_sqrt2": 0.5**0.5, "cubic": 0.044715, "tanh_scale": (2 / np.pi) ** 0.5,
    "scale": SIZE**-0.5, "root_scale": SIZE**-0.25, "head_root": SIZE**0.5, "quick": 1.702,
    "zero": 0.0, "lowest": -3.4028234663852886e38, "low": -65504.0, "minus_one": -1.0,
}  # fmt: skip
WEIGHTS = {"w": (HIDDEN,), "b": (HIDDEN,), "square": (HIDDEN, HIDDEN), "other": (HIDDEN, HIDDEN)}
INTEGERS = {"first_two": [0, 1], "second": [2], "flat": [-1, HIDDEN]}
FEATURES = f"float[batch, seq, {HIDDEN}]"
QUERY = f"float[batch, {HEADS}, seq, {SIZE}]"


def model(body: str, inputs: str, output: str, opset: int = 14) -> onnx.ModelProto:
    """A graph of `body`, whose constants and weights are those above."""
    text = (
        f"""<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({output} y) {{{body}}}"""
    )
    made = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    arrays = {name: np.array(number, np.float32) for name, number in CONSTANTS.items()}
    arrays |= {name: rng.normal(size=shape).astype(np.float32) for name, shape in WEIGHTS.items()}
    arrays |= {name: np.array(numbers, np.int64) for name, numbers in INTEGERS.items()}
    read = {name for node in made.graph.node for name in node.input}
    made.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in arrays.items() if name in read
    )
    return made


def single_ops(made: onnx.ModelProto, folder: Path) -> Counter[str]:
    """The ops of the recomposed graph, which must compute what `made` does."""
    onnx.save(made, folder / "before.onnx")
    graph = ir.from_proto(made)
    assert is_written_out(graph)
    recompose(graph, "before.onnx")
    io.save(graph, folder / "after.onnx")
    before, after = (InferenceSession(folder / f"{name}.onnx") for name in ("before", "after"))
    rng = np.random.default_rng(1)
    feeds = {}
    for tensor in before.get_inputs():
        shape = [SIZES.get(size, size) for size in tensor.shape]
        values = rng.normal(size=shape)
        allowed = (values > 0) | (np.arange(shape[-1]) == 0)  # each row has something to attend to
        feeds[tensor.name] = allowed if tensor.type == "tensor(bool)" else values.astype(np.float32)
    (expected,), (found,) = before.run(None, feeds), after.run(None, feeds)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))
    assert [value.name for value in graph.graph.outputs] == ["y"]
    return Counter(node.op_type for node in graph.graph)


@pytest.mark.parametrize("square", ["Pow(d, two)", "Mul(d, d)"])
@pytest.mark.parametrize("axes", ["[-1]", "[2], keepdims=1"])
@pytest.mark.parametrize("inverse", ["n = Div(d, r)", "i = Reciprocal(r) n = Mul(d, i)"])
@pytest.mark.parametrize("last", ["g = Mul(n, w) y = Add(g, b)", "g = Mul(w, n) y = Add(b, g)"])
def test_layer_norm(square: str, axes: str, inverse: str, last: str, tmp_path: Path) -> None:
    body = f"""m = ReduceMean<axes={axes}>(x) d = Sub(x, m) s = {square}
        v = ReduceMean<axes={axes}>(s) e = Add(v, eps) r = Sqrt(e) {inverse}
        {last}"""
    made = model(body, f"{FEATURES} x", FEATURES, 14)
    assert single_ops(made, tmp_path) == {"LayerNormalization": 1}


@pytest.mark.parametrize("square", ["Pow(x, two)", "Mul(x, x)"])
@pytest.mark.parametrize(
    "inverse",
    [
        "r = Sqrt(e) n = Div(x, r)",
        "r = Sqrt(e) i = Div(one, r) n = Mul(i, x)",
        "r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i)",
        "i = Pow(e, minus_half) n = Mul(x, i)",
    ],
)
def test_rms_norm(square: str, inverse: str, tmp_path: Path) -> None:
    body = f"""s = {square} v = ReduceMean<axes=[-1]>(s) e = Add(v, eps) {inverse} y = Mul(w, n)"""
    made = model(body, f"{FEATURES} x", FEATURES, 13)
    assert single_ops(made, tmp_path) == {"RMSNormalization": 1}


ERF = ["d = Div(x, sqrt2) e = Erf(d)", "d = Mul(inverse_sqrt2, x) e = Erf(d)"]
TANH = "c = Pow(x, three) p = Mul(cubic, c) q = Add(x, p) s = Mul(q, tanh_scale) e = Tanh(s)"
CUBES = (
    "x2 = Mul(x, x) c = Mul(x2, x) p = Mul(c, cubic) q = Add(p, x) s = Mul(tanh_scale, q) "
    "e = Tanh(s)"
)
REST = [
    "f = Add(e, one) g = Mul(x, f) y = Mul(g, half)",
    "f = Add(one, e) g = Mul(half, f) y = Mul(x, g)",
    "h = Mul(x, half) f = Add(e, one) y = Mul(h, f)",
]


@pytest.mark.parametrize("rest", REST)
@pytest.mark.parametrize("start", [*ERF, TANH, CUBES])
def test_gelu(start: str, rest: str, tmp_path: Path) -> None:
    """In front of it stands a bias, which is no part of it."""
    made = model(f"x = Add(u, b) {start} {rest}", f"{FEATURES} u", FEATURES)
    assert single_ops(made, tmp_path) == {"Add": 1, "Gelu": 1}
    (gelu,) = [n for n in onnx.load(tmp_path / "after.onnx").graph.node if n.op_type == "Gelu"]
    form = next((a.s for a in gelu.attribute if a.name == "approximate"), b"none")
    assert form == (b"none" if start in ERF else b"tanh")


def test_silu_by_its_exponential(tmp_path: Path) -> None:
    body = "n = Neg(x) e = Exp(n) f = Add(e, one) y = Div(x, f)"
    assert single_ops(model(body, f"{FEATURES} x", FEATURES), tmp_path) == {"Sigmoid": 1, "Mul": 1}


@pytest.mark.parametrize(
    "body",
    [
        "d = Div(x, two) e = Erf(d) f = Add(e, one) g = Mul(x, f) y = Mul(g, half)",
        "e = Tanh(x) f = Add(e, one) g = Mul(x, f) y = Mul(g, half)",
    ],
)
def test_what_is_nearly_a_gelu_stays(body: str, tmp_path: Path) -> None:
    assert "Gelu" not in single_ops(model(body, f"{FEATURES} x", FEATURES), tmp_path)


SOFTMAX = "p = Softmax<axis=-1>(s) y = MatMul(p, v)"
TURNED = "t = Transpose<perm=[0, 1, 3, 2]>(k)"
CACHE = f"float[batch, {HEADS}, total, {SIZE}]"


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        (f"{TURNED} c = MatMul(q, t) s = Mul(c, scale) {SOFTMAX}", ""),
        (f"{TURNED} c = MatMul(q, t) d = Div(c, head_root) s = Add(d, m) {SOFTMAX}",
         ", float[batch, 1, seq, total] m"),
        (f"{TURNED} r = Mul(q, root_scale) o = Mul(t, root_scale) c = MatMul(r, o) "
         f"n = Where(a, zero, lowest) s = Add(n, c) {SOFTMAX}", ", bool[batch, 1, seq, total] a"),
        (f"{TURNED} c = MatMul(q, t) s = Where(a, c, low) {SOFTMAX}",
         ", bool[batch, 1, seq, total] a"),
        (f"{TURNED} h = Not(a) c = MatMul(q, t) s = Where(h, lowest, c) p = Softmax<axis=3>(s) "
         "i = IsNaN(p) g = Where(i, zero, p) y = MatMul(g, v)", ", bool[batch, 1, seq, total] a"),
        (f"{TURNED} c = MatMul(q, t) u = Where(a, c, lowest) n = Where(e, zero, lowest) "
         f"o = Add(u, n) s = Max(o, lowest) {SOFTMAX}",
         ", bool[1, 1, seq, total] a, bool[batch, 1, 1, total] e"),
    ],
    ids=["plain", "added", "chosen", "where", "guarded", "chosen twice"],
)  # fmt: skip
def test_attention(body: str, inputs: str, tmp_path: Path) -> None:
    made = model(body, f"{QUERY} q, {CACHE} k, {CACHE} v{inputs}", QUERY)
    ops = single_ops(made, tmp_path)
    assert ops["Attention"] == 1 and not ops.keys() - {"Attention", "Not", "And"}


def test_attention_whose_heads_are_repeated(tmp_path: Path) -> None:
    """The op takes keys and values with their own heads."""
    sizes = f"c0 = Constant<value_ints=[{HEADS}]>() c1 = Constant<value_ints=[{SIZE}]>()"
    sizes += f" c2 = Constant<value_ints=[{KV_HEADS}]>() g = Constant<value_ints=[2]>()"
    repeat = """sk = Shape(k) i0 = Constant<value_int=0>() i2 = Constant<value_int=2>()
        n = Gather(sk, i0) t0 = Gather(sk, i2) z = Constant<value_ints=[0]>()
        n1 = Unsqueeze(n, z) t1 = Unsqueeze(t0, z)
        five = Concat<axis=0>(n1, c2, g, t1, c1) four = Concat<axis=0>(n1, c0, t1, c1)
        ku = Unsqueeze(k, second) ke = Expand(ku, five) kr = Reshape(ke, four)
        vu = Unsqueeze(v, second) ve = Expand(vu, five) vr = Reshape(ve, four)"""
    body = f"""{sizes} {repeat} t = Transpose<perm=[0, 1, 3, 2]>(kr) c = MatMul(q, t)
        s = Mul(c, scale) p = Softmax<axis=-1>(s) y = MatMul(p, vr)"""
    cache = f"float[batch, {KV_HEADS}, total, {SIZE}]"
    made = model(body, f"{QUERY} q, {cache} k, {cache} v", QUERY)
    assert single_ops(made, tmp_path) == {"Attention": 1}


def test_scores_that_are_changed_otherwise_stay(tmp_path: Path) -> None:
    body = f"{TURNED} c = MatMul(q, t) a = Abs(c) s = Mul(a, scale) {SOFTMAX}"
    made = model(body, f"{QUERY} q, {CACHE} k, {CACHE} v", QUERY)
    assert single_ops(made, tmp_path)["Softmax"] == 1


def test_flattened_tokens_keep_their_axes(tmp_path: Path) -> None:
    """A Gemm of all tokens is a product of `[batch, seq, features]`, as other passes expect."""
    body = """f = Reshape(x, flat) h = Gemm<transB=1>(f, square, b) r = Relu(h)
        o = Gemm(r, other, b) s = Shape(x) y = Reshape(o, s)"""
    made = model(body, f"{FEATURES} x", FEATURES)
    assert single_ops(made, tmp_path) == {"MatMul": 2, "Add": 2, "Relu": 1}


def test_sizes_that_are_read_become_constants(tmp_path: Path) -> None:
    body = f"""h = MatMul(x, square) s = Shape(x) i0 = Constant<value_int=0>()
        i1 = Constant<value_int=1>() z = Constant<value_ints=[0]>() n = Gather(s, i0)
        l = Gather(s, i1) n1 = Unsqueeze(n, z) l1 = Unsqueeze(l, z)
        rest = Constant<value_ints=[-1]>() size = Constant<value_ints=[{SIZE}]>()
        t = Concat<axis=0>(n1, l1, rest, size) r = Reshape(h, t) e = Softmax<axis=-1>(r)
        y = Transpose<perm=[0, 2, 1, 3]>(e)"""
    made = model(body, f"{FEATURES} x", f"float[batch, {HIDDEN // SIZE}, seq, {SIZE}]")
    assert single_ops(made, tmp_path) == {"MatMul": 1, "Reshape": 1, "Softmax": 1, "Transpose": 1}


def test_single_ops_are_left_alone() -> None:
    assert not is_written_out(ir.from_proto(planted.proto(planted.Decoder())))


def test_an_operator_that_cannot_be_lifted(tmp_path: Path) -> None:
    made = model("y = Upsample<scales=[1.0, 1.0, 1.0]>(x)", f"{FEATURES} x", FEATURES, 13)
    with pytest.raises(GraphError, match=r"old\.onnx .*opset 13 .*cannot be lifted to opset 23"):
        recompose(ir.from_proto(made), "old.onnx")


def test_other_logits_are_refused(tmp_path: Path) -> None:
    path = planted.save(planted.NO_SPIKES, tmp_path)
    check_same(io.load(path), path, "same.onnx")
    other = io.load(path)
    norm = next(node for node in other.graph if node.op_type == "RMSNormalization")
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.1)
    with pytest.raises(GraphError, match=r"file\.onnx was not understood"):
        check_same(other, path, "file.onnx")


@pytest.mark.parametrize("order", ["x, o", "o, x"])
def test_a_residual_addition_is_no_bias(order: str, tmp_path: Path) -> None:
    body = f"""m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) s = Pow(d, two)
        v = ReduceMean<axes=[-1]>(s) e = Add(v, eps) r = Sqrt(e) n = Div(d, r) o = Mul(n, w)
        y = Add({order})"""
    made = model(body, f"{FEATURES} x", FEATURES, 14)
    assert single_ops(made, tmp_path) == {"LayerNormalization": 1, "Add": 1}
