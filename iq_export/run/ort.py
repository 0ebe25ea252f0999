"""A causal LM's ONNX graph in ONNX Runtime, with the types and sizes read from the session."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from iq_export.errors import EngineError, GraphError
from iq_export.graph.external import check_external
from iq_export.graph.proto import read
from iq_export.graph.vocabulary import read_vocabulary

if TYPE_CHECKING:
    import onnx

# What `--device` means; each must be there, or `open_session` refuses.
PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
}
# The first release whose CPU attention puts the softcap before the mask, as ONNX defines it: up to
# 1.26 masked tokens take part where a model has a softcap. (QuantizeLinear of opset 23 needs 1.24.)
OLDEST_RELEASE = (1, 27)
_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
}
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)$")
# Which rows of an int8 cache are sinks, one tensor per lifecycle (passes/quantize_cache.py).
_PAST_SINKS = re.compile(r"past_sinks\.\d+$")

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """Result of one forward pass.

    logits `[batch, seq, vocab]` float32 (empty if not asked for); present: key and value of every
    layer, `[batch, kv_heads, past + seq, head_dim]` in the graph's own type, then what else its
    cache holds (sink indices, `[batch, past + seq]`); extras by name.
    """

    logits: NDArray[np.float32]
    present: list[NDArray[Any]]
    extras: dict[str, NDArray[Any]] = field(default_factory=dict)


class CausalLM:
    """An ONNX Runtime session of a traced causal LM.

    `extra_outputs` are names of further graph outputs that `forward` returns in `extras`;
    `round_half`, `unpack` and `literal` are explained at `open_session`.
    Raises GraphError if the file cannot be loaded or lacks an input or output of a causal LM with
    KV cache, EngineError if a provider is not available in this ONNX Runtime.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        extra_outputs: Sequence[str] = (),
        threads: int | None = None,
        round_half: bool = False,
        unpack: bool = False,
        literal: bool = False,
    ) -> None:
        self.path = Path(path)
        self._session = open_session(
            self.path, providers, threads, round_half=round_half, unpack=unpack, literal=literal
        )
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = [value.name for value in self._session.get_outputs()]
        self._past = _past_inputs(inputs, self.path)
        self.num_layers = len(self._past) // 2
        self._present = [
            f"present.{i}.{kind}" for i in range(self.num_layers) for kind in ("key", "value")
        ]
        sinks = sorted(name for name in inputs if _PAST_SINKS.match(name))
        self._past += sinks
        self._present += [name.replace("past_", "present_", 1) for name in sinks]
        self.extra_outputs = tuple(extra_outputs)
        for name in ("logits", *self._present, *self.extra_outputs):
            if name not in outputs:
                raise GraphError(f"{self.path.name} has no output '{name}'.")
        self._inputs = tuple(
            name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs
        )
        self._caches = [inputs[name] for name in self._past]
        for cache in self._caches:
            if cache.type not in _NUMPY_TYPES:
                raise GraphError(
                    f"{self.path.name}: cache input '{cache.name}' has type {cache.type}."
                )
            rank = 2 if _PAST_SINKS.match(cache.name) else 4
            if len(cache.shape) != rank:
                raise GraphError(
                    f"{self.path.name}: cache input '{cache.name}' must have {rank} axes; its "
                    f"shape is {cache.shape}."
                )
            if rank == 4:
                _fixed(cache, 1), _fixed(cache, 3)
        first = self._caches[0]
        self.kv_dtype = np.dtype(_NUMPY_TYPES[first.type])
        self.kv_heads, self.head_dim = _fixed(first, 1), _fixed(first, 3)
        logits = next(value for value in self._session.get_outputs() if value.name == "logits")
        self.vocab_size = _fixed(logits, 2)

    @cached_property
    def embedding_rows(self) -> int:
        """Number of ids that the graph can take: not the width of its logits, `vocab_size`, which
        stands in only where the graph has no table."""
        return read_vocabulary(self.path).rows or self.vocab_size

    def empty_past(self, batch: int) -> list[NDArray[Any]]:
        """An empty cache for `batch` sequences: what a prefill starts from."""
        return [empty_cache(cache, batch) for cache in self._caches]

    def forward(
        self,
        input_ids: Ids,
        attention_mask: Ids,
        position_ids: Ids,
        past: Sequence[NDArray[Any]] | None = None,
        *,
        need_logits: bool = True,
        need_present: bool = True,
    ) -> Step:
        """Run prefill or decode.

        input_ids and position_ids `[batch, seq]`, attention_mask `[batch, past + seq]`; `past` as
        in `Step.present` of the step before (None: empty). Raises GraphError with ONNX Runtime's
        message if the run fails.
        """
        feeds: dict[str, NDArray[Any]] = dict(
            zip(self._past, past or self.empty_past(len(input_ids)), strict=True)
        )
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        feeds.update({name: np.asarray(given[name], np.int64) for name in self._inputs})
        logits = ["logits"] if need_logits else []
        present = self._present if need_present else []
        found = self._run([*logits, *present, *self.extra_outputs], feeds)
        empty = np.zeros((*input_ids.shape, 0), np.float32)
        return Step(
            logits=found["logits"].astype(np.float32, copy=False) if need_logits else empty,
            present=[found[name] for name in present],
            extras={name: found[name] for name in self.extra_outputs},
        )

    def _run(self, names: list[str], feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return run_session(self._session, names, feeds, self.path.name)


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Ids, Ids, Ids]:
    """Batch token rows of different lengths: `(input_ids, attention_mask, position_ids)`.

    All are `[batch, longest]`; padding stands on the left with mask 0 and position 0, and each
    row's own tokens count from 0.
    """
    longest = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), longest), pad_id, np.int64)
    mask = np.zeros_like(ids)
    positions = np.zeros_like(ids)
    for index, row in enumerate(rows):
        if row:
            ids[index, -len(row) :] = row
            mask[index, -len(row) :] = 1
            positions[index, -len(row) :] = np.arange(len(row))
    return ids, mask, positions


