"""A Triton Inference Server model repository from a bundle: `REPO/<model>/` with its files.

The model folder is written whole or not at all, and checked here as far as that goes without a
server: names, types and shapes are those of the manifest, which the engine was built from.
"""

from __future__ import annotations

import json
import math
import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from iq_export.bundle.lock import Say, quiet
from iq_export.bundle.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    TensorInfo,
    reading_records,
    record_files,
)
from iq_export.bundle.package import (
    MODEL_NAME,
    Bundle,
    atomic_folder,
    clear_partial,
    require_space,
)
from iq_export.engine.build import EngineReport
from iq_export.engine.plugin import LIBRARY
from iq_export.engine.profile import AXES, Profile
from iq_export.engine.targets import RTX
from iq_export.errors import BundleError, EngineError, UsageError
from iq_export.files import copy_belonging
from iq_export.graph.interface import BATCH, Interface, Role, Tensor, name_of

BACKENDS = ("tensorrt", "onnxruntime")
CONFIG_NAME = "config.pbtxt"
README_NAME = "README.md"
REGISTER_VARIABLE = "IQ_REGISTER_PLUGINS"  # as in plugins/src/register.cpp

_PLATFORMS = {"tensorrt": "tensorrt_plan", "onnxruntime": "onnxruntime_onnx"}
_MARK = "# Written by iq-export package --triton."
_VERSION = "1"
# Whatever a model folder of this program may hold.
_OURS = re.compile(
    rf"{re.escape(CONFIG_NAME)}|{README_NAME}|{re.escape(LIBRARY)}"
    rf"|{_VERSION}(/model\.plan|/{re.escape(MODEL_NAME)}(\.[^/]+)?)?"
)
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_COLUMNS = 100
# The manifest's types (ONNX's names in lower case), Triton's, and bytes of an element.
_TYPES = {
    "bool": ("TYPE_BOOL", 1),
    "int8": ("TYPE_INT8", 1),
    "uint8": ("TYPE_UINT8", 1),
    "int32": ("TYPE_INT32", 4),
    "int64": ("TYPE_INT64", 8),
    "float16": ("TYPE_FP16", 2),
    "bfloat16": ("TYPE_BF16", 2),
    "float": ("TYPE_FP32", 4),
}


@dataclass(frozen=True)
class Model:
    """A model folder that is to be, or was, written. `written` is False if it was there already.

    `texts` are its written files and `copies` those of the bundle, by their name in the folder.
    `options` is what tritonserver needs besides the repository.
    """

    name: str
    backend: str
    folder: Path
    options: tuple[str, ...]
    texts: dict[str, str]
    copies: dict[str, str]
    written: bool = True


def write_repository(
    bundle: Bundle,
    repository: Path,
    *,
    target: str | None = None,
    backend: str = "tensorrt",
    name: str | None = None,
    force: bool = False,
    say: Say = quiet,
) -> Model:
    """Write the model folder into `repository`, unless the very same one is there.

    `bundle` must have been opened with its files checked. Raises UsageError for a choice that the
    bundle does not have, EngineError for an engine that Triton cannot serve, and BundleError if a
    file is missing or another folder stands in the place (`force` replaces one that was written
    here). Waits for another process that writes there, which `say` names.
    """
    with reading_records(bundle.folder / MANIFEST_NAME):
        model = _plan(bundle, Path(os.path.abspath(repository)), target, backend, name)
        records = {file: bundle.manifest.files[source] for file, source in model.copies.items()}
        records.update({file: FileRecord.of(text.encode()) for file, text in model.texts.items()})
    clear_partial(model.folder)
    if model.folder.is_dir() and record_files(model.folder) == records:
        return replace(model, written=False)
    check_folder(model.folder, force)
    require_space(model.folder, sum(record.bytes for record in records.values()))
    with atomic_folder(model.folder, force, check=check_folder, say=say) as folder:
        (folder / _VERSION).mkdir()
        for file, source in model.copies.items():
            copy_belonging(bundle.root(source), source, folder / file)
        for file, text in model.texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        if record_files(folder) != records:
            raise BundleError(f"{bundle.folder} changed while it was copied: run this again")
    return model


