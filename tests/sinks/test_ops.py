"""The three sink ops in ONNX Runtime against their meaning written once more in NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from iq_export.sinks.ops import DOMAIN, OPS, PLUGIN_ATTRIBUTES, VERSION, functions

HALF_MAX = 65504.0


@dataclass(frozen=True)
class Case:
    """One call: `x` [batch, seq, width], templates [K, width]."""

    x: np.ndarray
    templates: np.ndarray
    threshold: float
    first: np.ndarray
    valid: np.ndarray
    index: np.ndarray


@st.composite
def cases(draw: st.DrawFn, shortest: int = 0) -> Case:
    """Shapes from empty sequences to small batches, K from 1 to 4, any masks."""
    batch, seq = draw(st.integers(1, 3)), draw(st.integers(shortest, 6))
    width, count = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([np.float32, np.float16]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([0.01, 1.0, 1000.0]))
    templates = (scale * rng.normal(size=(count, width))).astype(np.float32)
    x = scale * rng.normal(size=(batch, seq, width))
    near = rng.integers(0, count + 1, size=(batch, seq))  # some rows are near a template
    x = np.where(near[..., None] > 0, templates[near - 1] + 0.01 * x, x)
    return Case(
        x=x.astype(dtype),
        templates=templates,
        threshold=float(np.float32(scale * draw(st.floats(0, 3)))),
        first=rng.random((batch, seq)) < 0.3,
        valid=rng.random((batch, seq)) < 0.8,
        index=rng.integers(0, count + 1, size=(batch, seq)).astype(np.int32),
    )


@lru_cache(maxsize=512)
def _model(op: str, half: bool, shape: tuple[int, ...], table: bytes, threshold: float) -> bytes:
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    attributes = {
        "templates": np.frombuffer(table, np.float32).tolist(),
        "template_shape": list(shape),
        **PLUGIN_ATTRIBUTES,
    }
    value = helper.make_tensor_value_info
    rows = ["batch", "seq"]
    inputs = [value("x", kind, [*rows, shape[1]])]
    if op == "SinkDetect":
        attributes["threshold"] = threshold
        inputs += [value(name, TensorProto.BOOL, rows) for name in ("first", "valid")]
        output = value("out", TensorProto.INT32, rows)
    else:
        inputs.append(value("index", TensorProto.INT32, rows))
        output = value("out", kind, [*rows, shape[1]])
    names = [info.name for info in inputs]
    node = helper.make_node(op, names, ["out"], domain=DOMAIN, **attributes)
    model = helper.make_model(
        helper.make_graph([node], op, inputs, [output]),
        functions=functions(),
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return model.SerializeToString()


def run(op: str, case: Case) -> np.ndarray:
    half, table = case.x.dtype == np.float16, case.templates
    model = _model(op, half, table.shape, table.tobytes(), case.threshold)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {item.name: getattr(case, item.name) for item in session.get_inputs()}
    return session.run(None, feeds)[0]


def detect(case: Case) -> np.ndarray:
    x = np.clip(case.x.astype(np.float32), -HALF_MAX, HALF_MAX)
    peak = np.abs(x).max(-1, initial=0)
    sink = ((peak > np.float32(case.threshold)) | case.first) & case.valid
    distance = ((x[..., None, :] - case.templates) ** 2).sum(-1)
    return np.where(sink, distance.argmin(-1) + 1, 0)


def table(case: Case) -> np.ndarray:
    """The template row of every token in the type of x; a row of zeros for semantic tokens."""
    rows = np.concatenate([np.zeros_like(case.templates[:1]), case.templates])
    return rows[case.index].astype(case.x.dtype)


def ambiguous(case: Case) -> np.ndarray:
    """Rows that lie as near to one template as to another, within rounding."""
    x = np.clip(case.x.astype(np.float64), -HALF_MAX, HALF_MAX)
    distance = np.sort(((x[..., None, :] - case.templates) ** 2).sum(-1), -1)
    if distance.shape[-1] < 2:
        return np.zeros(x.shape[:-1], bool)
    return distance[..., 1] - distance[..., 0] <= 1e-5 * distance[..., 1]


fast = settings(max_examples=60, deadline=None)


@fast
@given(cases(shortest=1))
def test_detect(case: Case) -> None:
    found, expected, unclear = run("SinkDetect", case), detect(case), ambiguous(case)
    assert found.dtype == np.int32
    assert found.shape == case.x.shape[:2]
    np.testing.assert_array_equal(found[~unclear], expected[~unclear])
    np.testing.assert_array_equal(found > 0, expected > 0)


@fast
@given(cases())
def test_clamp_insert(case: Case) -> None:
    found = run("SinkClampInsert", case)
    assert found.dtype == case.x.dtype
    expected = np.where(case.index[..., None] > 0, table(case), case.x)
    np.testing.assert_array_equal(found, expected)


@fast
@given(cases())
def test_restore(case: Case) -> None:
    found = run("SinkRestore", case)
    assert found.dtype == case.x.dtype
    expected = np.where(case.index[..., None] > 0, case.x + table(case), case.x)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.xfail(
    strict=True, reason="ONNX Runtime 1.31 reduces an empty tensor to the shape of its input"
)
def test_detect_of_an_empty_sequence() -> None:
    x, rows = np.zeros((2, 0, 2), np.float32), np.zeros((2, 0), bool)
    assert run("SinkDetect", example(x=x, first=rows, valid=rows)).shape == (2, 0)


def example(**changes: object) -> Case:
    """Two templates of width 2, threshold 5, four rows."""
    values: dict[str, object] = {
        "x": np.float32([[[9, 0], [0, -9], [1, 1], [5, 0]]]),
        "templates": np.float32([[10, 0], [0, -10]]),
        "threshold": 5.0,
        "first": np.zeros((1, 4), bool),
        "valid": np.ones((1, 4), bool),
        "index": np.int32([[1, 2, 0, 1]]),
    }
    return Case(**(values | changes))


def test_threshold_is_exclusive_and_rows_match_the_nearest_template() -> None:
    assert run("SinkDetect", example()).tolist() == [[1, 2, 0, 0]]


def test_first_is_a_member_at_any_magnitude() -> None:
    first = np.array([[False, False, True, False]])
    assert run("SinkDetect", example(first=first)).tolist() == [[1, 2, 1, 0]]


def test_pads_are_never_sinks() -> None:
    """Not even where a left pad has position 0."""
    everywhere = np.ones((1, 4), bool)
    found = run("SinkDetect", example(first=everywhere, valid=~everywhere))
    assert found.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_overflowed_rows_still_match(dtype: type) -> None:
    x = np.array([[[np.inf, 0], [0, -np.inf], [0, 0], [0, 0]]], dtype)
    assert run("SinkDetect", example(x=x)).tolist() == [[1, 2, 0, 0]]


def test_insert_replaces_rows_that_are_not_finite() -> None:
    """A multiplication by a mask would give inf * 0 = NaN."""
    x = np.float32([[[np.inf, np.nan], [np.nan, 0], [1, 1], [-np.inf, 0]]])
    found = run("SinkClampInsert", example(x=x))
    assert found.tolist() == [[[10, 0], [0, -10], [1, 1], [10, 0]]]


def test_functions_carry_only_standard_ops() -> None:
    """One file serves the function-body form and the plugin form."""
    found = {function.name: function for function in functions(21)}
    assert set(found) == set(OPS)
    for function in found.values():
        assert {node.domain for node in function.node} <= {"", "ai.onnx"}
        assert [(x.domain, x.version) for x in function.opset_import] == [("", 21)]
        assert {"plugin_namespace", "plugin_version"} <= set(function.attribute)