def open_session(
    path: Path,
    providers: Sequence[str],
    threads: int | None = None,
    *,
    round_half: bool = False,
    weights: Path | None = None,
    unpack: bool = False,
    literal: bool = False,
) -> Any:
    """A session with all optimizers on; with `literal` none is, and the file runs as it is written:
    fusions bring constants of their own, which hides wrong ones.

    A CPU computes most of a half graph in float32 and does not round between such ops: what
    overflows on a GPU passes unseen, and half's rounding is not measured. With `round_half` the
    value of every op is rounded; the file is as it is, and float32 graphs are not touched. Then
    `weights` may name another folder for external data than that of `path`.

    The CPU provider has no kernel for W8A8 with half parts: it dequantizes all weights in every
    step (SmolLM2: 0.48 s of one core per token, 0.05 s without). With `unpack` it does so once,
    when it loads (`unpacked_bytes` says what that takes); activations are quantized as before.

    Raises GraphError if the file cannot be loaded, EngineError if ONNX Runtime is absent, older
    than OLDEST_RELEASE or lacks a provider (it would fall back to the CPU by itself).
    """
    onnxruntime = _onnxruntime()
    if not path.is_file():
        raise GraphError(f"There is no ONNX file at {path}.")
    require_providers(providers)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised; printed as well, it would come twice
    # By default ONNX Runtime multiplies int4 weights with activations rounded to int8 on the way.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if unpack:
        # With no fusion of Q/DQ to wait for, a DequantizeLinear of constants is one itself.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if literal:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    threads = threads or _allowed_cores()
    if threads is not None:
        options.intra_op_num_threads = threads
    check_external(_read(path), weights or path.parent)
    model: str | bytes = str(path)
    if round_half and providers[0] == "CPUExecutionProvider":
        model = _with_rounding(path)
        folder = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder, str(weights or path.parent))
    try:
        return onnxruntime.InferenceSession(model, options, providers=list(providers))
    except ort_errors() as error:
        raise GraphError(f"ONNX Runtime cannot load {path.name}: {_line(error)}") from error


def literal_session(model: bytes, name: str) -> Any:
    """A session of a graph in memory, called `name`, on the CPU; no optimizer is on.

    Raises GraphError if it cannot be loaded.
    """
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    threads = _allowed_cores()
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except ort_errors() as error:
        raise GraphError(f"ONNX Runtime cannot load {name}: {_line(error)}") from error


def run_session(
    session: Any, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]], name: str
) -> dict[str, NDArray[Any]]:
    """Values by name. Raises GraphError with ONNX Runtime's message if the graph, `name`, fails."""
    try:
        values = session.run(list(outputs), dict(feeds))
    except ort_errors() as error:
        raise GraphError(f"{name} fails in ONNX Runtime: {_line(error)}") from error
    return dict(zip(outputs, values, strict=True))


