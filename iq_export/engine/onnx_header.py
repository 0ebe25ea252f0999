"""What a build must know of an ONNX file before TensorRT parses it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from iq_export.errors import EngineError
from iq_export.graph.external import check_external
from iq_export.graph.interface import Interface
from iq_export.graph.proto import read

_SINK_DOMAIN = "iq"


@dataclass(frozen=True)
class OnnxHeader:
    """The standard opset a model imports, how many sink ops of domain `iq` its graph has, and what
    its Attention ops ask for: the size of a head of the KV cache (None without one), a softcap."""

    opset: int
    sink_nodes: int
    head_dim: int | None = None
    softcap: bool = False


def read_header(path: Path) -> OnnxHeader:
    """The header of the model at `path`; its external data is not read.

    Raises EngineError if the file is missing or is no ONNX model, GraphError if external data leads
    out of its folder.
    """
    from google.protobuf.message import DecodeError

    try:
        model = read(path, EngineError)
    except (OSError, DecodeError) as error:
        raise EngineError(f"'{path}' cannot be read as an ONNX model: {error}.") from error
    check_external(model, path.parent)
    opset = next((entry.version for entry in model.opset_import if not entry.domain), None)
    if opset is None:
        raise EngineError(f"'{path}' is no ONNX model: it imports no standard opset.")
    graph = model.graph
    caches = (tensor for tensor in Interface.of_proto(graph).past if tensor.kind)
    sizes = (size for tensor in caches for size in tensor.shape[-1:])
    return OnnxHeader(
        opset,
        sum(node.domain == _SINK_DOMAIN for node in graph.node),
        next((size for size in sizes if isinstance(size, int) and size > 0), None),
        any(
            attribute.name == "softcap" and attribute.f > 0
            for node in graph.node
            if node.op_type == "Attention"
            for attribute in node.attribute
        ),
    )
