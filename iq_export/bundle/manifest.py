"""`manifest.json`: what a bundle is, what it was made from, the checksum of every file in it."""

from __future__ import annotations

import builtins
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from iq_export.bundle import schema
from iq_export.checksum import sha256_file
from iq_export.errors import BundleError, GraphError
from iq_export.graph.interface import BATCH, PAST, SEQ

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
# Beside it, as `sha256sum` writes and checks it: a manifest cannot hold its own checksum.
CHECKSUM_NAME = "manifest.json.sha256"
# Beside it too, if `iq-export sign` was run.
SIGNATURE_NAME = "manifest.json.sig"
# The files of a bundle that a manifest does not list.
UNLISTED = (MANIFEST_NAME, CHECKSUM_NAME, SIGNATURE_NAME)


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
class GraphInfo:
    """One graph of a bundle, with what is known of it alone: `file` and `weights` are named after
    it, so that no two can share one.

    `profile` holds the shapes that engines are built for, `engines` maps a target's name to its
    engine report, `engine_failures` to why TensorRT refused to build it; `lifecycles` are its
    sinks'.
    """

    name: str = "model"
    inputs: list[TensorInfo] = field(default_factory=list)
    outputs: list[TensorInfo] = field(default_factory=list)
    profile: dict[str, Any] = field(default_factory=dict)
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    engine_failures: dict[str, str] = field(default_factory=dict)
    lifecycles: list[dict[str, Any]] = field(default_factory=list)

    @property
    def file(self) -> str:
        """The name of its ONNX file in the bundle."""
        return f"{self.name}.onnx"

    @property
    def weights(self) -> str:
        """The name of that file's external data."""
        return f"{self.file}.data"


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`. Plain JSON values only, so that every field can be diffed.
    `manifest.schema.json` beside this module says what each may be.

    `recipe_settings` is all that the recipe asked for (None in a bundle of an older version).
    `check` compares the finished file with fp32 (`evaluate.final_check`; None in a bundle of an
    older version). `mixed` says what a `--budget` left in half precision (None without one).
    `accuracy` is the table of `evaluate.compare` (None until it is measured) and `speed` its paired
    timing; `timings` are seconds per step; `peak_rss_bytes` is the high-water mark of the compile.
    What belongs to one graph is in `graphs`.
    """

    name: str
    recipe: str
    dtype: str
    opset: int
    format_version: int = FORMAT_VERSION
    recipe_settings: dict[str, Any] | None = None
    source: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    graphs: list[GraphInfo] = field(default_factory=lambda: [GraphInfo()])
    targets: list[str] = field(default_factory=list)
    check: dict[str, Any] | None = None
    mixed: dict[str, Any] | None = None
    accuracy: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None
    timings: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int | None = None
    notes: list[str] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def graph(self) -> GraphInfo:
        """The only graph. Raises GraphError, with their names, if there are several."""
        if len(self.graphs) > 1:
            names = ", ".join(graph.name for graph in self.graphs)
            raise GraphError(
                f"{self.name} has several graphs ({names}), and this command is for bundles of "
                "one: iq-export inspect shows them, and libiq_runtime opens one by its name"
            )
        return self.graphs[0]

    def to_json(self) -> str:
        """The text of `manifest.json`; numbers that JSON cannot hold (inf, nan) become null."""
        return json.dumps(json_safe(asdict(self)), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST_NAME) -> Manifest:
        """Read `text`. Raises BundleError, naming `where`, if it is no manifest of this format."""
        try:
            raw = schema.parse(text)
        except ValueError as error:
            raise BundleError(f"{where} is not JSON ({error}): compile the bundle again") from error
        if not isinstance(raw, dict):
            raise BundleError(f"{where} is not a bundle manifest")
        version = raw.get("format_version")
        if type(version) is not int or version not in (1, FORMAT_VERSION):
            raise BundleError(
                f"{where} has format {version!a:.60}, this iq-export reads format "
                f"{FORMAT_VERSION}: compile the model again or use the version that wrote it"
            )
        if version == 1:
            raw = _of_format_1(raw)
        try:
            schema.check(raw, schema.manifest_schema())
            read = cls._from_dict(raw)
            _check_graphs(read)
        except ValueError as error:
            raise BundleError(f"{where} is damaged ({error}): compile the bundle again") from error
        return read

    @classmethod
    def _from_dict(cls, raw: dict[str, Any]) -> Manifest:
        """Of what fits the schema. Members that this version does not know are left out."""
        values = _known(cls, raw)
        values["graphs"] = [_known(GraphInfo, graph) for graph in raw["graphs"]]
        for graph in values["graphs"]:
            for key in ("inputs", "outputs"):
                graph[key] = [TensorInfo(**tensor) for tensor in graph[key]]
        values["graphs"] = [GraphInfo(**graph) for graph in values["graphs"]]
        values["files"] = {name: FileRecord(**record) for name, record in raw["files"].items()}
        return cls(**values)

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


def _of_format_1(raw: dict[str, Any]) -> dict[str, Any]:
    """A manifest of format 1 as one of format 2: what the one graph had at the top is moved, and no
    value is changed, so that the one schema says what each may be."""
    graph = {key: raw[key] for key in _GRAPH_OF_FORMAT_1 if key in raw}
    rest = {key: value for key, value in raw.items() if key not in graph}
    return {**rest, "format_version": 2, "graphs": [{"name": "model", **graph}]}


_GRAPH_OF_FORMAT_1 = (
    "inputs", "outputs", "profile", "engines", "engine_failures", "lifecycles",
)  # fmt: skip


def _known(record: type, raw: dict[str, Any]) -> dict[str, Any]:
    """The members of `raw` that the dataclass has."""
    return {f.name: raw[f.name] for f in fields(record) if f.name in raw}


def _check_graphs(manifest: Manifest) -> None:
    """ValueError for what a schema cannot say of graphs."""
    names = set()
    for number, graph in enumerate(manifest.graphs):
        if graph.name in names:
            raise ValueError(f"graphs has the name '{graph.name}' twice")
        names.add(graph.name)
        for file in (graph.file, graph.weights):
            if file not in manifest.files:
                raise ValueError(f"files has no '{file}'")
        _check_engines(manifest, graph, f"graphs[{number}]")


def _check_engines(manifest: Manifest, graph: GraphInfo, where: str) -> None:
    for name, engine in graph.engines.items():
        place = f"{where}.engines.{name:.60}"
        for axis in (BATCH, SEQ, PAST):
            sizes = engine["profile"][axis]
            if not sizes["min"] <= sizes["opt"] <= sizes["max"]:
                raise ValueError(f"{place}.profile.{axis} is not min <= opt <= max")
        listed = manifest.files.get(f"engines/{engine['plan']}")
        if listed not in (None, FileRecord(engine["bytes"], engine["sha256"])):
            raise ValueError(
                f"{place} and files do not tell the same size and checksum of its plan"
            )


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
    """`value` in JSON types: inf and nan become None, paths strings, tuples lists, texts UTF-8."""
    if isinstance(value, dict):
        return {_utf8(str(k)): json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, Path)):
        return _utf8(str(value))
    return value


def _utf8(text: str) -> str:
    """`text`; bytes of a name that are not UTF-8, which JSON cannot hold, are written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def checksum_line(manifest: bytes) -> str:
    """What `manifest.json.sha256` holds for a manifest of these bytes."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST_NAME}\n"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (a text as UTF-8) through a temporary sibling and a rename."""
    with _staged(path, content) as temporary:
        temporary.replace(path)


@contextmanager
def _staged(path: Path, content: str | bytes) -> Iterator[Path]:
    """A sibling of `path` that holds `content`, on the disk; removed unless the block moves it."""
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes the file private; a bundle is meant to be shared like any other output.
        temporary.chmod(0o644)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def listable(name: str) -> str:
    """The name under which a file goes into a bundle: its own, what a manifest may not list
    written out (`caf_xe9` for `café`)."""
    ascii_ = name.encode("ascii", "backslashreplace").decode()
    return re.sub(r"[^ -~]|[\\/]", "_", ascii_)[:255]


def record_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, FileRecord]:
    """Size and checksum of the files of `folder` by their `/`-separated relative name.

    `names` restricts it to those; default: every file below `folder` but the manifest, its
    checksum and its signature, sorted.
    """
    if names is None:
        found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        names = sorted(name for name in found if name not in UNLISTED)
    return {
        name: FileRecord((folder / name).stat().st_size, sha256_file(folder / name))
        for name in names
    }
