"""What MODEL means, and how it becomes a transformers model with its tokenizer.

This is the only place that knows model families, and it only knows what transformers knows.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import operator
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from iq_export.checksum import sha256_file
from iq_export.errors import IqError, ModelError, UsageError
from iq_export.files import open_belonging, read_belonging
from iq_export.graph.interface import Interface, Role
from iq_export.graph.model_files import model_files
from iq_export.graph.proto import read
from iq_export.graph.stored import Stored
from iq_export.model import hub
from iq_export.model.encoders import TASKS, TEXT_GENERATION, load_encoder, task_of
from iq_export.model.fetch import EMBEDDED, announcement, check_terms, embedded_model
from iq_export.model.gguf import apply_keys, check_kind, check_loaded, read_weights
from iq_export.model.gguf_file import GgufHeader, check_whole, read_header, without_tokens
from iq_export.model.gguf_tokenizer import check_tokenizer, end_ids
from iq_export.model.layout import INDEX, check_layout
from iq_export.model.part import leave_out, model_class
from iq_export.model.quiet import quiet
from iq_export.model.support import check_config
from iq_export.model.weights import (
    Weights,
    checkpoint,
    data_file,
    merged_experts,
    moved,
    stored_tensors,
)
from iq_export.model.weights_check import (
    check_adapters,
    check_finite,
    check_sizes,
    check_unexpected,
)
from iq_export.progress import Progress
from iq_export.run.assets import read_object

Kind = Literal["hub", "folder", "gguf", "onnx"]

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
# What a causal LM needs from a hub repository; weights in one format only.
_HUB_FILES = [
    "*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py", "LICENSE*", "NOTICE*",
]  # fmt: skip
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_LARGEST_HEADER = 100_000_000  # as safetensors itself has it
_LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_CARD = "README.md"
# What transformers reads besides, to make a tokenizer.
_ALSO_READ = ("vocab.*", "*.tiktoken", "additional_chat_templates/*.jinja")
_LARGEST_CARD = 1 << 24
_PACKAGE = __name__.partition(".")[0]
_FAULTS = (AssertionError, AttributeError, ImportError, LookupError, NameError, TypeError)


@dataclass(frozen=True)
class ModelSource:
    """A model that was asked for, found but not loaded.

    `path` is a folder or file; None for a hub id and for an embedded model until
    `materialize`. `tokenizer` is a folder with a tokenizer, if one was named; `part` what of the
    checkpoint is wanted, None for all of it. `reads_text`: whether its input is text. `task`: one
    of `encoders.TASK_NAMES`. `cache`: whether an `.onnx` file takes one.
    """

    kind: Kind
    name: str
    path: Path | None = None
    tokenizer: Path | None = None
    revision: str | None = None
    license_note: str = ""
    trust_remote_code: bool = False
    part: str | None = None
    reads_text: bool = True
    task: str = TEXT_GENERATION
    cache: bool = True

    @property
    def is_encoder(self) -> bool:
        """Whether it is a model of transformers without a cache."""
        return self.task != TEXT_GENERATION


@dataclass
class LoadedModel:
    """A transformers causal LM in fp32, in which placeholders of `weights` stand for all large
    tensors; `notes` on what was left out."""

    model: Any
    license_files: tuple[Path, ...]
    weights: Weights
    notes: tuple[str, ...] = ()


def resolve(
    model: str,
    *,
    tokenizer: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    accept_terms: bool = False,
    part: str | None = None,
    task: str | None = None,
) -> ModelSource:
    """Decide what `model` is, without loading or downloading it.

    Raises ModelError if it is nothing known or plainly unusable, or must be downloaded under
    terms that are not accepted; UsageError if `--tokenizer` is missing or wrong, or `--part` is
    given for a file, which has one part.
    """
    if tokenizer is not None:
        _check_tokenizer(tokenizer, trust_remote_code)
    common: dict[str, Any] = {"tokenizer": tokenizer, "trust_remote_code": trust_remote_code}
    path = _path(model)
    asked = task_of({}, task)
    if path.is_dir():
        config = path / "config.json"
        found = task_of(read_object(config) if config.is_file() else {}, task)
        common |= {"task": found, "reads_text": _task_reads_text(found), "part": part}
        _check_folder(path, trust_remote_code, found, tokenizer=tokenizer is None)
        name = path.resolve().name
        return ModelSource("folder", name, path, license_note=_license_note(path), **common)
    if part is not None and (path.is_file() or model in EMBEDDED):
        raise UsageError(f"{model} is a text decoder as a whole: leave out --part {part}.")
    if path.is_file():
        return _resolve_file(path, common)
    if model in EMBEDDED:
        check_terms(model, accepted=accept_terms)
        note = EMBEDDED[model].license_note
        return ModelSource("gguf", model, license_note=note, **common)
    if _HUB_ID.match(model) and not model.endswith((".gguf", ".onnx", ".safetensors")):
        common |= {"task": asked, "reads_text": _task_reads_text(asked), "part": part}
        return ModelSource("hub", model, revision=revision, **common)
    raise ModelError(_unknown(model))


def configuration(source: ModelSource) -> dict[str, Any] | None:
    """The content of a folder's or hub model's config.json, fetched alone, with no weights.

    None for other kinds of models, and where the hub cannot be reached. Raises ModelError if the
    hub has no such model, or its files show that it cannot be compiled.
    """
    if source.kind == "folder" and source.path is not None:
        return read_object(source.path / "config.json")
    if source.kind != "hub":
        return None
    _need_transformers()
    seen = hub.look_at(source.name, source.revision)
    if seen is None:
        return None
    if seen.config is not None:
        where = f"config.json of {source.name}"
        _check_header(seen.config, source.name, where, source.trust_remote_code)
    if seen.sizes or seen.config is None:
        # Whether shards are missing is seen after the download.
        names = seen.sizes.keys()
        check_layout(
            names, source.name, seen.config, encoder=source.is_encoder,
            tokenizer=source.tokenizer is None and source.reads_text,
        )  # fmt: skip
    return seen.config


def materialize(source: ModelSource, progress: Progress | None = None) -> ModelSource:
    """Download what is not on this disk yet; afterwards `path` exists.

    A large download is announced through `progress`, with the terms it comes under.

    Raises ModelError if the model cannot be had (unknown, gated, hub unreachable).
    """
    if source.path is not None:
        return source
    if source.kind == "gguf":
        if progress is not None and (note := announcement(source.name)):
            progress.note(note)
        return dataclasses.replace(source, path=embedded_model(source.name))
    _need_transformers()
    folder = hub.download(source.name, source.revision, _HUB_FILES)
    _check_folder(folder, source.trust_remote_code, source.task, tokenizer=source.tokenizer is None)
    revision = folder.name if folder.parent.name == "snapshots" else source.revision
    return dataclasses.replace(
        source, path=folder, revision=revision, license_note=_license_note(folder)
    )


def fingerprint(source: ModelSource) -> str:
    """SHA-256 over the contents of a materialized source's files, and of its tokenizer's."""
    files = [file for root in (source.path, source.tokenizer) if root for file in _files(root)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def load_model(source: ModelSource, folder: Path) -> LoadedModel:
    """Load a materialized source (not `.onnx`) in fp32 on the CPU; its weights stay on the disk.

    They stay in safetensors files; those of other sources are written to `DATA_FILE` of `folder`,
    one at a time. Raises ModelError, in one sentence, for anything that transformers cannot read.
    """
    assert source.path is not None and source.kind != "onnx"
    _need_transformers()
    if source.is_encoder:
        return _load_encoder(source, folder)
    import transformers

    gguf = source.kind == "gguf"
    home = source.path.parent if gguf else source.path
    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    with quiet(), readable(source):
        header = read_header(source.path) if gguf else None
        if header is not None:
            check_kind(header)
    keys = nullcontext(source.path) if header is None else without_tokens(header, folder)
    with keys as outline, quiet(), readable(source, outline):
        if header is None:
            config = transformers.AutoConfig.from_pretrained(home, **options)
        else:
            config = transformers.AutoConfig.from_pretrained(
                outline.parent, gguf_file=outline.name, **options
            )
            config._name_or_path = str(home)
            apply_keys(header, config)
        remote = bool(source.trust_remote_code and getattr(config, "auto_map", None))
        check_config(config, source.name, part=source.part, remote_code=remote)
    notes: list[str] = []
    weights = Weights()
    loaded = None if remote else _load_lazily(source, header, config, weights, folder)
    if loaded is None:
        notes.append(
            f"{source.name} was held in memory as a whole: its weights are changed as they are read"
        )
        loaded = _load_whole(source, config, remote)
    model, info, left = loaded
    check_sizes(info["mismatched_keys"], source.name)
    _check_complete(source, config, info)
    notes = [*left, *check_unexpected(model, info["unexpected_keys"], source.name), *notes]
    model.eval().requires_grad_(False)
    named = ((name, weights.read(tensor)) for name, tensor in model.named_parameters())
    check_finite(named, source.name)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # the weights were expanded to fp32 while loading
    if header is not None:
        with readable(source):
            check_loaded(header, config, model)
        model.generation_config.eos_token_id = list(end_ids(header)) or None
    if weights.empty:
        with data_file(folder) as data:
            moved(weights, model, data)
    return LoadedModel(model, license_files(home), weights, tuple(notes))


def _load_encoder(source: ModelSource, folder: Path) -> LoadedModel:
    assert source.path is not None
    with quiet(), readable(source):
        model, info = load_encoder(
            source.path, source.task, trust_remote_code=source.trust_remote_code
        )
    check_sizes(info["mismatched_keys"], source.name)
    _check_complete(source, model.config, info)
    notes = check_unexpected(model, info["unexpected_keys"], source.name)
    check_finite(model.named_parameters(), source.name)
    weights = Weights()
    with data_file(folder) as data:
        moved(weights, model, data)
    return LoadedModel(model, license_files(source.path), weights, tuple(notes))


def _check_complete(source: ModelSource, config: Any, info: dict[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        made_as = ", ".join(map(str, getattr(config, "architectures", None) or ()))
        raise ModelError(
            f"{source.name} is incomplete{made_as and f' (it was saved as {made_as})'}: "
            f"{len(missing)} weights are missing, the first is '{missing[0]}'."
        )


def _load_lazily(
    source: ModelSource, header: GgufHeader | None, config: Any, weights: Weights, folder: Path
) -> tuple[Any, dict[str, Any], list[str]] | None:
    """The model with placeholders of `weights`, what transformers says of its loading, and notes.

    None if the model is none whose weights are, one for one, those of its files.
    """
    import torch
    import transformers

    assert source.path is not None
    plain = copy.deepcopy(config)
    if header is not None:
        vars(plain).pop("quantization_config", None)  # the file's own, which is undone here
    elif getattr(config, "quantization_config", None) is not None:
        return None
    with quiet(), readable(source):
        made = model_class(config)
        if header is None:
            there = stored_tensors(source.path)
            stored = None if there is None else merged_experts(there, plain.model_type)
        else:
            with torch.device("meta"):
                bare = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(plain))
            read = read_weights(header, bare)
    if header is not None:
        stored = None if read is None else {**_written(source, read, folder)}
    if stored is None:
        return None
    with quiet(), readable(source):
        given = checkpoint(weights, stored)
        model, info = made.from_pretrained(
            None, config=plain, state_dict=given, dtype="float32", output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
        left = _text_alone(model, info) if source.part else []
        if not _is_as_given(model, info, given, weights):
            weights.forget()
            return None
        model.config.name_or_path = str(source.path.parent if header else source.path)
        if header is None:
            _read_generation_config(model, source.path)
    return model, info, left


def _text_alone(model: Any, info: dict[str, Any]) -> list[str]:
    """Leave out the other parts of a model, and what was said of their loading; notes on them."""
    notes = leave_out(model)
    kept = model.state_dict().keys()
    info["missing_keys"] = [key for key in info["missing_keys"] if key in kept]
    info["mismatched_keys"] = [entry for entry in info["mismatched_keys"] if entry[0] in kept]
    return notes


def _written(
    source: ModelSource, tensors: Iterator[tuple[str, Any]], folder: Path
) -> dict[str, Stored]:
    """Places of `tensors`, each written to `DATA_FILE` of `folder` before the next is read."""
    places: dict[str, Stored] = {}
    with data_file(folder) as data:
        while True:
            with readable(source):
                name, values = next(tensors, (None, None))
            if name is None:
                return places
            places[name] = data.add(values)


def _is_as_given(model: Any, info: dict[str, Any], given: dict[str, Any], weights: Weights) -> bool:
    """Whether each tensor that was loaded is one of `given`, and not made of some of them."""
    known = {tensor.data_ptr() for tensor in given.values()}
    apart = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    return all(
        tensor.data_ptr() in known
        and (not weights.stands_in(tensor) or weights.place(tensor) is not None)
        for name, tensor in model.state_dict().items()
        if name not in apart and tensor.numel()
    )


def _read_generation_config(model: Any, folder: Path) -> None:
    """As transformers does when it loads a model from a folder."""
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except OSError:  # settings that older models keep in their config.json
        model.generation_config = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )


def _load_whole(
    source: ModelSource, config: Any, remote: bool
) -> tuple[Any, dict[str, Any], list[str]]:
    """As `_load_lazily`, of the model with its weights."""
    import transformers

    assert source.path is not None
    gguf = source.kind == "gguf"
    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    # Never a pickle (pytorch_model.bin): reading one can run code.
    options |= {"gguf_file": source.path.name} if gguf else {"use_safetensors": True}
    with quiet(), readable(source):
        made: Any = transformers.AutoModelForCausalLM if remote else model_class(config)
        model, info = made.from_pretrained(
            source.path.parent if gguf else source.path, config=config, dtype="float32",
            output_loading_info=True, ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
        return model, info, _text_alone(model, info) if source.part else []


def license_files(folder: Path) -> tuple[Path, ...]:
    """Licence and notice files that lie beside a model."""
    return tuple(sorted({f for pattern in _LICENSES for f in folder.glob(pattern) if f.is_file()}))


def _resolve_file(path: Path, common: dict[str, Any]) -> ModelSource:
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        note = _license_note(path.parent)
        source = ModelSource("gguf", path.stem, path, license_note=note, **common)
        with readable(source):
            header = read_header(path)
            check_kind(header)
            check_whole(header)
            if source.tokenizer is None:
                check_tokenizer(header)
        return source
    if suffix == ".onnx":
        text, cache = _takes(path)
        if text and common["tokenizer"] is None:
            raise UsageError(
                f"{path.name} carries no tokenizer: give the folder that has its tokenizer.json "
                "with --tokenizer DIR."
            )
        note = _license_note(path.parent)
        return ModelSource(
            "onnx", path.stem, path, license_note=note, reads_text=text, cache=cache, **common
        )
    raise ModelError(
        f"{path} is neither .gguf nor .onnx; for .safetensors give the folder with its config.json."
    )


def _takes(path: Path) -> tuple[bool, bool]:
    """Whether an ONNX file takes token ids, and whether a cache; yes, where that is not known."""
    from google.protobuf.message import DecodeError

    try:
        interface = Interface.of_proto(read(path, ModelError).graph)
    except (DecodeError, OSError):
        return True, True  # which is said when it is read
    primary = interface.primary
    if primary is None:
        return True, True
    return primary.role is Role.IDS, interface.is_causal


def _path(model: str) -> Path:
    """What the name is as a path, with `~` for a home."""
    try:
        return Path(model).expanduser()
    except RuntimeError:  # `~nobody`
        return Path(model)


def _unknown(model: str) -> str:
    path = _path(model)
    if path.exists():
        return f"'{model}' is neither a file nor a folder."
    near = difflib.get_close_matches(model, list(EMBEDDED), cutoff=0.5)
    if path.parent.is_dir() and path.parent != Path():
        near += [
            str(path.parent / name)
            for name in difflib.get_close_matches(
                path.name, [entry.name for entry in path.parent.iterdir()], n=1
            )
        ]
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return (
        f"There is no model '{model}'.{hint} MODEL is a hub id (org/name), a local Hugging Face "
        f"folder, a .gguf or .onnx file, or one of {', '.join(EMBEDDED)}."
    )


def _check_tokenizer(folder: Path, trust_remote_code: bool) -> None:
    if not folder.is_dir():
        raise UsageError(f"--tokenizer {folder} is not a folder.")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UsageError(f"--tokenizer {folder} holds no tokenizer.json.")
    _check_places(folder)
    _check_tokenizer_code(folder, trust_remote_code)


def _check_tokenizer_code(folder: Path, trust_remote_code: bool) -> None:
    """Refuse a tokenizer that only its own Python code can make: transformers would ask on stdin.

    A `tokenizer.json` is used as it is, whatever stands beside it.
    """
    if trust_remote_code or (folder / "tokenizer.json").is_file():
        return
    config = read_object(folder / "config.json")
    unknown = "auto_map" in config and not _known_type(str(config.get("model_type")))
    if unknown or "auto_map" in read_object(folder / "tokenizer_config.json"):
        raise ModelError(
            f"The tokenizer in {folder} comes with its own Python code (auto_map); if you trust "
            "its author, allow it with --trust-remote-code."
        )


def _check_places(folder: Path) -> None:
    """Refuse a file that transformers would read elsewhere, through a link, or wait for."""
    patterns = (*_HUB_FILES, *_LICENSES, _CARD, *_ALSO_READ)
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        if not file.is_dir():
            with suppress(FileNotFoundError):  # a link to nothing
                name = file.relative_to(folder).as_posix()
                open_belonging(folder, name, ModelError).close()


def _task_reads_text(task: str) -> bool:
    return task == TEXT_GENERATION or TASKS[task].takes is Role.IDS


def _check_folder(folder: Path, trust_remote_code: bool, task: str, *, tokenizer: bool) -> None:
    """Refuse early what transformers would refuse late, or after running foreign code."""
    check_adapters(folder)
    try:
        names = [file.name for file in folder.iterdir()]
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error.strerror}.") from error
    _check_places(folder)
    config, index = (
        read_object(path) if path.is_file() else None
        for path in (folder / "config.json", folder / INDEX)
    )
    if config is not None:
        _check_header(config, folder.name, str(folder / "config.json"), trust_remote_code)
    tokenizer = tokenizer and _task_reads_text(task)
    encoder = task != TEXT_GENERATION
    check_layout(names, str(folder), config, index, tokenizer=tokenizer, encoder=encoder)
    if tokenizer:
        _check_tokenizer_code(folder, trust_remote_code)
    for file in sorted(folder.glob("*.safetensors")):
        _check_safetensors(file)


def _check_header(config: dict[str, Any], name: str, where: str, trust_remote_code: bool) -> None:
    """What a config.json says of the checkpoint as a whole: its type, its format, its code."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{where} does not say its model_type.")
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method:
        raise ModelError(
            f"{name} is already quantized ({method}): give the checkpoint in full or half "
            "precision."
        )
    kernels = [value for key, value in config.items() if key.endswith("attn_implementation")]
    if "/" in str(kernels) and not trust_remote_code:
        raise ModelError(
            f"{name} asks for code of the Hugging Face hub: take attn_implementation out of "
            f"{where}, or allow it with --trust-remote-code."
        )
    if "auto_map" in config and not trust_remote_code and not _known_type(kind):
        raise ModelError(
            f"{name} comes with its own Python code (model type '{kind}'); if you trust its "
            "author, allow it with --trust-remote-code."
        )


