"""External data lies beside its graph, wherever in the graph it is named and whoever reads it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from iq_export.engine.onnx_header import read_header
from iq_export.errors import GraphError
from iq_export.graph import io
from iq_export.run.ort import open_session

CPU = ("CPUExecutionProvider",)


def external(location: str, name: str = "w") -> onnx.TensorProto:
    tensor = numpy_helper.from_array(np.zeros(2, np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def _graph(
    nodes: list[onnx.NodeProto], weights: tuple[onnx.TensorProto, ...] = ()
) -> onnx.GraphProto:
    value = helper.make_tensor_value_info
    return helper.make_graph(
        nodes, "g", [], [value("y", onnx.TensorProto.FLOAT, [2])], initializer=weights
    )


def _model(
    nodes: list[onnx.NodeProto],
    weights: tuple[onnx.TensorProto, ...] = (),
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> onnx.ModelProto:
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("f", 1)]
    return helper.make_model(
        _graph(nodes, weights), opset_imports=imports, ir_version=11, functions=functions
    )


def as_initializer(location: str) -> onnx.ModelProto:
    return _model([helper.make_node("Identity", ["w"], ["y"])], (external(location),))


def as_constant(location: str) -> onnx.ModelProto:
    return _model([helper.make_node("Constant", [], ["y"], value=external(location))])


def in_a_subgraph(location: str) -> onnx.ModelProto:
    branch = _graph([helper.make_node("Identity", ["w"], ["y"])], (external(location),))
    true = numpy_helper.from_array(np.array(True), "true")
    node = helper.make_node("If", ["true"], ["y"], then_branch=branch, else_branch=branch)
    return _model([node], (true,))


def in_a_function(location: str) -> onnx.ModelProto:
    constant = helper.make_node("Constant", [], ["y"], value=external(location))
    function = helper.make_function("f", "F", [], ["y"], [constant], [helper.make_opsetid("", 23)])
    return _model([helper.make_node("F", [], ["y"], domain="f")], functions=(function,))


MAKERS = (as_initializer, as_constant, in_a_subgraph, in_a_function)
READERS: tuple[Callable[[Path], object], ...] = (
    io.load, read_header, lambda path: open_session(path, CPU),
    lambda path: open_session(path, CPU, round_half=True),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_bytes(bytes(8))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "data").write_bytes(bytes(8))
    (folder / "link").symlink_to("data")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "there").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("make", MAKERS)
def test_data_that_lies_elsewhere_is_refused(
    folder: Path, make: Callable[[str], onnx.ModelProto], read: Callable[[Path], object]
) -> None:
    path = folder / "model.onnx"
    for location in (str(folder / "data"), "../secret", "out", "there/secret", "pipe", ".", ""):
        path.write_bytes(make(location).SerializeToString())
        with pytest.raises(GraphError):
            read(path)


@pytest.mark.parametrize("location", ["data", "link"])
def test_data_that_lies_inside_is_read(folder: Path, location: str) -> None:
    path = folder / "model.onnx"
    path.write_bytes(as_initializer(location).SerializeToString())
    model = io.load(path)
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), np.zeros(2))
    assert read_header(path).opset == 23


def test_a_tensor_that_names_two_files(folder: Path) -> None:
    path, model = folder / "model.onnx", as_initializer("data")
    model.graph.initializer[0].external_data.add(key="location", value="../secret")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match="not one file"):
        io.load(path)
