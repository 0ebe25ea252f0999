"""A causal LM's ONNX graph in ONNX Runtime, with the types and sizes read from the session."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from iq_export import parallel
from iq_export.errors import EngineError, GraphError
from iq_export.graph.external import check_external
from iq_export.graph.interface import FEATURES, HEADS, VOCABULARY, Interface, Role
from iq_export.graph.proto import read
from iq_export.graph.vocabulary import read_vocabulary

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

# What `--device` means; each must be there, or `open_session` refuses.
PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
}
# The first release whose CPU attention puts the softcap before the mask, as ONNX defines it: up to
# 1.26 masked tokens take part where a model has a softcap. (QuantizeLinear of opset 23 needs 1.24.)
OLDEST_RELEASE = (1, 27)

# What `forward` is given besides the cache; a graph may do without the last two.
_GIVEN = (Role.IDS, Role.MASK, Role.POSITIONS)

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
        interface = Interface.of_session(self._session)
        interface.check_causal_lm(self.path.name)
        self.num_layers = interface.layers
        self._roles = {t.role: t.name for t in interface.inputs if t.role in _GIVEN}
        self._past = interface.past
        self._present = [tensor.name for tensor in interface.present]
        self.extra_outputs = tuple(extra_outputs)
        outputs = {tensor.name for tensor in interface.outputs}
        for name in self.extra_outputs:
            if name not in outputs:
                raise GraphError(f"{self.path.name} has no output '{name}'.")
        self.empty_past(1)  # refuses a cache of another form
        first = self._past[0]
        self.kv_dtype = first.numpy_type
        self.kv_heads, self.head_dim = first.fixed(HEADS), first.fixed(FEATURES)
        logits = interface.find(Role.LOGITS)
        assert logits is not None
        self._logits = logits.name
        self.vocab_size = logits.fixed(VOCABULARY)

    @cached_property
    def embedding_rows(self) -> int:
        """Number of ids that the graph can take: not the width of its logits, `vocab_size`, which
        stands in only where the graph has no table."""
        return read_vocabulary(self.path).rows or self.vocab_size

    def empty_past(self, batch: int) -> list[NDArray[Any]]:
        """An empty cache for `batch` sequences: what a prefill starts from."""
        return [cache.empty(batch) for cache in self._past]

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
        caches = [tensor.name for tensor in self._past]
        feeds: dict[str, NDArray[Any]] = dict(
            zip(caches, past or self.empty_past(len(input_ids)), strict=True)
        )
        given = dict(zip(_GIVEN, (input_ids, attention_mask, position_ids), strict=True))
        for role, name in self._roles.items():
            feeds[name] = np.asarray(given[role], np.int64)
        logits = [self._logits] if need_logits else []
        present = self._present if need_present else []
        found = self._run([*logits, *present, *self.extra_outputs], feeds)
        empty = np.zeros((*input_ids.shape, 0), np.float32)
        return Step(
            logits=found[self._logits].astype(np.float32, copy=False) if need_logits else empty,
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
    _onnxruntime()  # before the file: what is missing here hides no other
    if not path.is_file():
        raise GraphError(f"There is no ONNX file at {path}.")
    options = _session_options(providers, threads, unpack=unpack, literal=literal)
    check_external(_read(path), weights or path.parent)
    model: str | bytes = str(path)
    if round_half and providers[0] == "CPUExecutionProvider":
        model = _with_rounding(_read(path)).SerializeToString()
        folder = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder, str(weights or path.parent))
    return _opened(model, options, providers, path.name)


def model_session(
    model: ir.Model,
    providers: Sequence[str],
    label: str,
    *,
    round_half: bool = False,
) -> Any:
    """As `open_session`, of a model in memory: its constants are computed or read now, and none is
    in memory twice but where ONNX Runtime packs it. `label` names the graph in errors. With
    `round_half` quantized weights are unpacked: a CPU would do so in every run. Else `model` is
    changed: activations get uint8 codes, since a CPU multiplies most products only so in int8.
    """
    from iq_export.formats.qdq import unsigned

    onnxruntime = _onnxruntime()
    cpu = providers[0] == "CPUExecutionProvider"
    floats = round_half or (cpu and not _exact_int8())
    if cpu and not floats:
        unsigned(model.graph)
    options = _session_options(providers, None, unpack=floats)
    # Between its runs others compute, and threads that spin would hold them up.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # An arena lives as long as any value made in it, and the index of a sink is carried to the end.
    options.enable_cpu_mem_arena = False
    proto, arrays = _apart(model)
    if any(array.nbytes >= _NOT_PACKED for array in arrays.values()):
        options.add_session_config_entry("session.disable_prepacking", "1")
    if round_half and cpu:
        proto = _with_rounding(proto)
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    if values:
        options.add_external_initializers(list(arrays), values)
    session = _opened(proto.SerializeToString(), options, providers, label)
    _HELD[session] = (arrays, values)
    return session


def needed_only() -> Any:
    """Options of a run that computes what its outputs need, and no more."""
    options = _onnxruntime().RunOptions()
    options.only_execute_path_to_fetches = True
    return options


# The arrays that sessions compute with, which ONNX Runtime does not copy.
_HELD: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_LARGE = 1024  # bytes from which a constant is handed over beside the graph
_NOT_PACKED = 256 << 20  # and from which it is packed in each run: a copy would be as large


def _apart(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """The graph, and the arrays of its large constants, which the graph names as external data."""
    import onnx_ir as ir

    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    kinds = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8)
    large = {
        name: tensor
        for name, tensor in before.items()
        if tensor is not None and tensor.dtype in kinds and tensor.nbytes >= _LARGE
    }
    computed = parallel.each(lambda each: np.ascontiguousarray(each.numpy()), large.values())
    arrays = dict(zip(large, computed, strict=True))
    for name, tensor in before.items():
        if tensor is None:
            continue
        value = model.graph.initializers[name]
        kind, shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
        if name in arrays:
            value.const_value = ir.ExternalTensor(
                "beside", 0, tensor.nbytes, kind, shape=shape, name=name
            )
        elif not isinstance(tensor, ir.TensorProtoTensor):
            value.const_value = ir.Tensor(tensor.numpy(), dtype=kind, shape=shape, name=name)
    try:
        return ir.to_proto(model), arrays
    finally:
        for name, tensor in before.items():
            model.graph.initializers[name].const_value = tensor


def _session_options(
    providers: Sequence[str],
    threads: int | None,
    *,
    unpack: bool = False,
    literal: bool = False,
) -> Any:
    onnxruntime = _onnxruntime()
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
    return options


@cache
def _exact_int8() -> bool:
    """Whether ONNX Runtime's int8 products are exact here: on x86 without VNNI, sums of two
    saturate at 16 bits (its documentation, "Quantize ONNX Models")."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return False
    return re.search(r"\bavx(512)?_vnni\b", flags) is not None


def _opened(model: str | bytes, options: Any, providers: Sequence[str], label: str) -> Any:
    try:
        return _onnxruntime().InferenceSession(model, options, providers=list(providers))
    except ort_errors() as error:
        raise GraphError(f"ONNX Runtime cannot load {label}: {_line(error)}") from error


def literal_session(model: bytes, name: str) -> Any:
    """A session of a graph in memory, called `name`, on the CPU; no optimizer is on.

    Raises GraphError if it cannot be loaded.
    """
    providers = ["CPUExecutionProvider"]
    options = _session_options(providers, None, literal=True)
    options.enable_cpu_mem_arena = False  # as in `model_session`
    return _opened(model, options, providers, name)


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
    allowed = parallel.cores()
    return allowed if allowed < (os.cpu_count() or allowed) else None


def _with_rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph `model` with a Concat of one input after every op that gives a half value.

    Concat moves data of any type as it is, so ONNX Runtime has to make the half value for it.
    """
    import onnx

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
    return model


def _read(path: Path) -> onnx.ModelProto:
    """The graph at `path` without its weights."""
    from google.protobuf.message import DecodeError

    try:
        return read(path)
    except DecodeError as error:
        raise GraphError(f"{path.name} is not a readable ONNX model: {error}") from error


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
