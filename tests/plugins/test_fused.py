"""The fused ops' arithmetic against their function bodies in ONNX Runtime, and on a GPU if any."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iq_export.passes.rotate import hadamard
from iq_export.sinks import ops
from tests.plugins.calls import DTYPES, Rows, same_bits

EPSILON = 1e-5
SIZES = st.one_of(st.integers(1, 160), st.integers(1, 40).map(lambda packs: 8 * packs))
FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def _body(
    op: str, feeds: dict[str, np.ndarray], attributes: dict[str, object], outputs: list[str]
) -> list[np.ndarray]:
    """Values of the body of `op`, inner ones too, as ONNX Runtime computes it.

    On a CPU it leaves out half's rounding between two ops; a Concat of one input makes it round.
    """
    function = next(f for f in ops.fused_functions(23) if f.name == op)
    given = {name: onnx.helper.make_attribute(name, value) for name, value in attributes.items()}
    nodes = []
    for node in function.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for attribute in copy.attribute:
            if attribute.ref_attr_name:
                name = attribute.name
                attribute.CopyFrom(given[attribute.ref_attr_name])
                attribute.name = name
        if list(copy.output) == ["sum"]:
            copy.output[0] = "sum.unrounded"
            nodes.append(copy)
            copy = onnx.helper.make_node("Concat", ["sum.unrounded"], ["sum"], axis=0)
        nodes.append(copy)
    kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(v.dtype) for name, v in feeds.items()}
    own = kinds.get("x", kinds.get("gate"))
    types = {"codes": onnx.TensorProto.INT8, "value": onnx.TensorProto.FLOAT}
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        op,
        [info(name, kinds[name], list(value.shape)) for name, value in feeds.items()],
        [info(name, types.get(name, own), None) for name in outputs],
    )
    imports = [onnx.helper.make_opsetid("", 23)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(outputs, feeds)]


@dataclass(frozen=True)
class Norm:
    """x, branch [rows, hidden]; `bias` makes it a LayerNorm, `index` inserts `templates`."""

    x: np.ndarray
    branch: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    index: np.ndarray | None
    templates: np.ndarray | None
    scale: float

    def run(self, library: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return library.add_norm(
            self.x, self.branch, self.weight, self.bias, self.index, self.templates, EPSILON,
            self.scale,
        )  # fmt: skip

    def body(self) -> list[np.ndarray]:
        kind = "Rms" if self.bias is None else "Layer"
        op = f"Add{kind}Norm{'' if self.index is None else 'Insert'}Quantize"
        feeds = {"x": self.x, "branch": self.branch, "weight": self.weight}
        attributes: dict[str, object] = {"epsilon": EPSILON, "scale": self.scale}
        if self.bias is not None:
            feeds["bias"] = self.bias
        if self.index is not None and self.templates is not None:
            feeds["index"] = self.index
            attributes["templates"] = [float(v) for v in self.templates.ravel()]
            attributes["template_shape"] = list(self.templates.shape)
        return _body(op, feeds, attributes, ["sum", "codes", "value"])


def _norm(dtype: str, rows: int, hidden: int, k: int, layer: bool, insert: bool, seed: int) -> Norm:
    rng = np.random.default_rng(seed)
    kind = DTYPES[dtype]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(kind)

    sizes = (10.0 ** rng.uniform(-2, 3, (rows, 1))).astype(np.float32)
    return Norm(
        x=(sizes * rng.standard_normal((rows, hidden))).astype(kind),
        branch=(sizes * rng.standard_normal((rows, hidden))).astype(kind),
        weight=normal(hidden),
        bias=normal(hidden) if layer else None,
        index=rng.integers(0, k + 1, rows).astype(np.int32) if insert else None,
        templates=3 * rng.standard_normal((k, hidden)).astype(np.float32) if insert else None,
        scale=float(np.float16(rng.uniform(0.01, 0.05))),
    )


def _check_norm(case: Norm, found: tuple[np.ndarray, ...], expected: list[np.ndarray]) -> None:
    total, codes, values = found
    assert same_bits(total, expected[0])
    inserted = np.zeros(len(codes), bool) if case.index is None else case.index > 0
    assert same_bits(codes[inserted], expected[1][inserted])
    # A LayerNorm's differences are as large as the row, whatever an element is.
    size = np.abs(expected[2]).max(1, keepdims=True) if case.bias is not None else expected[2]
    far = np.abs(values - expected[2]) > 2e-6 * np.abs(size)
    assert not far[~inserted].any()
    _check_codes(codes, expected[1])


def _check_codes(found: np.ndarray, expected: np.ndarray) -> None:
    steps = np.abs(found.astype(int) - expected.astype(int))
    assert steps.max(initial=0) <= 1
    assert (steps > 0).sum() <= max(1, steps.size // 10_000)


@FEW
@given(
    dtype=st.sampled_from(["float32", "float16"]),
    count=st.integers(0, 6),
    hidden=SIZES,
    k=st.integers(1, 4),
    layer=st.booleans(),
    insert=st.booleans(),
    workers=st.sampled_from([3, 32, 96]),
    shift=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_add_norm_equals_its_body(
    rows: ctypes.CDLL, dtype: str, count: int, hidden: int, k: int, layer: bool, insert: bool,
    workers: int, shift: int, seed: int,
) -> None:  # fmt: skip
    case = _norm(dtype, count, hidden, k, layer, insert, seed)
    _check_norm(case, case.run(Rows(rows, workers, shift)), case.body())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("hidden", [4096, 8192])
def test_add_norm_of_long_rows(rows: ctypes.CDLL, dtype: str, layer: bool, hidden: int) -> None:
    case = _norm(dtype, 64, hidden, 2, layer, True, 7)
    for workers in (64, 256):  # more packs than are kept in registers, and fewer
        _check_norm(case, case.run(Rows(rows, workers)), case.body())


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_add_norm_of_rows_that_are_no_numbers(rows: ctypes.CDLL, dtype: str, layer: bool) -> None:
    case = _norm(dtype, 6, 64, 2, layer, True, 3)
    x = case.x.copy()
    x[0, 5], x[1, 7], x[2, 9], x[3, :] = np.nan, np.inf, -np.inf, 0
    branch = case.branch.copy()
    branch[1, 8], branch[3, :] = -np.inf, 0
    x[4, 1] = np.nan  # a sink: its template hides it
    index = np.array([0, 0, 0, 0, 2, 0], np.int32)
    case = replace(case, x=x, branch=branch, index=index)
    total, codes, _ = case.run(Rows(rows))
    expected = case.body()
    assert np.array_equal(total, expected[0], equal_nan=True)
    assert np.array_equal(codes[:5], expected[1][:5])
    assert not codes[0].any() and codes[4].any()


def test_add_norm_of_a_foreign_index_is_no_sink(rows: ctypes.CDLL) -> None:
    case = _norm("float32", 3, 16, 2, False, True, 4)
    foreign = replace(case, index=np.array([-1, 3, 2**31 - 1], np.int32))
    none = replace(case, index=np.zeros(3, np.int32))
    assert same_bits(foreign.run(Rows(rows))[1], none.run(Rows(rows))[1])


@pytest.mark.parametrize("layer", [False, True])
def test_add_norm_in_bfloat16_equals_numpy(rows: ctypes.CDLL, layer: bool) -> None:
    # ONNX Runtime's CPU has no kernels for bfloat16.
    case = _norm("bfloat16", 40, 320, 3, layer, True, 5)
    total = (case.x.astype(np.float32) + case.branch.astype(np.float32)).astype(case.x.dtype)
    wide = total.astype(np.float64)
    wide -= wide.mean(1, keepdims=True) if layer else 0
    values = wide / np.sqrt((wide * wide).mean(1, keepdims=True) + EPSILON)
    values *= case.weight.astype(np.float64)
    values += 0 if case.bias is None else case.bias.astype(np.float64)
    assert case.index is not None and case.templates is not None
    templates = case.templates.astype(case.x.dtype).astype(np.float32)
    values[case.index > 0] = templates[case.index[case.index > 0] - 1]
    steps = values.astype(np.float32) / np.float32(case.scale)
    codes = np.clip(np.rint(steps), -128, 127).astype(np.int8)
    for shift in (0, 1):
        _check_norm(case, case.run(Rows(rows, 64, shift)), [total, codes, values])


@dataclass(frozen=True)
class Gated:
    """gate, up [rows, features]; `index` clamps sinks, `channels` go aside."""

    gate: np.ndarray
    up: np.ndarray
    index: np.ndarray | None
    channels: np.ndarray | None
    block: int
    scale: float

    @property
    def factor(self) -> float:
        return float(np.float32(1 / np.sqrt(self.block)))

    def run(self, library: Rows) -> tuple[np.ndarray, np.ndarray]:
        return library.silu_mul(
            self.gate, self.up, self.index, self.channels, self.block, self.factor, self.scale
        )

    def body(self) -> list[np.ndarray]:
        sides = self.channels is not None
        op = f"SiluMul{'' if self.index is None else 'Clamp'}{'Side' if sides else ''}Quantize"
        feeds = {"gate": self.gate, "up": self.up}
        attributes: dict[str, object] = {
            "block": self.block, "factor": self.factor, "scale": self.scale
        }  # fmt: skip
        if self.index is not None:
            feeds["index"] = self.index
        if self.channels is not None:
            attributes["channels"] = self.channels.tolist()
        return _body(op, feeds, attributes, ["codes", "side"] if sides else ["codes"])


def _gated(
    dtype: str, rows: int, features: int, block: int, sides: int, clamp: bool, seed: int
) -> Gated:
    rng = np.random.default_rng(seed)

    def normal(size: float) -> np.ndarray:
        return (size * rng.standard_normal((rows, features))).astype(DTYPES[dtype])

    channels = rng.choice(features, sides, replace=False).astype(np.int32) if sides else None
    return Gated(
        gate=normal(4),
        up=normal(2),
        index=rng.integers(0, 3, rows).astype(np.int32) if clamp else None,
        channels=channels,
        block=block,
        scale=float(np.float16(rng.uniform(0.03, 0.1))),
    )


def _check_gated(case: Gated, found: tuple[np.ndarray, np.ndarray], body: list[np.ndarray]) -> None:
    _check_codes(found[0], body[0])
    if case.index is not None:
        sinks = case.index > 0
        assert not found[0][sinks].any() and not found[1][sinks].any()
    if case.channels is not None:
        tolerance = 1e-3 if case.gate.dtype == np.float16 else 2e-6
        assert np.allclose(
            found[1].astype(np.float32), body[1].astype(np.float32), rtol=tolerance, atol=1e-6
        )


@FEW
@given(
    dtype=st.sampled_from(["float32", "float16"]),
    count=st.integers(0, 5),
    block=st.sampled_from([1, 2, 4, 8, 16, 64, 128, 256, 512]),
    groups=st.integers(1, 5),
    sides=st.integers(0, 4),
    clamp=st.booleans(),
    shift=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_silu_mul_equals_its_body(
    rows: ctypes.CDLL, dtype: str, count: int, block: int, groups: int, sides: int, clamp: bool,
    shift: int, seed: int,
) -> None:  # fmt: skip
    features = block * groups
    case = _gated(dtype, count, features, block, min(sides, features), clamp, seed)
    _check_gated(case, case.run(Rows(rows, shift=shift)), case.body())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("block", [1, 64, 512])
def test_silu_mul_of_many_rows(rows: ctypes.CDLL, dtype: str, block: int) -> None:
    case = _gated(dtype, 100, 1536, block, 4, True, 8)
    _check_gated(case, case.run(Rows(rows)), case.body())


def test_most_side_channels(rows: ctypes.CDLL) -> None:
    case = _gated("float16", 3, 512, 64, 255, False, 9)
    _check_gated(case, case.run(Rows(rows)), case.body())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("block", [1, 64])
def test_silu_mul_of_what_is_no_number(rows: ctypes.CDLL, dtype: str, block: int) -> None:
    case = _gated(dtype, 7, 128, block, 2, True, 6)
    gate, up = case.gate.copy(), case.up.copy()
    gate[0, 3], gate[1, 5], gate[2, 5], up[3, 9] = np.nan, np.inf, -np.inf, -np.inf
    gate[4, :], up[4, :] = np.nan, np.nan  # a sink
    gate[5, 2], up[5, 2] = -np.inf, np.inf
    gate[5, 70], up[5, 70] = -85, np.inf  # closed: no number, and no spike
    gate[6, 1], up[6, 1], up[6, 7] = np.inf, 1, np.inf
    index = np.array([0, 0, 0, 0, 1, 0, 0], np.int32)
    channels = np.array([64, 5], np.int32)
    case = replace(case, gate=gate, up=up, index=index, channels=channels)
    codes, side = case.run(Rows(rows))
    expected = case.body()
    _check_codes(codes, expected[0])
    finite = np.isfinite(expected[1])
    assert np.array_equal(side[~finite], expected[1][~finite], equal_nan=True)
    assert not codes[4].any() and not side[4].any()


def test_silu_mul_in_bfloat16_equals_numpy(rows: ctypes.CDLL) -> None:
    case = _gated("bfloat16", 40, 256, 64, 3, True, 5)
    assert case.index is not None and case.channels is not None
    gate, up = case.gate.astype(np.float64), case.up.astype(np.float64)
    product = gate / (1 + np.exp(-gate)) * up
    product[case.index > 0] = 0
    side = product[:, case.channels].astype(np.float32).astype(case.gate.dtype)
    product[:, case.channels] = 0
    turned = (product.reshape(40, 4, 64) @ hadamard(64).astype(np.float64)).reshape(40, 256)
    codes = np.clip(np.rint(turned / case.scale), -128, 127).astype(np.int8)
    for shift in (0, 1):
        found = case.run(Rows(rows, shift=shift))
        _check_codes(found[0], codes)
        assert np.allclose(found[1].astype("f4"), side.astype("f4"), rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("hidden", [64, 577, 1536, 4096, 20_480])
def test_add_norm_on_a_gpu(
    rows: ctypes.CDLL, gpu_rows: ctypes.CDLL, dtype: str, shift: int, hidden: int
) -> None:
    for layer, insert in ((False, True), (True, False)):
        case = _norm(dtype, 33, hidden, 2, layer, insert, 6)
        total, codes, _ = case.run(Rows(rows, 256))
        on_gpu = case.run(Rows(gpu_rows, shift=shift))
        assert same_bits(on_gpu[0], total)
        _check_codes(on_gpu[1], codes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("features", "block"), [(96, 1), (97, 1), (1536, 64), (14_336, 512)])
def test_silu_mul_on_a_gpu(
    rows: ctypes.CDLL, gpu_rows: ctypes.CDLL, dtype: str, shift: int, features: int, block: int
) -> None:
    case = _gated(dtype, 33, features, block, 4, True, 6)
    codes, side = case.run(Rows(rows))
    on_gpu = case.run(Rows(gpu_rows, shift=shift))
    _check_codes(on_gpu[0], codes)
    assert np.allclose(on_gpu[1].astype("f4"), side.astype("f4"), rtol=1e-2)
