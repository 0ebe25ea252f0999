"""Graphs are read as skeletons and written with their weights beside them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from iq_export import parallel
from iq_export.engine.onnx_header import read_header
from iq_export.errors import EngineError, GraphError, IqError, ModelError
from iq_export.graph import io
from iq_export.graph.edit import constant, own_constant, recompute
from iq_export.graph.model_files import model_files
from iq_export.graph.vocabulary import position_rows
from iq_export.model.trace import _read_onnx
from iq_export.run.ort import CausalLM
from iq_export.sinks.ops import OPS
from tests import planted
from tests.planted import Planted, logits

DOWN = "layers.1.mlp.down_proj.weight"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return planted.save(planted.NO_SPIKES, tmp_path)


def test_what_computing_a_small_weight_raises_comes_in_its_own_words(path: Path) -> None:
    model = io.load(path)

    def refuse(_: np.ndarray) -> np.ndarray:
        raise GraphError("beyond half")

    value = next(v for v in model.graph.initializers.values() if v.const_value.nbytes < 1024)
    recompute(value, refuse)
    with pytest.raises(GraphError, match=r"^beyond half$"):
        io.save(model, path.with_name("other.onnx"))


def test_weights_stay_in_their_file(path: Path) -> None:
    tensor = io.load(path).graph.initializers[DOWN].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.raw is None


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"nothing\.onnx does not exist"):
        io.load(tmp_path / "nothing.onnx")


@pytest.mark.parametrize("content", [b"not a protobuf", b"\x08\xff\xff"])
def test_damaged_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(GraphError, match=r"bad\.onnx is not a readable ONNX model"):
        io.load(tmp_path / "bad.onnx")


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (io.load, GraphError),
        (model_files, GraphError),
        (CausalLM, GraphError),
        (read_header, EngineError),
        (partial(_read_onnx, held=ExitStack()), ModelError),
    ],
)
def test_a_file_too_large_for_a_graph(
    tmp_path: Path, read: Callable[[Path], object], error: type[IqError]
) -> None:
    """Nothing of it is read: a sparse file of a tebibyte."""
    with (tmp_path / "large.onnx").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(error, match=rf"large\.onnx has more than {(1 << 31) - 1} bytes"):
        read(Path(stream.name))
    assert position_rows(Path(stream.name)) is None


def test_truncated_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(GraphError, match="not a readable ONNX model"):
        io.load(path)


@pytest.mark.parametrize("harm", ["cut", "removed"])
def test_weights_that_go_after_the_graph_was_opened(path: Path, harm: str) -> None:
    model, data = io.load(path), Path(f"{path}.data")
    if harm == "cut":
        data.write_bytes(data.read_bytes()[:100])
    else:
        data.unlink()
    with pytest.raises(GraphError, match="does not hold the weight"):
        model.graph.initializers[DOWN].const_value.numpy()


def test_skeleton_refers_to_the_same_weights(path: Path) -> None:
    model = io.load(path)
    skeleton = path.with_name("skeleton.onnx")
    io.save_skeleton(model, skeleton)
    assert skeleton.stat().st_size < 100_000
    assert [p.name for p in path.parent.glob("*.data")] == ["model.onnx.data"]
    rows = [[1, 2, 3]]
    np.testing.assert_array_equal(logits(CausalLM(skeleton), rows), logits(CausalLM(path), rows))


def test_saved_weights_stand_beside_the_graph(path: Path, tmp_path: Path) -> None:
    """Large tensors in NAME.data, small ones in the graph: scales, shapes."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    copy = folder / "copy.onnx"
    model = io.load(path)
    constant(model.graph, "scale", np.float32(0.5))
    io.save(model, copy)
    assert sorted(p.name for p in folder.iterdir()) == ["copy.onnx", "copy.onnx.data"]
    for tensor in onnx.load(copy, load_external_data=False).graph.initializer:
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        assert external == (np.prod(tensor.dims) * 4 >= 1024), tensor.name
    path.with_name("model.onnx.data").unlink()
    assert np.isfinite(logits(CausalLM(copy), [[1, 2, 3]])).all()


def test_saved_over_its_own_source(path: Path) -> None:
    """The weights that are read come from the file that is written."""
    before = logits(CausalLM(path), [[1, 2, 3]])
    io.save(io.load(path), path)
    np.testing.assert_array_equal(logits(CausalLM(path), [[1, 2, 3]]), before)


def test_sink_functions_are_added_once(spiky: Planted) -> None:
    model = spiky.load()
    io.add_sink_functions(model)
    io.add_sink_functions(model)
    assert sorted(key[1] for key in model.functions) == sorted(OPS)
    assert model.opset_imports["iq"] == 1
    for function in model.functions.values():
        assert function.opset_imports[""] == model.opset_imports[""]


def test_constant_is_registered(path: Path) -> None:
    graph = io.load(path).graph
    value = constant(graph, "two", np.array([2, 2], np.int64))
    assert graph.initializers["two"] is value
    assert (value.dtype, tuple(value.shape)) == (ir.DataType.INT64, (2,))


def test_own_constant_copies_only_what_is_shared(path: Path) -> None:
    graph = io.load(path).graph
    nodes = {node.name: node for node in graph}
    down = nodes["layers.1/mlp/down_proj"]
    assert own_constant(graph, down, 1) is down.inputs[1]
    assert down.inputs[1].name == DOWN
    other = nodes["layers.2/mlp/down_proj"]
    other.replace_input_with(1, down.inputs[1])
    mine = own_constant(graph, other, 1)
    assert other.inputs[1] is mine
    assert mine is not down.inputs[1]
    assert mine.const_value is down.inputs[1].const_value
    assert graph.initializers[mine.name] is mine


def test_several_threads_read_one_weight(path: Path) -> None:
    """Side channels and the product that they come of read the same one."""
    tensor = io.load(path).graph.initializers[DOWN].const_value
    values = np.array(tensor.numpy())
    for found in parallel.each(lambda _: tensor.numpy(), range(500)):
        np.testing.assert_array_equal(found, values)
