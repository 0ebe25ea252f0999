"""Which files an ONNX model consists of."""

from __future__ import annotations

from pathlib import Path

from iq_export.errors import GraphError, IqError
from iq_export.files import parts_inside
from iq_export.graph.external import external_tensors, place
from iq_export.graph.proto import read


def model_files(path: Path, error: type[IqError] = GraphError) -> list[Path]:
    """The ONNX file at `path` and its external data, whatever their names, in a fixed order.

    Raises `error` if the file is no ONNX model, or names data outside of its folder.
    """
    from google.protobuf.message import DecodeError

    try:
        model = read(path, error)
    except DecodeError as problem:
        raise error(f"{path} is not a readable ONNX model: {problem}") from problem
    names = {place(tensor, error).value for tensor in external_tensors(model)}
    return [path, *(path.parent.joinpath(*parts_inside(name, error)) for name in sorted(names))]
