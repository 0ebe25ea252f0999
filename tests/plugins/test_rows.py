"""The kernels' arithmetic against the ops' function bodies in ONNX Runtime, and on a GPU if any."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iq_export.sinks import ops
from tests.plugins.calls import DTYPES, Rows, same_bits

TAU = 200.0


@dataclass(frozen=True)
class Case:
    """x [rows, hidden], first and valid [rows], templates [k, hidden] in float32."""

    x: np.ndarray
    first: np.ndarray
    valid: np.ndarray
    templates: np.ndarray


def _case(dtype: str, rows: int, hidden: int, k: int, seed: int) -> Case:
    """Semantic rows of unit size; about half of the rows near a template."""
    rng = np.random.default_rng(seed)
    templates = rng.standard_normal((k, hidden)).astype(np.float32)
    spikes = rng.integers(hidden, size=k)
    templates[np.arange(k), spikes] = rng.choice([-1, 1], k) * rng.uniform(300, 30_000, k)
    x = rng.standard_normal((rows, hidden))
    near = rng.random(rows) < 0.5
    x[near] = templates[rng.integers(k, size=rows)][near] * rng.uniform(0.9, 1.1, (near.sum(), 1))
    return Case(x.astype(DTYPES[dtype]), rng.random(rows) < 0.3, rng.random(rows) < 0.8, templates)


def _detect(rows: ctypes.CDLL, case: Case, workers: int = 32, shift: int = 0) -> np.ndarray:
    library = Rows(rows, workers, shift)
    return library.detect(case.x, case.first, case.valid, case.templates, TAU)


def _change(
    rows: ctypes.CDLL, case: Case, index: np.ndarray, restore: bool, shift: int = 0
) -> np.ndarray:
    return Rows(rows, shift=shift).change(case.x, index, case.templates, restore)


def _bodies(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """index, clamped and restored x as ONNX Runtime computes the function bodies."""
    element = onnx.helper.np_dtype_to_tensor_dtype(case.x.dtype)
    hidden = case.x.shape[1]
    attributes = {
        "domain": ops.DOMAIN,
        "templates": [float(v) for v in case.templates.ravel()],
        "template_shape": list(case.templates.shape),
        **ops.PLUGIN_ATTRIBUTES,
    }
    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    boolean = onnx.TensorProto.BOOL
    graph = onnx.helper.make_graph(
        [
            node("SinkDetect", ["x", "first", "valid"], ["index"], threshold=TAU, **attributes),
            node("SinkClampInsert", ["x", "index"], ["clamped"], **attributes),
            node("SinkRestore", ["x", "index"], ["restored"], **attributes),
        ],
        "bodies",
        [info("x", element, ["b", "s", hidden])]
        + [info(name, boolean, ["b", "s"]) for name in ("first", "valid")],
        [info("index", onnx.TensorProto.INT32, ["b", "s"])]
        + [info(name, element, ["b", "s", hidden]) for name in ("clamped", "restored")],
    )
    imports = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(ops.DOMAIN, 1)]
    model = onnx.helper.make_model(
        graph, functions=ops.functions(23), opset_imports=imports, ir_version=11
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"x": case.x[None], "first": case.first[None], "valid": case.valid[None]}
    index, clamped, restored = (np.asarray(out)[0] for out in session.run(None, feeds))
    return index, clamped, restored


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from(["float32", "float16"]),
    count=st.integers(1, 9),
    hidden=st.one_of(st.integers(1, 160), st.integers(1, 20).map(lambda packs: 8 * packs)),
    k=st.integers(1, 5),
    lanes=st.sampled_from([1, 3, 32, 128]),
    shift=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_function_bodies(
    rows: ctypes.CDLL,
    dtype: str,
    count: int,
    hidden: int,
    k: int,
    lanes: int,
    shift: int,
    seed: int,
) -> None:
    case = _case(dtype, count, hidden, k, seed)
    index, clamped, restored = _bodies(case)
    found = _detect(rows, case, lanes, shift)
    _assert_same_index(case, found, index)
    assert same_bits(_change(rows, case, index, False, shift), clamped)
    assert same_bits(_change(rows, case, index, True, shift), restored)


def _assert_same_index(case: Case, found: np.ndarray, expected: np.ndarray) -> None:
    """Equal, but for rows as near to one template as to another: the order of sums decides."""
    assert np.array_equal(found > 0, expected > 0)
    for row in np.flatnonzero(found != expected):
        x = np.clip(case.x[row].astype(np.float64), -65504, 65504)
        pair = case.templates[[found[row] - 1, expected[row] - 1]].astype(np.float64)
        distances = (pair * pair).sum(1) / 2 - pair @ x
        scale = (pair * pair).sum(1).max() + np.abs(pair @ x).max()
        assert abs(distances[0] - distances[1]) <= 1e-6 * scale


@pytest.mark.parametrize("lanes", [1, 128])
def test_bfloat16_equals_numpy(rows: ctypes.CDLL, lanes: int) -> None:
    # ONNX Runtime's CPU has no kernels for bfloat16.
    case = _case("bfloat16", 64, 577, 3, 0)
    x = case.x.astype(np.float32)
    sink = ((np.abs(x).max(1) > TAU) | case.first) & case.valid
    nearest = ((x[:, None] - case.templates) ** 2).sum(-1).argmin(1) + 1
    index = _detect(rows, case, lanes)
    assert np.array_equal(index, np.where(sink, nearest, 0))
    rounded = case.templates.astype(case.x.dtype)[np.maximum(index - 1, 0)]
    clamped = np.where(sink[:, None], rounded, case.x)
    assert same_bits(_change(rows, case, index, restore=False), clamped)
    added = (x + rounded.astype(np.float32)).astype(case.x.dtype)
    assert same_bits(
        _change(rows, case, index, restore=True), np.where(sink[:, None], added, case.x)
    )


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_number_of_workers_does_not_matter(rows: ctypes.CDLL, dtype: str) -> None:
    case = _case(dtype, 200, 576, 4, 1)
    expected = _detect(rows, case, 1)
    assert {int(v) for v in expected} > {0, 1}
    for lanes in (2, 31, 32, 128, 1024):
        assert np.array_equal(_detect(rows, case, lanes), expected)


def test_rows_do_not_depend_on_each_other(rows: ctypes.CDLL) -> None:
    case = _case("float16", 23, 64, 3, 2)
    whole = _detect(rows, case, 128)
    for at in range(len(case.x)):
        part = slice(at, at + 1)
        one = Case(case.x[part], case.first[part], case.valid[part], case.templates)
        assert _detect(rows, one, 128)[0] == whole[at]


def test_overflowed_half_still_matches(rows: ctypes.CDLL) -> None:
    templates = np.zeros((2, 16), np.float32)
    templates[0, 3], templates[1, 5] = -60_000, 60_000
    x = np.zeros((2, 16), np.float16)
    x[0, 5], x[1, 3] = np.inf, -np.inf
    case = Case(x, np.zeros(2, bool), np.ones(2, bool), templates)
    assert _detect(rows, case, 32).tolist() == [2, 1]
    assert _bodies(case)[0].tolist() == [2, 1]


def test_nan_is_no_spike(rows: ctypes.CDLL) -> None:
    x = np.zeros((1, 16), np.float32)
    x[0, 5] = np.nan
    case = Case(x, np.zeros(1, bool), np.ones(1, bool), np.full((1, 16), 9, np.float32))
    assert _detect(rows, case, 32).tolist() == [0]


def test_padding_is_never_a_sink(rows: ctypes.CDLL) -> None:
    case = _case("float16", 40, 32, 2, 3)
    pads = Case(case.x, np.ones(40, bool), np.zeros(40, bool), case.templates)
    assert not _detect(rows, pads, 128).any()


def test_foreign_index_leaves_the_row_alone(rows: ctypes.CDLL) -> None:
    case = _case("float16", 3, 32, 2, 4)
    index = np.array([-1, 3, 2**31 - 1], np.int32)
    for restore in (False, True):
        assert same_bits(_change(rows, case, index, restore), case.x)


def test_no_rows(rows: ctypes.CDLL) -> None:
    case = _case("float16", 0, 32, 2, 5)
    assert _detect(rows, case, 128).shape == (0,)
    assert _change(rows, case, np.zeros(0, np.int32), restore=True).shape == (0, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("count", "hidden"), [(0, 64), (1, 1), (7, 577), (300, 2048)])
def test_kernels_on_a_gpu(
    rows: ctypes.CDLL, gpu_rows: ctypes.CDLL, dtype: str, shift: int, count: int, hidden: int
) -> None:
    case = _case(dtype, count, hidden, 3, 6)
    index = _detect(rows, case, 128)
    _assert_same_index(case, _detect(gpu_rows, case, shift=shift), index)
    for restore in (False, True):
        on_gpu = _change(gpu_rows, case, index, restore, shift)
        assert same_bits(on_gpu, _change(rows, case, index, restore))
