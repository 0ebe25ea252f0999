"""Load and save ONNX graphs as skeletons: weights stay in their data file until written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from iq_export.errors import GraphError, IqError, root_cause
from iq_export.graph.external import check_external
from iq_export.graph.proto import read
from iq_export.graph.stored import StoredTensor, lift
from iq_export.sinks import ops as sink_ops


def load(path: Path) -> ir.Model:
    """Read the graph at `path`; initializers are read when they are asked for, and not kept.

    Those of a traced graph whose weights lie in its source's files are float32 too, `[in, out]`;
    nothing is read of them before they are asked for, nor kept afterwards. Reading one then raises
    ModelError if its file has changed since. Raises GraphError if the file is not a readable ONNX
    model, or its weights lie elsewhere.
    """
    try:
        proto = read(path)
        check_external(proto, path.parent)
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
        lift(model, path.parent)
        _unmap(model.graph)
        return model
    except FileNotFoundError as error:
        raise GraphError(f"{path} does not exist.") from error
    except (
        ValueError, OSError, DecodeError, onnx.checker.ValidationError, ir.serde.SerdeError
    ) as error:  # fmt: skip
        reason = error.__cause__ or error  # a SerdeError only says in which function
        raise GraphError(f"{path} is not a readable ONNX model: {reason}") from error


class _Unmapped(ir.ExternalTensor):
    """One that keeps no file mapped: its pages would count as this process's memory for good.
    Several threads may read it at once."""

    __slots__ = ()

    def numpy(self) -> np.ndarray:
        mapped = ir.ExternalTensor(
            self.location, self.offset, self.length, self.dtype, shape=self.shape, name=self.name,
            base_dir=self.base_dir,
        )  # fmt: skip
        try:
            found = np.array(mapped.numpy())
        except (ValueError, FileNotFoundError) as error:
            raise GraphError(
                f"{self.path} does not hold the weight {self.name!r}: it was cut, removed or "
                f"replaced ({error})"
            ) from error
        mapped.release()
        return found


def _unmap(graph: ir.Graph) -> None:
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = _Unmapped(
                tensor.location, tensor.offset, tensor.length, tensor.dtype,
                shape=tensor.shape, name=str(tensor.name), base_dir=tensor.base_dir,
            )  # fmt: skip


def save_skeleton(model: ir.Model, path: Path) -> None:
    """Write the graph only. Its weights must be external tensors in the folder of `path`."""
    with _own_words():
        ir.save(model, path)


def save(model: ir.Model, path: Path) -> None:
    """Write `path` and all weights to `path`.data, one tensor in memory at a time.

    Small tensors (scales, shapes) stay in the graph: TensorRT reads Q/DQ scales as build-time
    constants, and people read the file.
    """
    with _own_words():
        ir.save(model, path, external_data=path.name + ".data", size_threshold_bytes=1024)


def whole(path: Path, place: Path) -> Path:
    """The graph at `path`, or the one written to `place`, with a copy of all weights, if those of
    `path` lie where ONNX Runtime does not look for them."""
    model = load(path)
    if not any(isinstance(v.const_value, StoredTensor) for v in model.graph.initializers.values()):
        return path
    save(model, place)
    return place


@contextmanager
def _own_words() -> Iterator[None]:
    """What computing a small tensor raises, without onnx_ir's wrapping: IqError, OSError."""
    try:
        yield
    except ir.serde.SerdeError as error:
        cause = root_cause(error)
        if isinstance(cause, (IqError, OSError)):
            raise cause from None
        raise


def add_sink_functions(model: ir.Model) -> None:
    """Register the sink ops' functions and opset imports; nothing if they are there already."""
    _add_functions(model, sink_ops.functions(model.opset_imports[""]))


def add_fused_functions(model: ir.Model) -> None:
    """As `add_sink_functions`, for the fused ops."""
    _add_functions(model, sink_ops.fused_functions(model.opset_imports[""]))


def _add_functions(model: ir.Model, protos: list[onnx.FunctionProto]) -> None:
    for proto in protos:
        function = ir.serde.deserialize_function(proto)
        model.functions.setdefault(function.identifier(), function)
    model.opset_imports.setdefault(sink_ops.DOMAIN, sink_ops.VERSION)
