"""A half graph as float32, for processors that have no half arithmetic.

ONNX Runtime's CPU provider has no half kernels for most ops: it casts in front of each and back
behind, weights too, in every step of a generation. Here every half type in the graph is made float32
instead; codes and scales of Q/DQ keep their values. Weights stay in their file: a Cast stands behind
each, which ONNX Runtime computes once, when it loads.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iq_export.errors import GraphError

if TYPE_CHECKING:
    import onnx

# Attributes whose value is a type.
_TYPES = frozenset({"to", "dtype", "output_dtype", "softmax_precision"})


def is_half(path: Path) -> bool:
    """Whether the cache or the logits of the graph at `path` are in half precision."""
    graph = _load(path).graph
    half = _half()
    return any(v.type.tensor_type.elem_type == half for v in (*graph.input, *graph.output))


def widened(path: Path) -> bytes:
    """The graph at `path` with every half value as float32; its weights are read from beside it.

    Raises GraphError if the file is not a readable ONNX model.
    """
    import onnx

    model = _load(path)
    graph, half = model.graph, _half()
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != half:
            continue
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            name, tensor.name = tensor.name, f"{tensor.name}.half"
            to = onnx.TensorProto.FLOAT
            casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], name=name, to=to))
        else:
            _widen_tensor(tensor)
    _widen_nodes(graph.node)
    for function in model.functions:
        _widen_nodes(function.node)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return bytes(model.SerializeToString())


def _widen_nodes(nodes: Iterable[Any]) -> None:
    """Types and tensors in the attributes of `nodes`, and those of their subgraphs."""
    import onnx

    half = _half()
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name in _TYPES and attribute.i == half:
                attribute.i = onnx.TensorProto.FLOAT
            if attribute.t.data_type == half:
                _widen_tensor(attribute.t)
            for graph in (attribute.g, *attribute.graphs):
                _widen_nodes(graph.node)


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    from onnx import numpy_helper

    wide = numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))


def _half() -> int:
    import onnx

    return int(onnx.TensorProto.FLOAT16)


def _load(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise GraphError(f"{path.name} is not a readable ONNX model: {error}") from error
