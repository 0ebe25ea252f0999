"""MODEL -> a folder with one fp32 ONNX graph for prefill and decode, and the model's assets.

    folder/model.onnx                    the graph; it refers to the source's safetensors files
    folder/model.onnx.data               weights that lie in no such files (GGUF, ONNX)
    folder/assets/                       config, generation config, tokenizer, licence
    folder/trace.json                    what it was made from; a second compile reuses it

Inputs `input_ids` [batch, seq], `attention_mask` [batch, total] and `position_ids` [batch, seq],
int64, and `past_key_values.N.key/value` [batch, heads, past, features]; outputs `logits`
[batch, seq, vocab] and `present.N.key/value` [batch, heads, total, features].
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iq_export.checksum import sha256_file, sha256_stream
from iq_export.errors import GraphError, ModelError, UsageError
from iq_export.files import copy_belonging, open_belonging
from iq_export.graph.edit import copied
from iq_export.graph.external import external_tensors, place
from iq_export.graph.interface import SEQ, TOTAL, Interface, Role, input_names
from iq_export.graph.proto import read
from iq_export.graph.stored import Stamp, settle
from iq_export.model.capture import settled_rotations
from iq_export.model.load import (
    LoadedModel,
    ModelSource,
    fingerprint,
    license_files,
    load_model,
    materialize,
    readable,
)
from iq_export.model.part import decoder_name, text_config
from iq_export.model.quiet import quiet
from iq_export.model.recompose import (
    LOWEST_OPSET,
    OPSET,
    check_same,
    is_written_out,
    recompose,
)
from iq_export.model.verify import Parity, Reference, compare, refer
from iq_export.model.weights import DATA_FILE, Weights, refer_to_files
from iq_export.model.weights_check import check_finite_graph
from iq_export.progress import Progress
from iq_export.run.generate import Tokenizer

if TYPE_CHECKING:
    import onnx_ir as ir

MODEL_FILE = "model.onnx"
ASSETS = "assets"
RECORD = "trace.json"
# What says how a picture or a recording becomes the input.
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")

_FORMAT = 3
# What decides how a graph comes out, beside the model itself.
_TOOLS = ("torch", "transformers", "onnx-ir", "onnxscript")
_CODE = (
    "arithmetic.py", "capture.py", "copied_sizes.py", "encoders.py", "experts.py", "export.py",
    "fuse_activations.py", "fuse_attention.py", "fuse_norms.py", "gguf.py", "gguf_file.py",
    "gguf_tokenizer.py", "latents.py", "limits.py", "load.py", "part.py", "positions.py",
    "recompose.py", "replicate.py", "scopes.py", "tidy.py", "tokenizer.py", "trace.py",
    "unflatten.py", "verify.py", "weights.py", "written_out.py", "../graph/edit.py",
    "../graph/interface.py", "../graph/stored.py", "../observe/preprocessor.py",
)  # fmt: skip


@dataclass(frozen=True)
class TracedModel:
    """A traced model on disk.

    `parity` is the graph's largest logit error against the original in float64, as a fraction of
    the logit range, and `noise_ratio` the largest one in multiples of what the original's own
    float32 errs at that token (`verify.TOLERANCE` at most; both None for an `.onnx` source: there
    is no original); `layers_traced` is how many layers torch exported, the others being copies
    with their own weights (0 for an `.onnx` source); `notes` is what a user should know about how
    the model was read, and what of it was left out.
    """

    folder: Path
    name: str
    source_sha256: str
    seconds: float
    license_note: str = ""
    revision: str | None = None
    parity: float | None = None
    noise_ratio: float | None = None
    layers_traced: int = 0
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> Path:
        """The graph, for `graph.io.load`: its weights may lie in the source's files."""
        return self.folder / MODEL_FILE

    @property
    def assets(self) -> Path:
        """The folder of files that users of the graph need."""
        return self.folder / ASSETS

    def digests(self) -> dict[str, str]:
        """SHA-256 by file, relative to the folder, as they were when it was traced or loaded."""
        record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        return dict(record["sha256"])

    def save(self, key: str) -> None:
        """Write `trace.json`; `key` stands for everything the graph was made from."""
        record: dict[str, Any] = dataclasses.asdict(self)
        del record["folder"]
        record |= {"format": _FORMAT, "key": key, "sha256": _digests(self.folder)}
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        (self.folder / RECORD).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, key: str | None = None) -> TracedModel:
        """Read a folder that `trace` wrote.

        Raises ModelError if it is damaged or, when `key` is given, was made from something else.
        """
        folder = Path(folder)
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            names = {field.name for field in dataclasses.fields(cls)} - {"folder"}
            traced = cls(folder, **{name: record[name] for name in names})
            traced = dataclasses.replace(traced, notes=tuple(traced.notes))
            same = record["format"] == _FORMAT and key in (None, record["key"])
            intact = same and record["sha256"] == _digests(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{folder} is no folder of a traced model.") from error
        if not intact:
            raise ModelError(f"{folder} is damaged or was traced from another model or version.")
        return traced


def trace(
    source: ModelSource,
    out_dir: Path,
    *,
    opset: int = OPSET,
    progress: Progress | None = None,
    reuse: Path | None = None,
    accept: Callable[[str], object] = lambda sha256: None,
) -> TracedModel:
    """Trace `source` into `out_dir`, or find it in `reuse` (default: there) as an earlier trace
    left it. `accept` is given the source's SHA-256 before it is loaded, and raises what it likes.

    The folder is whole or absent. Nothing of the original model is in memory afterwards. Raises
    ModelError if the model cannot be had, loaded or traced, or changes meanwhile, GraphError if an
    `.onnx` source is no causal LM with cache or the traced graph does not equal the model.
    """
    progress = progress or Progress(quiet=True)
    check_traced_opset(opset)
    begin = time.perf_counter()
    with progress.step("fetch model"):
        source = materialize(source, progress)
    sha256 = fingerprint(source)
    accept(sha256)
    key = _cache_key(source, sha256, opset)
    try:
        return TracedModel.load(reuse or out_dir, key)
    except ModelError:
        pass  # not there yet, or of an older version: made anew
    with _whole_folder(Path(out_dir)) as folder:
        (folder / ASSETS).mkdir()
        notes: list[str] = []
        if source.reads_text:
            with progress.step("read tokenizer"):
                notes = _write_tokenizer(source, folder / ASSETS, progress)
        if source.kind == "onnx":
            remarks = _adopt_onnx(source, folder)
            for remark in remarks:
                progress.note(f"warning: {remark}")
            layers, notes = 0, [*notes, *remarks]
            error = ratio = None
        elif source.is_encoder:
            error, left = _trace_encoder(source, folder, opset, progress)
            ratio, layers, notes = None, 0, [*notes, *left]
        else:
            parity, layers, left = _trace_torch(source, folder, opset, progress)
            error, ratio, notes = parity.largest, parity.ratio, [*notes, *left]
        if fingerprint(source) != sha256:
            raise ModelError(
                f"The files of {source.name} changed while they were read; compile it again."
            )
        traced = TracedModel(
            folder=folder,
            name=source.name,
            source_sha256=sha256,
            seconds=time.perf_counter() - begin,
            license_note=source.license_note,
            revision=source.revision,
            parity=error,
            noise_ratio=ratio,
            layers_traced=layers,
            notes=tuple(notes),
        )
        traced.save(key)
    return dataclasses.replace(traced, folder=Path(out_dir))


def check_traced_opset(opset: int) -> None:
    """Raise UsageError for an opset that no graph is traced at."""
    if opset != OPSET:
        raise UsageError(
            f"Opset {opset} is not supported: the graph is traced at opset {OPSET}, whose single "
            "Attention, RMSNormalization and RotaryEmbedding ops it uses."
        )


def _trace_torch(
    source: ModelSource, folder: Path, opset: int, progress: Progress
) -> tuple[Parity, int, list[str]]:
    with progress.step("load model"):
        loaded = load_model(source, folder)
        _write_assets(loaded, source, folder / ASSETS)
    for note in loaded.notes:
        progress.note(note)
    reference, problem = None, ""
    for short_cut in (True, False):
        with (
            progress.step("trace to ONNX"),
            quiet(),
            readable(source),  # what a configuration means shows when the model runs
            settled_rotations(loaded.model),
        ):
            layers = _export(loaded.model, loaded.weights, folder, opset, short_cut)
        if layers is None:
            continue
        with progress.step("compare with the model"), quiet():
            with readable(source):
                reference = reference or refer(
                    loaded.model, Tokenizer(folder / ASSETS), loaded.weights
                )
            parity, problem = _compared(folder / MODEL_FILE, reference)
        if parity is not None:
            return parity, layers, list(loaded.notes)
        progress.note(f"traced from {layers} layers, the graph {problem}")
    raise GraphError(
        f"The traced graph of {source.name} (model type '{loaded.model.config.model_type}') "
        f"{problem}; this architecture is not supported."
    )


def _trace_encoder(
    source: ModelSource, folder: Path, opset: int, progress: Progress
) -> tuple[float, list[str]]:
    """As `_trace_torch`, of a model without a cache: its largest error, and notes."""
    import onnx_ir as ir

    from iq_export.model import encoders
    from iq_export.model.tidy import tidy

    assert source.path is not None
    takes = encoders.TASKS[source.task].takes
    with progress.step("load model"):
        loaded = load_model(source, folder)
        loaded.model.config.save_pretrained(folder / ASSETS)
        _write_license(loaded.license_files, source, folder / ASSETS)
        for name in PREPROCESSORS:
            if (source.path / name).is_file():
                copy_belonging(source.path, name, folder / ASSETS / name, ModelError)
    notes = [f"compiled for the task '{source.task}'", *loaded.notes]
    for note in notes:
        progress.note(note)
    model, weights = loaded.model, loaded.weights
    with quiet(), readable(source), weights.streamed(model, []):
        sizes = encoders.input_sizes(model.config, source.task, source.path)
        flat, example = encoders.flat_encoder(model, source.task, sizes)
        said = encoders.refer(flat, example, takes)
    with progress.step("trace to ONNX"), quiet(), readable(source):
        graph = encoders.export_encoder(flat, example, takes, opset=opset)
        refer_to_files(graph, weights)
        tidy(graph, module_prefix="model")
        settle(graph)
        ir.save(graph, folder / MODEL_FILE)
    with progress.step("compare with the model"):
        error = encoders.parity(folder / MODEL_FILE, said)
    if not error <= encoders.TOLERANCE:
        raise GraphError(
            f"The traced graph of {source.name} (model type '{model.config.model_type}') does not "
            f"equal the model: its outputs differ by {error:.2g} of their range (allowed is "
            f"{encoders.TOLERANCE:g}); this architecture is not supported."
        )
    return error, notes


def _compared(path: Path, reference: Reference) -> tuple[Parity | None, str]:
    """The parity if it holds; otherwise what is wrong with the graph."""
    try:
        parity = compare(path, reference)
    except GraphError as error:
        return None, f"is broken: {str(error).rstrip('.')}"
    return (parity, "") if parity.holds else (None, f"does not equal the model: {parity}")


def _export(model: Any, weights: Weights, folder: Path, opset: int, short_cut: bool) -> int | None:
    """Write the graph; returns how many layers were exported by torch.

    Weights that placeholders stand for are not written: the graph refers to their files.

    None if the short cut (see `replicate`) was asked for and is not possible.
    """
    import onnx_ir as ir

    from iq_export.model.capture import cache_shape, flat_module
    from iq_export.model.experts import mark_experts
    from iq_export.model.export import export_module
    from iq_export.model.replicate import plan_layers, replicate, shortened
    from iq_export.model.tidy import settle_axes, tidy

    mark_experts(model)
    cache, vocab = cache_shape(model), text_config(model).vocab_size
    module = flat_module(model, cache)
    plan = plan_layers(model) if short_cut else None
    if plan is not None and cache.layers != tuple(range(len(plan.template))):
        plan = None  # a layer without a cache
    if short_cut and plan is None:
        return None
    if plan is None:
        layers = cache.num_layers
        graph = export_module(module, cache, vocab, opset=opset)
        settle_axes(graph.graph)
    else:
        layers = len(plan.traced)
        with shortened(model, plan):
            graph = export_module(module, cache.of_layers(plan.traced), vocab, opset=opset)
        settle_axes(graph.graph)
        if not replicate(graph, plan, module):
            return None
    refer_to_files(graph, weights)
    tidy(graph, module_prefix=f"model.{decoder_name(model)}")
    settle(graph)
    ir.save(graph, folder / MODEL_FILE)
    return layers


def _write_tokenizer(source: ModelSource, assets: Path, progress: Progress) -> list[str]:
    from iq_export.model.tokenizer import write_tokenizer

    with readable(source):
        notes = write_tokenizer(source, assets)
    for note in notes:
        progress.note(note)
    return notes


def _write_assets(loaded: LoadedModel, source: ModelSource, assets: Path) -> None:
    text_config(loaded.model).save_pretrained(assets)
    loaded.model.generation_config.save_pretrained(assets)
    _write_license(loaded.license_files, source, assets)


def _write_license(files: tuple[Path, ...], source: ModelSource, assets: Path) -> None:
    """The model's licence beside its weights: its own files, and a notice of where it is from."""
    for file in files:
        copy_belonging(file.parent, file.name, assets / file.name, ModelError)
    if not (assets / "NOTICE").exists():
        terms = source.license_note or "not stated with the model; ask its author"
        text = f"The weights in this folder are derived from {source.name}.\nLicence: {terms}\n"
        (assets / "NOTICE").write_text(text, encoding="utf-8")


def _adopt_onnx(source: ModelSource, folder: Path) -> list[str]:
    """Take an ONNX file into the folder's layout, with names, constants and types in place.

    Weights are streamed. Returns notes on what could not be told of the graph.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    assert source.path is not None
    with ExitStack() as held:
        with _heard() as said:
            graph, data = _read_onnx(source.path, held)
        _check_interface(graph, source.path)
        if said:  # a value that nothing makes
            raise ModelError(f"{source.path} is no valid graph: {said[0]}")
        _check_external_data(graph, source.path, data)
        _check_types(graph, source.path)
        check_finite_graph(graph, source.path.name)
        original = None
        if is_written_out(graph):
            original = copied(graph)
            with _heard():
                recompose(graph, str(source.path))
        # Later passes find nodes by name, constants among the initializers, types at the values.
        with _heard() as said:
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
            common.ShapeInferencePass()(graph)
            common.NameFixPass()(graph)
        try:
            ir.save(graph, folder / MODEL_FILE, external_data=DATA_FILE)
        except ir.serde.SerdeError as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise ModelError(f"{source.path} is no valid graph: {reason}") from error
        if original is not None:
            with _heard():
                check_same(original, folder / MODEL_FILE, str(source.path))
    beside = source.tokenizer or source.path.parent
    names = ("config.json", "generation_config.json") if source.tokenizer else ()
    for name in (*names, *PREPROCESSORS):
        if (beside / name).is_file():
            copy_belonging(beside, name, folder / ASSETS / name, ModelError)
    _write_license(license_files(source.path.parent), source, folder / ASSETS)
    return [f"{source.path.name}: {line}" for line in said]


def _read_onnx(path: Path, held: ExitStack) -> tuple[ir.Model, dict[str, str]]:
    """The graph at `path`, and of every path of its external data the file's name.

    These files stay open in `held`, and are read by their descriptors: no link leads elsewhere, and
    none can be exchanged.
    """
    import onnx_ir as ir
    from google.protobuf.message import DecodeError

    names: dict[str, str] = {}
    paths: dict[str, str] = {}
    try:
        proto = read(path, ModelError)
        for tensor in external_tensors(proto):
            location = place(tensor, ModelError)
            if location.value not in paths:
                name = location.value
                try:
                    stream = held.enter_context(open_belonging(path.parent, name, ModelError))
                except FileNotFoundError:
                    raise ModelError(
                        f"The weight '{tensor.name}' of {path} is incomplete: {name} is not there."
                    ) from None
                paths[name] = f"/proc/self/fd/{stream.fileno()}"
                names[paths[name]] = name
            location.value = paths[location.value]
        return ir.from_proto(proto), names
    except (DecodeError, ValueError, KeyError, TypeError, ir.serde.SerdeError) as error:
        raise ModelError(f"{path} is not an ONNX file, or it is damaged.") from error


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What onnx_ir and onnx say while they work, a line each, which they would print amid ours.

    It says what of the file was left aside: an external weight's place under a misspelt key.
    """
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            said.append(str(error or record.getMessage()).splitlines()[0])

    logger, listener = logging.getLogger("onnx_ir"), Listener(logging.WARNING)
    logger.addHandler(listener)
    before, logger.propagate = logger.propagate, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=UserWarning)
            warnings.showwarning = lambda message, *_: said.append(str(message).splitlines()[0])
            yield said
    finally:
        logger.removeHandler(listener)
        logger.propagate = before


