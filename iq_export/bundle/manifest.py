"""`manifest.json`: what a bundle is, what it was made from, the checksum of every file in it."""

from __future__ import annotations

import builtins
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from iq_export.checksum import sha256_file
from iq_export.errors import BundleError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_Record = TypeVar("_Record", "FileRecord", "TensorInfo")
# Beside it, as `sha256sum` writes and checks it: a manifest cannot hold its own checksum.
CHECKSUM_NAME = "manifest.json.sha256"


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of one file of the bundle."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, content: builtins.bytes) -> FileRecord:
        """The record of a file that has this content."""
        return cls(len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class TensorInfo:
    """One graph input or output: `shape` holds ints and the names of dynamic axes."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`. Plain JSON values only, so that every field can be diffed.

    `check` compares the finished file with fp32 (`evaluate.final_check`; None in a bundle of an
    older version). `mixed` says what a `--budget` left in half precision (None without one).
    `engines` maps a target's name to its engine report, `engine_failures` to why TensorRT refused
    to build it; `accuracy` is the table of `evaluate.compare` (None until it is measured) and
    `speed` its paired timing; `timings` are seconds per step; `peak_rss_bytes` is the high-water
    mark of the compile.
    """

    name: str
    recipe: str
    dtype: str
    opset: int
    format_version: int = FORMAT_VERSION
    source: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    inputs: list[TensorInfo] = field(default_factory=list)
    outputs: list[TensorInfo] = field(default_factory=list)
    profile: dict[str, Any] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    engine_failures: dict[str, str] = field(default_factory=dict)
    lifecycles: list[dict[str, Any]] = field(default_factory=list)
    check: dict[str, Any] | None = None
    mixed: dict[str, Any] | None = None
    accuracy: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None
    timings: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int | None = None
    notes: list[str] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of `manifest.json`; numbers that JSON cannot hold (inf, nan) become null."""
        text = json.dumps(json_safe(asdict(self)), indent=2, ensure_ascii=False) + "\n"
        # A name that is not UTF-8 becomes JSON's own escape and is read back as it was.
        return text.encode("utf-8", "backslashreplace").decode()

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST_NAME) -> Manifest:
        """Read `text`. Raises BundleError, naming `where`, if it is no manifest of this format."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{where} is not JSON ({error}): compile the bundle again") from error
        if not isinstance(raw, dict):
            raise BundleError(f"{where} is not a bundle manifest")
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{where} has format {version!r}, this iq-export reads format {FORMAT_VERSION}: "
                "compile the model again or use the version that wrote it"
            )
        try:
            return cls._from_dict(raw)
        except (TypeError, KeyError, AttributeError) as error:
            raise BundleError(f"{where} is damaged ({error}): compile the bundle again") from error

    @classmethod
    def _from_dict(cls, raw: dict[str, Any]) -> Manifest:
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(raw) - known)
        if unknown:
            raise TypeError(f"unknown fields {', '.join(map(repr, unknown))}")
        values = dict(raw)
        for key in ("inputs", "outputs"):
            tensors = raw.get(key, [])
            if not isinstance(tensors, list):
                raise TypeError(f"{key} is no list")
            values[key] = [_record(TensorInfo, tensor, key) for tensor in tensors]
        files = raw.get("files", {})
        if not isinstance(files, dict):
            raise TypeError("files is no dict")
        values["files"] = {name: _record(FileRecord, v, "files") for name, v in files.items()}
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise TypeError(f"files: {name!r} lies outside the bundle")
        read = cls(**values)
        _check_types(read, "")
        return read

    def write(self, folder: Path) -> Path:
        """Write `folder/manifest.json` and its checksum: readers see the old text or the new one.

        Both are on the disk before the first is put in place, and an interrupt between the two
        does not keep the second from its place.
        """
        path, text = folder / MANIFEST_NAME, self.to_json()
        with (
            _staged(path, text) as manifest,
            _staged(folder / CHECKSUM_NAME, checksum_line(text.encode())) as checksum,
        ):
            try:
                manifest.replace(path)
            finally:
                if not manifest.exists():
                    checksum.replace(folder / CHECKSUM_NAME)
        return path


def _record(kind: type[_Record], value: Any, place: str) -> _Record:
    """A dataclass from its JSON object. Raises TypeError if it is none or has other keys."""
    wanted = {f.name for f in fields(kind)}
    if not isinstance(value, dict) or value.keys() != wanted:
        raise TypeError(f"{place}: an entry has not the keys {', '.join(sorted(wanted))}")
    return kind(**value)


def _check_types(record: Any, place: str) -> None:
    """TypeError, naming the field, if a value of this dataclass is not what its field says."""
    for name, kind in get_type_hints(type(record)).items():
        value = getattr(record, name)
        if not _fits(value, kind):
            raise TypeError(f"{place}{name} is no {getattr(kind, '__name__', kind)}")
        values = value.values() if isinstance(value, dict) else value
        if isinstance(value, (dict, list)):
            for member in values:
                if is_dataclass(member):
                    _check_types(member, f"{name}: ")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is of a field's type."""
    members = get_args(kind)
    if kind is Any:
        return True
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, member) for member in members)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(v, members[0]) for v in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(v, members[1]) for v in value.values())
    if kind in (int, float):
        wanted = int if kind is int else (int, float)
        return isinstance(value, wanted) and not isinstance(value, bool)
    return isinstance(value, kind)


@contextmanager
def reading_records(where: Path) -> Iterator[None]:
    """Around code that trusts records of the manifest or the plan at `where`: what it raises if
    they are not as this version writes them becomes a BundleError."""
    try:
        yield
    except (
        ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError
    ) as error:  # fmt: skip
        raise BundleError(
            f"{where} has records that this version did not write "
            f"({type(error).__name__}: {error}): compile the bundle again"
        ) from error


def json_safe(value: Any) -> Any:
    """`value` in JSON types: inf and nan become None, paths strings, tuples lists."""
    if isinstance(value, dict):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value


def checksum_line(manifest: bytes) -> str:
    """What `manifest.json.sha256` holds for a manifest of these bytes."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST_NAME}\n"


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) through a temporary sibling and a rename."""
    with _staged(path, text) as temporary:
        temporary.replace(path)


@contextmanager
def _staged(path: Path, text: str) -> Iterator[Path]:
    """A sibling of `path` that holds `text`, on the disk; removed unless the block renames it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes the file private; a bundle is meant to be shared like any other output.
        temporary.chmod(0o644)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def record_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, FileRecord]:
    """Size and checksum of the files of `folder` by their `/`-separated relative name.

    `names` restricts it to those; default: every file below `folder` but the manifest and its
    checksum, sorted.
    """
    if names is None:
        found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        names = sorted(name for name in found if name not in (MANIFEST_NAME, CHECKSUM_NAME))
    return {
        name: FileRecord((folder / name).stat().st_size, sha256_file(folder / name))
        for name in names
    }
