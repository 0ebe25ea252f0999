"""What graphs/ shows is what the passes do, and the shown graphs are valid and run."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession

from tests.passes.goldens import FOLDER, PASSES, after, before, files

HINT = "run `python -m tests.passes.goldens` and look at the difference"


@pytest.mark.parametrize("name", files())
def test_text_is_up_to_date(name: str) -> None:
    assert (FOLDER / name).read_text("utf-8") == files()[name], HINT


def test_no_text_without_a_pass() -> None:
    shown = {path.name for path in FOLDER.glob("*.onnxtxt")}
    assert shown == set(files())


def outputs(model: onnx.ModelProto) -> list[np.ndarray]:
    """Two left-padded rows through the graph, as many of its inputs as it has."""
    kinds = {item.name: item.type.tensor_type for item in model.graph.input}
    feeds = {
        "input_ids": np.array([[0, 1, 2, 1], [2, 0, 2, 1]]),
        "attention_mask": np.array([[1, 1, 1, 1], [0, 1, 1, 1]]),
        "position_ids": np.array([[0, 1, 2, 3], [0, 0, 1, 2]]),
        "index": np.zeros((2, 4), np.int32),
        "mask": np.tril(np.ones((2, 1, 4, 4), bool)),
        "past_sinks.0": np.zeros((2, 0), np.int32),
    }
    for name in {"past_key", "past_value"} & kinds.keys():
        sizes = [dim.dim_value for dim in kinds[name].shape.dim]  # 0 where it is dynamic
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kinds[name].elem_type)
        feeds[name] = np.zeros([2, *sizes[1:]], dtype)
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()})


@pytest.mark.parametrize("name", PASSES)
def test_shown_graphs_are_valid(name: str) -> None:
    for model in (before(name), after(name)):
        onnx.checker.check_model(model, full_check=True)
        assert all(np.isfinite(value).all() for value in outputs(model))


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("fold_smoothing", 1e-5), ("rotate", 1e-5), ("to_half", 5e-3), ("quantize_int8", 0.2),
     ("quantize_int4", 0.5)],
)  # fmt: skip
def test_shown_graphs_compute_the_same(name: str, tolerance: float) -> None:
    for exact, found in zip(outputs(before(name)), outputs(after(name)), strict=True):
        np.testing.assert_allclose(found, exact, atol=tolerance)