def _check_external_data(model: ir.Model, path: Path, data: Mapping[str, str]) -> None:
    """Every weight that lies outside of the file must be there in full: in the files of `data`."""
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        if tensor.dtype in (ir.DataType.UNDEFINED, ir.DataType.STRING):
            raise ModelError(
                f"The weight '{name}' of {path} has no type of number: export the model again."
            )
        end = (tensor.offset or 0) + tensor.nbytes
        size = os.stat(tensor.path).st_size
        if size < end:
            raise ModelError(
                f"The weight '{name}' of {path} is incomplete: {data[tensor.path]} has {size} "
                f"bytes of at least {end}."
            )


def _check_types(model: ir.Model, path: Path) -> None:
    """The passes start from a float32 graph, of opsets that can be lifted to theirs."""
    import onnx_ir as ir

    opset = model.opset_imports.get("")
    if opset not in range(LOWEST_OPSET, OPSET + 1):
        raise GraphError(
            f"{path} has opset {opset}; supported are opsets {LOWEST_OPSET} to {OPSET}. Export it "
            f"again with opset_version={OPSET}."
        )
    for node in model.graph:
        if node.op_type == "Attention" and any(node.inputs[4:6]):
            raise GraphError(
                f"Node '{node.name}' (Attention) of {path} takes the KV cache itself (past_key, "
                "past_value); export the model with the cache joined to keys and values by a "
                "Concat in front of it."
            )
    for value in model.graph.inputs:
        if value.dtype not in (ir.DataType.FLOAT, ir.DataType.INT64):
            raise GraphError(
                f"Input '{value.name}' of {path} is {value.dtype.name.lower()}; export the model "
                "in float32, it is converted to half precision by --dtype fp16."
            )