def check_folder(folder: Path, force: bool) -> Path:
    """`folder`, refused with BundleError if another model stands there.

    `force` lets one through that this program wrote, and no other.
    """
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return folder
    try:
        ours = (folder / CONFIG_NAME).read_text(encoding="utf-8").startswith(_MARK)
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours or folder.is_symlink():
        raise BundleError(
            f"{folder} exists and is no model that iq-export wrote: choose another repository or "
            "give --name"
        )
    if not force:
        raise BundleError(
            f"{folder} holds another model: choose another repository, or give --name or --force"
        )
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not _OURS.fullmatch(name) or path.is_symlink():
            raise BundleError(
                f"{folder} holds {name!r}, which iq-export did not write: --force would delete it; "
                "move it away or give another --name"
            )
    return folder


def _plan(
    bundle: Bundle, repository: Path, target: str | None, backend: str, name: str | None
) -> Model:
    """What the model folder is to hold."""
    manifest, graph = bundle.manifest, bundle.manifest.graph
    name = _model_name(manifest, name)
    engine: EngineReport | None
    if not graph.inputs or not graph.outputs:
        raise BundleError(
            f"{bundle.folder} does not record its inputs and outputs: compile it again"
        )
    if backend == "tensorrt":
        engine = choose_engine(bundle, target)
        profile = Profile.from_json(engine.profile)
        copies, options = _engine_files(engine), _engine_options(name, engine)
    elif target is not None:
        raise UsageError("--target chooses an engine, and the backend onnxruntime uses none.")
    else:
        engine = None
        profile = Profile.from_json(graph.profile) if graph.profile else Profile()
        copies, options = _graph_files(bundle), ()
    texts = {
        CONFIG_NAME: config_text(manifest, name, backend, profile),
        README_NAME: readme_text(manifest, name, backend, profile, engine, options),
    }
    return Model(name, backend, repository / name, options, texts, copies)


def _model_name(manifest: Manifest, name: str | None) -> str:
    """Triton's name of the model, which is that of its folder."""
    if name is None:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", manifest.name).strip("._-")
    if not _MODEL_NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot be a model's name: give --name with letters, digits, '.', '_', '-'."
        )
    return name


def choose_engine(bundle: Bundle, target: str | None) -> EngineReport:
    """The engine of `target`, or the only one. Raises if Triton cannot serve it."""
    engines = bundle.manifest.graph.engines
    if not engines:
        raise BundleError(
            f"{bundle.folder} has no engine: build one on the device with 'iq-export build', or "
            "give --backend onnxruntime"
        )
    if target is None and len(engines) > 1:
        raise UsageError(f"the bundle has several engines ({', '.join(engines)}): give --target.")
    target = target or next(iter(engines))
    if target not in engines:
        raise UsageError(f"the bundle has no engine '{target}', only {', '.join(engines)}.")
    try:
        engine = EngineReport.from_json(engines[target])
    except TypeError as error:
        raise BundleError(
            f"the record of engine '{target}' is not whole ({error}): build it again"
        ) from error
    _check_engine(engine)
    return engine


def _check_engine(engine: EngineReport) -> None:
    if engine.flavour == RTX:
        raise EngineError(
            f"the engine '{engine.target}' is a plan of TensorRT for RTX, and Triton's TensorRT "
            "backend runs plans of enterprise TensorRT only: choose such a target (h100, b200, "
            "orin, thor) or give --backend onnxruntime."
        )
    if engine.strip_weights:
        raise EngineError(
            f"the engine '{engine.target}' was built with --stripWeights, and Triton does not "
            "refit: build it with its weights."
        )


def _engine_files(engine: EngineReport) -> dict[str, str]:
    files = {f"{_VERSION}/model.plan": f"engines/{engine.plan}"}
    if _needs_library(engine):
        files[LIBRARY] = f"plugins/{LIBRARY}"
    return files


def _graph_files(bundle: Bundle) -> dict[str, str]:
    """The ONNX file, by the name that Triton looks for, and its external data, which it finds
    beside itself by its own."""
    graph = bundle.manifest.graph
    return {f"{_VERSION}/{MODEL_NAME}": graph.file, f"{_VERSION}/{graph.weights}": graph.weights}


def _needs_library(engine: EngineReport) -> bool:
    return engine.form == "plugin" and not engine.plugin_embedded