def require_providers(providers: Sequence[str]) -> None:
    """Raise EngineError if ONNX Runtime is absent, too old, or lacks one of `providers`."""
    there = _onnxruntime().get_available_providers()
    missing = [name for name in providers if name not in there]
    if missing:
        raise EngineError(
            f"This ONNX Runtime has no {missing[0]}; for CUDA install the extra: "
            "pip install 'iq-export[gpu]'."
        )


def _onnxruntime() -> Any:
    oldest = ".".join(map(str, OLDEST_RELEASE))
    try:
        # It would send telemetry, and keep an id for that in the home folder.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"ONNX Runtime is not installed: pip install 'onnxruntime>={oldest}' (Python 3.11 or "
            "newer)."
        ) from error
    release = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if release < OLDEST_RELEASE:
        raise EngineError(
            f"ONNX Runtime {onnxruntime.__version__} computes attention with a softcap wrongly: "
            f"pip install 'onnxruntime>={oldest}' (Python 3.11 or newer)."
        )
    return onnxruntime


def unpacked_bytes(path: Path) -> int:
    """Size in float32 of the int8 weights of the graph at `path`: 0 if it has none or if the file
    cannot be read, which loading it will say.

    Int4 weights are not counted: ONNX Runtime has a kernel for them, which is faster as it is.
    """
    import onnx

    try:
        graph = _read(path).graph
    except GraphError:
        return 0
    int8 = (t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8)
    return 4 * sum(math.prod(tensor.dims) for tensor in int8 if len(tensor.dims) > 1)


def _allowed_cores() -> int | None:
    """The cores this process is bound to (taskset, a container), None if it may use all: ONNX
    Runtime counts the machine's, and its threads then wait for each other."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = len(os.sched_getaffinity(0))
    return allowed if allowed < (os.cpu_count() or allowed) else None


def empty_cache(value: Any, batch: int) -> NDArray[Any]:
    """Zero rows for a cache input of a session: `[batch, kv_heads, 0, head_dim]`, or `[batch, 0]`
    for a sink index."""
    shape = list(value.shape)
    rows = -2 if len(shape) > 2 else -1
    shape[0], shape[rows] = batch, 0
    return np.zeros(shape, _NUMPY_TYPES[value.type])


def _with_rounding(path: Path) -> bytes:
    """The graph at `path` with a Concat of one input after every op that gives a half value.

    Concat moves data of any type as it is, so ONNX Runtime has to make the half value for it.
    """
    import onnx

    model = _read(path)
    graph = model.graph
    kind = onnx.TensorProto.FLOAT16
    typed = (*graph.value_info, *graph.output)
    half = {v.name for v in typed if v.type.tensor_type.elem_type == kind}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "DequantizeLinear":  # has a half kernel, and is fused into products
            continue
        for position, name in enumerate(node.output):
            if name in half:
                node.output[position] = f"{name}.unrounded"
                nodes.append(
                    onnx.helper.make_node("Concat", [f"{name}.unrounded"], [name], axis=-1)
                )
    del graph.node[:]
    graph.node.extend(nodes)
    return model.SerializeToString()


def _read(path: Path) -> onnx.ModelProto:
    """The graph at `path` without its weights."""
    from google.protobuf.message import DecodeError

    try:
        return read(path)
    except DecodeError as error:
        raise GraphError(f"{path.name} is not a readable ONNX model: {error}") from error


def _past_inputs(inputs: Mapping[str, Any], path: Path) -> list[str]:
    """Names of the cache inputs in layer order; GraphError if the graph is no causal LM."""
    if "input_ids" not in inputs:
        raise GraphError(f"{path.name} is not a causal LM: it has no input 'input_ids'.")
    layers = {int(match[1]) for name in inputs if (match := _PAST.match(name))}
    names = [f"past_key_values.{i}.{kind}" for i in range(len(layers)) for kind in ("key", "value")]
    lacking = [name for name in names or ["past_key_values.0.key"] if name not in inputs]
    if lacking:
        raise GraphError(f"{path.name} has no input '{lacking[0]}': it was exported without cache.")
    return names


def _fixed(value: Any, axis: int) -> int:
    """The size of an axis that must not be dynamic."""
    size = value.shape[axis] if axis < len(value.shape) else None
    if not isinstance(size, int):
        raise GraphError(
            f"Axis {axis} of '{value.name}' must have a fixed size; its shape is {value.shape}."
        )
    return size


def ort_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = (
        "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NoModel",
        "EPFail", "EngineError", "ModelLoaded", "NotImplemented", "RuntimeException",
    )  # fmt: skip
    known = tuple(getattr(state, name) for name in names if hasattr(state, name))
    return (*known, ValueError)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