def _check_interface(model: ir.Model, path: Path) -> None:
    """Raise GraphError with the first input or output that a causal LM has and this lacks, if it
    is one; else with an input that nothing is known of. Its axes get the names that others know.
    """
    interface = Interface.of_graph(model.graph)
    primary, logits = interface.primary, interface.find(Role.LOGITS)
    text = primary is None or primary.role is Role.IDS
    if text and (interface.is_causal or logits is not None or primary is None):
        interface.check_causal_lm(str(path), (Role.IDS, Role.MASK, Role.POSITIONS))
    known = input_names(interface.layers)
    extra = sorted(
        tensor.name
        for tensor in interface.inputs
        if (tensor.name not in known if interface.is_causal else tensor.role is None)
    )
    if extra:
        raise GraphError(f"{path} has an input that is not understood: '{extra[0]}'.")
    if not interface.is_causal:
        interface.result  # noqa: B018 - raises where nothing can be compared
        _name_axes(model.graph, interface)


def _name_axes(graph: ir.Graph, interface: Interface) -> None:
    """Call the dynamic axes of inputs and outputs as an engine's shapes do."""
    import onnx_ir as ir

    named: dict[object, str] = {}
    for tensor in interface.inputs:
        for size, axis in zip(tensor.shape, tensor.axes, strict=False):
            if isinstance(size, str):
                named[size] = SEQ if axis == TOTAL else axis
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            sizes = [getattr(dim, "value", dim) for dim in value.shape]
            value.shape = ir.Shape([named.get(size) or size for size in sizes])


