"""The message in an ONNX file, without the external data that it names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from iq_export.errors import GraphError, IqError
from iq_export.files import read_named

if TYPE_CHECKING:
    import onnx

LARGEST = (1 << 31) - 1  # protobuf reads no more


def read(path: Path, error: type[IqError] = GraphError) -> onnx.ModelProto:
    """The message in the file at `path`.

    Raises DecodeError of protobuf if there is none, FileNotFoundError if it is missing, and `error`
    if it is no regular file or has more than `LARGEST` bytes.
    """
    import onnx

    return onnx.load_model_from_string(read_named(path, LARGEST, error))