def _engine_options(name: str, engine: EngineReport) -> tuple[str, ...]:
    """What the TensorRT backend must be told.

    `version-compatible` is its name for allowing host code, which plans of that kind bring (a lean
    runtime, and the plugin where it is embedded). `plugins` is opened with dlopen.
    """
    options = []
    if engine.version_compatible or engine.plugin_embedded:
        options.append("--backend-config=tensorrt,version-compatible=true")
    if _needs_library(engine):
        options.append(f"--backend-config=tensorrt,plugins=REPO/{name}/{LIBRARY}")
    return tuple(options)


def max_batch_size(manifest: Manifest, profile: Profile) -> int:
    """Triton's `max_batch_size`: the profile's largest batch, or 0 if requests cannot be joined.

    Triton joins requests along the first axis of every input and cuts every output there. That is
    right only if all of them, KV cache included, have the batch there and nowhere else. It joins
    requests whose other sizes agree, so decode steps over caches of the same length; no row reads
    another's, so nobody's logits depend on the company.
    """
    for tensor in (*manifest.graph.inputs, *manifest.graph.outputs):
        first, *rest = tensor.shape or [0]
        if first != BATCH or BATCH in rest or not rest:
            return 0
    return profile.batch.max


def config_text(manifest: Manifest, name: str, backend: str, profile: Profile) -> str:
    """`config.pbtxt`, in the text form of Triton's `ModelConfig`."""
    batch = max_batch_size(manifest, profile)
    lines = [
        f"{_MARK} Changes are refused by its next run, unless with --force.",
        f"name: {json.dumps(name)}",
        f"backend: {json.dumps(backend)}",
        f"platform: {json.dumps(_PLATFORMS[backend])}",
        f"max_batch_size: {batch}",
        "version_policy { latest { num_versions: 1 } }",
        *_tensor_lines("input", manifest.graph.inputs, batch > 0),
        *_tensor_lines("output", manifest.graph.outputs, batch > 0),
    ]
    if backend == "tensorrt":
        # The one optimisation profile of the plan. A second instance would hold a second context
        # and second buffers of the largest cache.
        lines.append('instance_group [ { count: 1 kind: KIND_GPU profile: [ "0" ] } ]')
    if batch > 1:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def _tensor_lines(kind: str, tensors: Iterable[TensorInfo], batched: bool) -> list[str]:
    """One message per tensor; Triton adds the batch axis itself where `max_batch_size` is set."""
    lines = []
    for tensor in tensors:
        shape = tensor.shape[1:] if batched else tensor.shape
        dims = ", ".join(str(size if isinstance(size, int) else -1) for size in shape)
        lines.append(
            f"{kind} [ {{ name: {json.dumps(tensor.name, ensure_ascii=False)} "
            f"data_type: {_type(tensor)[0]} dims: [ {dims} ] }} ]"
        )
    return lines


def _type(tensor: Tensor | TensorInfo) -> tuple[str, int]:
    try:
        return _TYPES[tensor.dtype]
    except KeyError:
        raise BundleError(
            f"Triton has no type for {tensor.dtype}, which '{tensor.name}' has: compile the model "
            "with another recipe"
        ) from None


def readme_text(
    manifest: Manifest,
    name: str,
    backend: str,
    profile: Profile,
    engine: EngineReport | None,
    options: Sequence[str],
) -> str:
    """What to start, how to call it, and what that costs."""
    start = " ".join(["tritonserver --model-repository=REPO", *options])
    if engine is not None and _needs_library(engine):
        start = f"{REGISTER_VARIABLE}=1 {start}"
    sections = [
        f"# {name} in Triton Inference Server",
        f"Made by `iq-export package --triton` from `{manifest.name}` ({manifest.recipe}, "
        f"{manifest.dtype}); backend {backend}.",
        "## Start",
        f"REPO is the folder that holds this one, as the server sees it:\n\n    {start}",
        *(textwrap.fill(text, _COLUMNS) for text in _needs(manifest, engine)),
        "## Call",
        _CLIENT,
        _shapes(manifest, profile),
        "## Cost",
        textwrap.fill(_cost(manifest, profile), _COLUMNS),
    ]
    return "\n\n".join(sections) + "\n"