def _cache_key(source: ModelSource, sha256: str, opset: int) -> str:
    versions = {tool: _version(tool) for tool in _TOOLS}
    here = Path(__file__).parent
    code = hashlib.sha256(b"".join((here / name).read_bytes() for name in _CODE)).hexdigest()
    parts = [
        _FORMAT,
        source.kind,
        source.task,
        sha256,
        opset,
        versions,
        code,
        source.trust_remote_code,
        source.part,
    ]
    assert source.path is not None
    beside = source.path if source.path.is_dir() else source.path.parent
    licenses = {}
    for file in license_files(beside):
        with open_belonging(beside, file.name, ModelError) as stream:
            licenses[file.name] = sha256_stream(stream)
    parts += [source.license_note, licenses, _referred(source)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _referred(source: ModelSource) -> dict[str, Any]:
    """The files that a traced graph refers to, as they are now."""
    assert source.path is not None
    if not source.path.is_dir():
        return {}
    found: dict[str, Any] = {"folder": os.path.realpath(source.path)}
    for path in sorted(source.path.glob("*.safetensors")):
        with open_belonging(source.path, path.name, ModelError) as file:
            found[path.name] = dataclasses.astuple(Stamp.of(file))
    return found


def _version(tool: str) -> str:
    try:
        return metadata.version(tool)
    except metadata.PackageNotFoundError:
        return "none"


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 by file of what must be there for a folder to count as whole; a link is no file."""
    files = [folder / MODEL_FILE, folder / DATA_FILE, *sorted((folder / ASSETS).iterdir())]
    found = (f for f in files if f.is_file() and not f.is_symlink())
    return {str(f.relative_to(folder)): sha256_file(f) for f in found}


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `folder` on success and is removed on any failure."""
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