def _known_type(model_type: str) -> bool:
    _need_transformers()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _check_safetensors(path: Path) -> None:
    """The header must parse and the file be as long as it says."""
    if not path.is_file():
        raise ModelError(f"{path} is not a file.")
    with open_belonging(path.parent, path.name, ModelError) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        header = file.read(length) if length < min(size, _LARGEST_HEADER) else b""
    try:
        tensors = json.loads(header)
        if not isinstance(tensors, dict):
            raise TypeError("no JSON object")
        ends = [tensors[key]["data_offsets"][1] for key in tensors if key != "__metadata__"]
        expected = 8 + length + max(map(operator.index, ends), default=0)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: its safetensors header cannot be read.") from error
    if size < expected:
        raise ModelError(
            f"{path} is damaged or was not downloaded in full: it has {size} bytes of {expected}."
        )


def _files(root: Path) -> list[Path]:
    """The files that make up a source, in a fixed order."""
    if root.is_file():
        files = model_files(root, ModelError) if root.suffix.lower() == ".onnx" else [root]
        return [file for file in files if file.is_file()]  # what is missing is named later
    wanted = {file for pattern in _HUB_FILES for file in root.glob(pattern) if file.is_file()}
    return sorted(wanted)


def _license_note(folder: Path) -> str:
    """What the folder itself says about its licence: the model card's field, or a file's name."""
    if (folder / _CARD).is_file():
        text = read_belonging(folder, _CARD, _LARGEST_CARD, ModelError).decode(errors="replace")
        match = re.search(r"^license(?:_name)?:\s*(\S+)", text, re.MULTILINE)
        if match:
            return match[1]
    return ", ".join(file.name for file in license_files(folder))


@contextmanager
def readable(source: ModelSource, stand_in: Path | None = None) -> Iterator[None]:
    """Turn what a bad model makes a library raise into one ModelError; a file that stood in for the
    source's is not named.

    That may be anything: the classes of transformers trip over a configuration in every way that
    Python has, torch raises RuntimeError, safetensors an error of its own, tokenizers a bare
    Exception. What only a fault in the code raises stays as it is when a line of ours raised it.
    """
    try:
        yield
    except IqError:
        raise
    except Exception as error:
        if isinstance(error, _FAULTS) and _raised_here(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        reason = reason.replace(str(stand_in), str(source.path)) if stand_in else reason
        raise ModelError(
            f"{source.name} cannot be loaded from {source.path}: {reason.rstrip('.')}. The file "
            "may be damaged or of an unsupported architecture."
        ) from error


def _raised_here(error: Exception) -> bool:
    """Whether a line of this package raised it, and none of a library that it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return module.partition(".")[0] == _PACKAGE


def _need_transformers() -> None:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(
            "Loading a model needs torch and transformers: pip install 'iq-export[compile]'."
        ) from error