_CLIENT = f"""\
The server keeps nothing between two requests: no text, no KV cache, no sampling. A client

1. tokenises with the bundle's `tokenizer.json` and chat template;
2. sends the prompt: `{name_of(Role.IDS)}` and `{name_of(Role.POSITIONS)}` `[batch, seq]`,
   `{name_of(Role.MASK)}` `[batch, past + seq]` of ones (zeros for padding, which stands on the
   left), and every tensor of the cache (`{name_of(Role.PAST)}`, ...) with 0 tokens;
3. takes the last row of `{name_of(Role.LOGITS)}` and chooses the next token, greedily or by
   sampling;
4. sends that token, its position, the mask longer by one, and every tensor of the cache in the
   answer as that of the same layer (`{name_of(Role.PRESENT)}` as `{name_of(Role.PAST)}`);
5. stops at an end token of `generation_config.json`."""


def _cost(manifest: Manifest, profile: Profile) -> str:
    """The bytes that a request carries because the cache is the client's."""
    interface = Interface.of_tensors(manifest.graph.inputs, manifest.graph.outputs)
    token = sum(map(_bytes_per_token, interface.past))
    logits = sum(_bytes_per_token(t) for t in interface.outputs if t.role is Role.LOGITS)
    return (
        f"The KV cache goes in and comes back with every request: {token / 1e3:.1f} kB each way "
        f"for each row and token of the past, {token * profile.past.max / 1e6:.1f} MB at the "
        f"{profile.past.max} tokens that one may have. Logits come back for every token of the "
        f"request, {logits / 1e3:.1f} kB each. A client on the server's machine can keep all of "
        "them in CUDA shared memory (`tritonclient.utils.cuda_shared_memory`), and then only "
        "copies on the device are left; over a network every decode step waits for them."
    )


def _needs(manifest: Manifest, engine: EngineReport | None) -> list[str]:
    """What the server must be or have, a paragraph each."""
    if engine is None:
        return [
            f"`model.onnx` has opset {manifest.opset} and functions of domain iq, which ONNX "
            "Runtime inlines; its release 1.27 or later is needed (earlier ones lack opset 23 or "
            "compute a softcap wrongly), so a Triton that has it."
        ]
    capabilities = ", ".join(f"sm_{sm}" for sm in engine.compute_capabilities)
    version = (
        f"TensorRT {engine.tensorrt_version.split('.')[0]}, {engine.tensorrt_version} or later "
        "(the plan is version compatible)"
        if engine.version_compatible
        else f"exactly TensorRT {engine.tensorrt_version}"
    )
    needs = [f"The plan needs {capabilities} and a Triton with {version}."]
    if engine.plugin_embedded:
        needs.append(
            "The plan carries code, its plugin library: `version-compatible=true` lets the "
            "backend run what plans carry. Serve plans of your own only."
        )
    if _needs_library(engine):
        needs.append(
            f"The plan needs the plugin library `{LIBRARY}` of this folder. Triton opens it "
            f"with `dlopen`, where TensorRT does not ask for its plugins; `{REGISTER_VARIABLE}=1` "
            "lets the library register them by itself. A plan built with `--versionCompatible` "
            "embeds the library and needs neither."
        )
    return needs


def _shapes(manifest: Manifest, profile: Profile) -> str:
    rows = ["| tensor | type | shape |", "|---|---|---|"]
    interface = Interface.of_tensors(manifest.graph.inputs, manifest.graph.outputs)
    named = [*interface.inputs, *interface.outputs]
    for tensor in named:
        if not tensor.layer:  # one layer and one lifecycle stand for all
            shape = ", ".join(map(str, tensor.shape))
            rows.append(f"| `{tensor.name}` | {_type(tensor)[0]} | [{shape}] |")
    caches = sum(tensor.layer is not None for tensor in named)
    limits = ", ".join(
        f"{axis} {profile.axis(axis).min} to {profile.axis(axis).max}" for axis in AXES
    )
    head = f"Sizes: {limits}; total is past + seq."
    tail = f"There are {caches} cache tensors in all; `{CONFIG_NAME}` lists them."
    return "\n".join([head, "", *rows, "", tail])


def _bytes_per_token(tensor: Tensor) -> int:
    """Bytes of a tensor for one batch row and one token: its fixed sizes times its element's."""
    return math.prod(size for size in tensor.shape if isinstance(size, int)) * _type(tensor)[1]
