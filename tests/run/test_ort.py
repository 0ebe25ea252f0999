"""The session wrapper: sizes and types from the file, cache, padding, and its refusals."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from iq_export.errors import EngineError, GraphError
from iq_export.run.ort import PROVIDERS, CausalLM, left_pad, open_session, unpacked_bytes

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
    with pytest.raises(GraphError, match=r"damaged\.onnx is not a readable ONNX"):
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


def quantized_products(path: Path, size: int, layers: int) -> Path:
    """`layers` W8A8 products of `[size, size]` in half precision, as a bundle has them."""
    rng = np.random.default_rng(0)
    half, int8 = onnx.TensorProto.FLOAT16, np.int8
    weights = {"scale": np.float16(1 / 64), "zero": int8(0), "zeros": np.zeros(size, int8)}
    nodes, name = [], "x"
    for i in range(layers):
        weights |= {
            f"w{i}": rng.integers(-127, 128, (size, size)).astype(int8),
            f"s{i}": (rng.uniform(0.5, 1, size) / 127 / size**0.5).astype(np.float16),
        }
        nodes += [
            helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"q{i}"]),
            helper.make_node("DequantizeLinear", [f"q{i}", "scale", "zero"], [f"d{i}"]),
            helper.make_node("DequantizeLinear", [f"w{i}", f"s{i}", "zeros"], [f"dw{i}"], axis=1),
            helper.make_node("MatMul", [f"d{i}", f"dw{i}"], [f"y{i}"]),
        ]
        name = f"y{i}"
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", half, ["rows", size])],
        [helper.make_tensor_value_info(name, half, ["rows", size])],
        [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


def test_weights_are_unpacked_once(tmp_path: Path) -> None:
    """The same result, without the work of dequantizing in every step."""
    path = quantized_products(tmp_path / "q.onnx", 768, 6)
    assert unpacked_bytes(path) == 4 * 6 * 768 * 768
    x = np.random.default_rng(1).normal(size=(1, 768)).astype(np.float16)
    values, seconds = [], []
    for unpack in (False, True):
        session = open_session(path, ("CPUExecutionProvider",), 1, unpack=unpack)
        values.append(session.run(None, {"x": x})[0].astype(np.float32))
        times = []
        for _ in range(20):
            begin = time.process_time()
            session.run(None, {"x": x})
            times.append(time.process_time() - begin)
        seconds.append(min(times))
    np.testing.assert_allclose(values[1], values[0], atol=0.02 * float(np.ptp(values[0])))
    assert seconds[1] < seconds[0] / 2


def test_what_needs_no_unpacking(tmp_path: Path, counting: Callable[..., Path]) -> None:
    assert unpacked_bytes(counting(half=True)) == 0
    (tmp_path / "no.onnx").write_bytes(b"graph")
    assert unpacked_bytes(tmp_path / "no.onnx") == 0
