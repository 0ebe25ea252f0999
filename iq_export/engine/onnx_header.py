"""What a build must know of an ONNX file before TensorRT parses it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from iq_export.errors import EngineError

_SINK_DOMAIN = "iq"


@dataclass(frozen=True)
class OnnxHeader:
    """The standard opset a model imports, and how many sink ops of domain `iq` its graph has."""

    opset: int
    sink_nodes: int


def read_header(path: Path) -> OnnxHeader:
    """The header of the model at `path`; its external data is not touched.

    Raises EngineError if the file is missing or is no ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise EngineError(f"'{path}' cannot be read as an ONNX model: {error}.") from error
    opset = next((entry.version for entry in model.opset_import if not entry.domain), None)
    if opset is None:
        raise EngineError(f"'{path}' is no ONNX model: it imports no standard opset.")
    return OnnxHeader(opset, sum(node.domain == _SINK_DOMAIN for node in model.graph.node))
