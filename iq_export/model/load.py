"""What MODEL means, and how it becomes a transformers model with its tokenizer.

This is the only place that knows model families, and it only knows what transformers knows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import io
import json
import re
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from iq_export.checksum import sha256_file
from iq_export.errors import ModelError, UsageError
from iq_export.model.fetch import EMBEDDED, announcement, check_terms, embedded_model
from iq_export.model.gguf import apply_keys, check_kind, check_loaded
from iq_export.model.gguf_file import read_header
from iq_export.model.gguf_tokenizer import check_tokenizer, end_ids
from iq_export.progress import Progress

Kind = Literal["hub", "folder", "gguf", "onnx"]

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
# What a causal LM needs from a hub repository; weights in one format only.
_HUB_FILES = [
    "*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py", "LICENSE*", "NOTICE*",
]  # fmt: skip
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class ModelSource:
    """A model that was asked for, found but not loaded.

    `path` is a folder or file; None for a hub id and for an embedded model until
    `materialize`. `tokenizer` is a folder with a tokenizer, if one was named.
    """

    kind: Kind
    name: str
    path: Path | None = None
    tokenizer: Path | None = None
    revision: str | None = None
    license_note: str = ""
    trust_remote_code: bool = False


@dataclass
class LoadedModel:
    """A transformers causal LM in fp32."""

    model: Any
    license_files: tuple[Path, ...]


def resolve(
    model: str,
    *,
    tokenizer: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    accept_terms: bool = False,
) -> ModelSource:
    """Decide what `model` is, without loading or downloading it.

    Raises ModelError if it is nothing known or plainly unusable, or must be downloaded under
    terms that are not accepted; UsageError if `--tokenizer` is missing or wrong.
    """
    if tokenizer is not None:
        _check_tokenizer(tokenizer)
    common: dict[str, Any] = {"tokenizer": tokenizer, "trust_remote_code": trust_remote_code}
    path = Path(model).expanduser()
    if path.is_dir():
        _check_folder(path, trust_remote_code)
        name = path.resolve().name
        return ModelSource("folder", name, path, license_note=_license_note(path), **common)
    if path.is_file():
        return _resolve_file(path, common)
    if model in EMBEDDED:
        check_terms(model, accepted=accept_terms)
        note = EMBEDDED[model].license_note
        return ModelSource("gguf", model, license_note=note, **common)
    if _HUB_ID.match(model) and not model.endswith((".gguf", ".onnx", ".safetensors")):
        return ModelSource("hub", model, revision=revision, **common)
    raise ModelError(_unknown(model))


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
    folder = _download_from_hub(source)
    _check_folder(folder, source.trust_remote_code)
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


def load_model(source: ModelSource) -> LoadedModel:
    """Load a materialized source (not `.onnx`) in fp32 on the CPU.

    Raises ModelError, in one sentence, for anything that transformers cannot read.
    """
    assert source.path is not None and source.kind != "onnx"
    _need_transformers()
    import transformers

    gguf = source.kind == "gguf"
    folder = source.path.parent if gguf else source.path
    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    if gguf:
        options["gguf_file"] = source.path.name
    # Never a pickle (pytorch_model.bin): reading one can run code.
    weights = {} if gguf else {"use_safetensors": True}
    with quiet_transformers(), readable(source):
        header = read_header(source.path) if gguf else None
        if header is not None:
            check_kind(header)
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        _check_config(config, source)
        if header is not None:
            apply_keys(header, config)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype="float32", output_loading_info=True, **options, **weights
        )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{source.name} is incomplete: {len(missing)} weights are missing, the first is "
            f"'{missing[0]}'."
        )
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # the weights were expanded to fp32 while loading
    if header is not None:
        with readable(source):
            check_loaded(header, config, model)
        model.generation_config.eos_token_id = list(end_ids(header)) or None
    model.eval().requires_grad_(False)
    return LoadedModel(model, license_files(folder))


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
            if source.tokenizer is None:
                check_tokenizer(header)
        return source
    if suffix == ".onnx":
        if common["tokenizer"] is None:
            raise UsageError(
                f"{path.name} carries no tokenizer: give the folder that has its tokenizer.json "
                "with --tokenizer FOLDER."
            )
        return ModelSource(
            "onnx", path.stem, path, license_note=_license_note(path.parent), **common
        )
    raise ModelError(
        f"{path} is neither .gguf nor .onnx; for .safetensors give the folder with its config.json."
    )


def _unknown(model: str) -> str:
    path = Path(model).expanduser()
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


def _check_tokenizer(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"--tokenizer {folder} is not a folder.")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UsageError(f"--tokenizer {folder} holds no tokenizer.json.")


def _check_folder(folder: Path, trust_remote_code: bool) -> None:
    """Refuse early what transformers would refuse late, or after running foreign code."""
    path = folder / "config.json"
    if not path.is_file():
        inside = sorted(f.name for f in folder.glob("*") if f.suffix in (".gguf", ".onnx"))
        hint = f" Give the file: {folder / inside[0]}." if inside else ""
        raise ModelError(f"{folder} is not a Hugging Face model: it has no config.json.{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise ModelError(f"{path} does not say its model_type.")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method:
        raise ModelError(
            f"{folder.name} is already quantized ({method}): give the checkpoint in full or half "
            "precision."
        )
    if "auto_map" in config and not trust_remote_code and not _known_type(kind):
        raise ModelError(
            f"{folder.name} comes with its own Python code (model type '{kind}'); if you trust its "
            "author, allow it with --trust-remote-code."
        )
    for file in sorted(folder.glob("*.safetensors")):
        _check_safetensors(file)


def _known_type(model_type: str) -> bool:
    _need_transformers()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _check_config(config: Any, source: ModelSource) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{source.name} ('{config.model_type}') is an encoder-decoder model; only "
            "decoder-only causal LMs can be compiled."
        )
    remote = source.trust_remote_code and getattr(config, "auto_map", None)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise ModelError(
            f"{source.name} has architecture '{config.model_type}', which is not a causal LM in "
            "this version of transformers."
        )
    needed = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
    lacking = [name for name in needed if not isinstance(getattr(config, name, None), int)]
    if lacking:
        raise ModelError(
            f"{source.name} has architecture '{config.model_type}', whose configuration has no "
            f"single '{lacking[0]}' (several modalities, or no attention); it is not supported."
        )


def _check_safetensors(path: Path) -> None:
    """The header must parse and the file be as long as it says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        header = file.read(length) if length < size else b""
    try:
        tensors = json.loads(header)
        ends = [tensors[key]["data_offsets"][1] for key in tensors if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ModelError(f"{path} is damaged: its safetensors header cannot be read.") from error
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise ModelError(
            f"{path} is damaged or was not downloaded in full: it has {size} bytes of {expected}."
        )


def _download_from_hub(source: ModelSource) -> Path:
    _need_transformers()
    import huggingface_hub
    from huggingface_hub import errors

    unreachable: tuple[type[Exception], ...] = (
        errors.LocalEntryNotFoundError, errors.HfHubHTTPError, *_transport_errors(),
    )  # fmt: skip
    try:
        folder = huggingface_hub.snapshot_download(
            source.name, revision=source.revision, allow_patterns=_HUB_FILES
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{source.name} is gated: accept its licence on https://huggingface.co/{source.name} "
            "and log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no model '{source.name}' on the Hugging Face hub, or it is private: check "
            "the name, or log in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{source.name} has no revision '{source.revision}'.") from error
    except errors.HFValidationError as error:
        raise ModelError(f"'{source.name}' is not a valid hub id.") from error
    except unreachable as error:
        raise ModelError(
            f"The Hugging Face hub cannot be reached for '{source.name}': download the model "
            "elsewhere and give its folder, or set HF_ENDPOINT to a mirror."
        ) from error
    return Path(folder)


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the hub client's HTTP library raises; which library it is depends on its version."""
    clients = [sys.modules.get(name) for name in ("httpx2", "httpx", "requests")]
    found = [
        getattr(client, name)
        for client in clients
        for name in ("HTTPError", "RequestException")
        if hasattr(client, name)
    ]
    return (ConnectionError, TimeoutError, *found)


def _files(root: Path) -> list[Path]:
    """The files that make up a source, in a fixed order."""
    if root.is_file():
        data = sorted(root.parent.glob(f"{root.name}*data")) if root.suffix == ".onnx" else []
        return [root, *data]
    wanted = {file for pattern in _HUB_FILES for file in root.glob(pattern) if file.is_file()}
    return sorted(wanted)


def _license_note(folder: Path) -> str:
    """What the folder itself says about its licence: the model card's field, or a file's name."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        match = re.search(r"^license(?:_name)?:\s*(\S+)", text, re.MULTILINE)
        if match:
            return match[1]
    return ", ".join(file.name for file in license_files(folder))


@contextmanager
def readable(source: ModelSource) -> Iterator[None]:
    """Turn what transformers and its readers raise into one ModelError."""
    import safetensors

    try:
        yield
    except ModelError:
        raise
    except (
        OSError, ValueError, KeyError, IndexError, RuntimeError, TypeError, AttributeError,
        ImportError, struct.error, safetensors.SafetensorError,
    ) as error:  # fmt: skip
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ModelError(
            f"{source.name} cannot be loaded from {source.path}: {reason.rstrip('.')}. The file "
            "may be damaged or of an unsupported architecture."
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and warnings of transformers between our own lines of progress."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # Its GGUF reader draws a bar of its own that cannot be switched off.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _need_transformers() -> None:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(
            "Loading a model needs torch and transformers: pip install 'iq-export[compile]'."
        ) from error
