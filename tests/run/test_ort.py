"""The session wrapper: sizes and types from the file, cache, padding, and its refusals."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from iq_export.errors import EngineError, GraphError
from iq_export.run.ort import PROVIDERS, CausalLM, left_pad, open_session

Maker = Callable[..., Path]


def batch(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return left_pad(rows, 0)


@pytest.mark.parametrize("half", (False, True))
def test_sizes_and_types_are_read_from_the_session(half: bool, counting: Maker) -> None:
    model = CausalLM(counting(half=half))
    assert (model.num_layers, model.kv_heads, model.head_dim, model.vocab_size) == (2, 3, 4, 12)
    assert model.kv_dtype == (np.float16 if half else np.float32)
    step = model.forward(*batch([[3, 4]]))
    assert step.logits.dtype == np.float32 and step.logits.shape == (1, 2, 12)
    assert len(step.present) == 4 and step.present[0].dtype == model.kv_dtype
    assert [tensor.shape for tensor in model.empty_past(5)] == [(5, 3, 0, 4)] * 4


def test_the_cache_grows_and_is_passed_on(counting: Maker) -> None:
    model = CausalLM(counting())
    first = model.forward(*batch([[3, 4], [5, 6]]))
    mask = np.ones((2, 3), np.int64)
    second = model.forward(np.asarray([[7], [8]]), mask, np.full((2, 1), 2), first.present)
    assert second.present[3].shape == (2, 3, 3, 4)
    assert second.present[0][1, 0, :, 0].tolist() == [5, 6, 8]
    assert second.logits[:, 0].argmax(-1).tolist() == [8, 9]


def test_only_what_is_needed_is_computed(counting: Maker) -> None:
    model = CausalLM(counting(), extra_outputs=["position_sum"], threads=1)
    step = model.forward(*batch([[3, 4, 5]]), need_logits=False, need_present=False)
    assert step.logits.shape == (1, 3, 0) and step.present == []
    assert step.extras["position_sum"].tolist() == [3]


def test_left_pad() -> None:
    ids, mask, positions = left_pad([[5, 6, 7], [8], []], 2)
    assert ids.tolist() == [[5, 6, 7], [2, 2, 8], [2, 2, 2]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 0]]
    assert all(array.dtype == np.int64 for array in (ids, mask, positions))
    assert left_pad([], 0)[0].shape == (0, 0)


@pytest.mark.parametrize(
    "name", ("input_ids", "past_key_values.1.value", "logits", "present.0.value")
)
def test_a_missing_input_or_output_is_named(name: str, counting: Maker, tmp_path: Path) -> None:
    path = counting(layers=2)
    model = onnx.load(path)
    for values in (model.graph.input, model.graph.output):
        for value in values:
            if value.name == name:
                value.name = "other"
    for node in model.graph.node:
        node.input[:] = ["other" if i == name else i for i in node.input]
        node.output[:] = ["other" if o == name else o for o in node.output]
    onnx.save(model, path)
    with pytest.raises(GraphError, match=name):
        CausalLM(path)


@pytest.mark.parametrize("axis", (1, 3))
def test_sizes_that_are_not_fixed(axis: int, counting: Maker) -> None:
    path = counting()
    model = onnx.load(path)
    cache = next(v for v in model.graph.input if v.name == "past_key_values.0.key")
    cache.type.tensor_type.shape.dim[axis].dim_param = "unknown"
    onnx.save(model, path)
    with pytest.raises(GraphError, match=rf"Axis {axis} of 'past_key_values\.0\.key'"):
        CausalLM(path)


@pytest.mark.parametrize("name", ("past_key_values.0.key", "past_key_values.0.value"))
def test_a_cache_of_another_rank(name: str, counting: Maker) -> None:
    path = counting()
    model = onnx.load(path)
    cache = next(v for v in model.graph.input if v.name == name)
    del cache.type.tensor_type.shape.dim[3]
    onnx.save(model, path)
    with pytest.raises(GraphError, match=rf"{name}' must have 4 axes|cannot load"):
        CausalLM(path)


def test_an_unknown_extra_output_is_named(counting: Maker) -> None:
    with pytest.raises(GraphError, match="no output 'nothing'"):
        CausalLM(counting(), extra_outputs=["nothing"])


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="no ONNX file"):
        CausalLM(tmp_path / "absent.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"not an ONNX file at all")
    with pytest.raises(GraphError, match=r"cannot load damaged\.onnx"):
        CausalLM(damaged)


def test_a_provider_that_is_not_installed(counting: Maker) -> None:
    with pytest.raises(EngineError, match=r"iq-export\[gpu\]"):
        CausalLM(counting(), providers=["NoSuchExecutionProvider"])


def test_a_run_that_fails_is_one_sentence(
    counting: Maker, capfd: pytest.CaptureFixture[str]
) -> None:
    model = CausalLM(counting())
    wrong = np.ones((1, 5, 2), np.int64)
    with pytest.raises(GraphError, match=r"counting\.onnx fails") as caught:
        model.forward(wrong, np.ones((1, 5), np.int64), np.ones((1, 5), np.int64))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_a_process_bound_to_some_cores_takes_as_many_threads(counting: Maker) -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core: nothing to leave free")
    path = counting()
    os.sched_setaffinity(0, {min(cores)})
    try:
        bound = open_session(path, PROVIDERS["cpu"])
    finally:
        os.sched_setaffinity(0, cores)
    assert bound.get_session_options().intra_op_num_threads == 1
