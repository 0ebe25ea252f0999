"""External data of an ONNX file: which files it names, and that they lie where it does.

What reads a graph reads them as well (onnx_ir, ONNX Runtime, TensorRT), and not all of it looks
where a name leads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from iq_export.errors import GraphError, IqError
from iq_export.files import open_belonging

if TYPE_CHECKING:
    import onnx


def check_external(model: onnx.ModelProto, folder: Path, error: type[IqError] = GraphError) -> None:
    """Raise `error` if external data of `model`, a file in `folder`, lies elsewhere or is no file.

    A file that is missing is left to whoever reads it.
    """
    for name in {place(tensor, error).value for tensor in external_tensors(model)}:
        with suppress(FileNotFoundError):
            open_belonging(folder, name, error).close()


def place(
    tensor: onnx.TensorProto, error: type[IqError] = GraphError
) -> onnx.StringStringEntryProto:
    """The entry that names the file of an external tensor. Raises `error` if there is not one."""
    found = [entry for entry in tensor.external_data if entry.key == "location"]
    if len(found) != 1:
        raise error(f"The tensor '{tensor.name}' has external data, and names not one file for it.")
    return found[0]


def external_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors of `model` that lie in other files, in subgraphs and functions too."""
    import onnx

    for tensor in _of_graph(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor
    for function in model.functions:
        for tensor in _of_nodes(function.node):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                yield tensor


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _of_graph(graph)
