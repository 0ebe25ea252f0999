"""The output folder: written whole or not at all, and checked before it is used."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iq_export.bundle.manifest import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    Manifest,
    checksum_line,
    record_files,
)
from iq_export.bundle.schema import parse
from iq_export.bundle.signature import check_signature
from iq_export.checksum import sha256_stream
from iq_export.errors import BundleError
from iq_export.files import open_inside, read_inside

MODEL_NAME = "model.onnx"
PLAN_NAME = "plan.json"
PLUGIN_NAME = "plugins/libiq_plugins.so"
PLUGIN_VERSION = "1"  # of the plugin layers in a plan, as kPluginVersion of the C++ reader
# As in the C++ reader; what is written is far smaller.
_LARGEST_MANIFEST = 16 << 20
_LARGEST_CHECKSUM = 4096
_LARGEST_PLAN = 64 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_SHOWN_MISMATCHES = 8


@dataclass(frozen=True)
class Bundle:
    """A compiled model on disk: `folder` and its manifest."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(
        cls, folder: str | Path, *, verify: bool = True, key: str | Path | None = None
    ) -> Bundle:
        """Read a bundle, its manifest compared with its checksum, and with `verify` every file.

        With `key`, the file of a public key, the manifest is signed by that key, or nothing of it
        is read. Raises BundleError if it is no bundle, or with a table of what differs; with `key`
        also what `signature.check_signature` raises.
        """
        folder = Path(folder)
        path = folder / MANIFEST_NAME
        if not folder.is_dir():
            raise BundleError(f"{folder} is not a folder: give the output folder of a compile")
        content = read_manifest(folder)
        if key is not None:
            check_signature(folder, content, Path(key))
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise BundleError(f"{path} is not UTF-8 text: compile the bundle again") from error
        bundle = cls(folder, Manifest.from_json(text, str(path)))
        if verify:
            mismatches = bundle.mismatches()
            if mismatches:
                raise BundleError(_mismatch_text(folder, mismatches))
        return bundle

    @property
    def model(self) -> Path:
        """The one ONNX file that ships."""
        return self.folder / MODEL_NAME

    def plan(self) -> dict[str, Any]:
        """The content of `plan.json`. Raises BundleError if it is missing or no JSON object."""
        path = self.folder / PLAN_NAME
        try:
            content = parse(_read(self.folder, PLAN_NAME, _LARGEST_PLAN).decode())
        except FileNotFoundError as error:
            raise BundleError(f"{self.folder} has no {PLAN_NAME}: compile it again") from error
        except ValueError as error:
            raise BundleError(f"{path} is not JSON ({error}): compile it again") from error
        if not isinstance(content, dict):
            raise BundleError(f"{path} is no JSON object: compile the bundle again")
        return content

    def mismatches(self) -> list[tuple[str, str, str]]:
        """What is not as recorded: `(name, expected, found)`; empty if all is well.

        That are files which are not there with their size and checksum, or only through a link,
        and what an engine needs and the manifest does not list.
        """
        return [*_gaps(self.manifest), *_differing_files(self.folder, self.manifest)]


def _gaps(manifest: Manifest) -> Iterator[tuple[str, str, str]]:
    """What the engines need and `manifest` does not have (manifestGaps of the C++ reader)."""
    for name, engine in manifest.engines.items():
        needed = [f"engines/{engine['plan']}"]
        if engine["form"] == "plugin":
            version = engine.get("plugin_version") or "none"
            if version != PLUGIN_VERSION:
                yield f"engine {name}: plugin version", PLUGIN_VERSION, version
            needed += [] if engine["plugin_embedded"] else [PLUGIN_NAME]
        for file in needed:
            if file not in manifest.files:
                yield file, f"in the manifest's files, for engine {name}", "not there"


def _differing_files(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str, str]]:
    for name, expected in sorted(manifest.files.items()):
        try:
            with open_inside(folder, name) as stream:
                size = os.fstat(stream.fileno()).st_size
                if size != expected.bytes:
                    yield name, f"{expected.bytes} bytes", f"{size} bytes"
                elif (found := sha256_stream(stream)) != expected.sha256:
                    yield name, f"sha256 {expected.sha256[:16]}", f"sha256 {found[:16]}"
        except FileNotFoundError:
            yield name, f"{expected.bytes} bytes", "missing"
        except BundleError as error:
            yield name, f"{expected.bytes} bytes", str(error)


def read_manifest(folder: Path) -> bytes:
    """The manifest's bytes, compared with its checksum. Raises BundleError."""
    try:
        content = _read(folder, MANIFEST_NAME, _LARGEST_MANIFEST)
    except FileNotFoundError as error:
        raise BundleError(f"{folder} has no {MANIFEST_NAME}: it is not a bundle") from error
    _check_manifest(folder, content)
    return content


def _read(folder: Path, name: str, most: int) -> bytes:
    """A file's bytes. FileNotFoundError if it is missing, BundleError if it is none of the
    folder's own or has more than `most` bytes."""
    path = folder / name
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise BundleError(f"cannot read {path}, which is not a file: copy the bundle again")
        return read_inside(folder, name, most)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error


def _check_manifest(folder: Path, content: bytes) -> None:
    """BundleError if the manifest is not the one that its checksum was written for."""
    line = checksum_line(content).encode()
    try:
        recorded = _read(folder, CHECKSUM_NAME, _LARGEST_CHECKSUM)
    except FileNotFoundError as error:
        raise BundleError(
            f"{folder} has no {CHECKSUM_NAME}, as bundles of earlier versions: compile it again, "
            f"or if you trust it run there: sha256sum {MANIFEST_NAME} > {CHECKSUM_NAME}"
        ) from error
    if recorded != line:
        raise BundleError(
            f"{folder / MANIFEST_NAME} is not the one that {CHECKSUM_NAME} was written for: "
            "copy the bundle again or compile it again"
        )


def _mismatch_text(folder: Path, rows: Sequence[tuple[str, str, str]]) -> str:
    table = [("file", "manifest says", "found"), *rows[:_SHOWN_MISMATCHES]]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in table]
    head = f"{folder} does not match its {MANIFEST_NAME}: copy it again or compile it again"
    more = len(rows) - _SHOWN_MISMATCHES
    return "\n  ".join([head, *lines, *([f"and {more} more"] if more > 0 else [])])


def update_manifest(bundle: Bundle, *, rehash: Sequence[str] = (), **changes: Any) -> Bundle:
    """A bundle whose manifest has `changes` applied and is written atomically.

    `rehash` names files (relative, `/`-separated) that were added or rewritten; one that no longer
    exists is dropped from the manifest.
    """
    files = dict(changes.pop("files", bundle.manifest.files))
    for name in rehash:
        files.pop(name, None)
    there = [name for name in rehash if (bundle.folder / name).is_file()]
    with disk_full_is_bundle_error(bundle.folder):
        files.update(record_files(bundle.folder, there))
        manifest = replace(bundle.manifest, files=dict(sorted(files.items())), **changes)
        manifest.write(bundle.folder)
    return Bundle(bundle.folder, manifest)


def check_output(out: str | Path, force: bool) -> Path:
    """The absolute output path, refused early: call this before the long work.

    Raises BundleError if `out` exists and is not an empty folder, unless `force` is set and it is
    a bundle. `--force` never deletes a folder that this program did not write.
    """
    out = Path(os.path.abspath(out))
    if not out.exists() and not out.is_symlink():
        return out
    if not out.is_dir() or out.is_symlink():
        raise BundleError(f"{out} exists and is not a folder: choose another output")
    if not any(out.iterdir()):
        return out
    if not (out / MANIFEST_NAME).is_file():
        raise BundleError(f"{out} exists and is not a bundle: choose another output folder")
    if not force:
        raise BundleError(f"{out} exists: choose another output folder or give --force")
    return out


def require_space(folder: str | Path, needed_bytes: int) -> None:
    """Raise BundleError if the file system that holds `folder` has less than `needed_bytes` free.

    `folder` need not exist yet.
    """
    place = Path(os.path.abspath(folder))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise BundleError(
            f"{place} has {free / 1e9:.1f} GB free and about {needed_bytes / 1e9:.1f} GB are "
            "needed: free some space or choose another folder"
        )


@contextmanager
def disk_full_is_bundle_error(where: str | Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into a BundleError that names `where`."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise BundleError(f"the disk is full: {where} was not written") from error
        raise


@contextmanager
def atomic_folder(
    out: str | Path,
    force: bool = False,
    check: Callable[[Path, bool], Path] = check_output,
) -> Iterator[Path]:
    """A temporary sibling of `out` to write into; it becomes `out` when the block succeeds.

    On any failure, Ctrl-C included, the sibling is removed and what stood at `out` stays as it was.
    Raises BundleError as `check` does, which says what may be replaced, or if the folder cannot be
    written or the disk fills.
    """
    out = check(Path(out), force)
    temporary = out.parent / f".{out.name}.{os.getpid()}.partial"
    with parents_of(temporary):
        try:
            _make_empty(temporary)
            with disk_full_is_bundle_error(out):
                yield temporary
                _swap(temporary, check(out, force))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """The folders above `path` are there; those made for it go again if they stay empty.

    Raises BundleError if one cannot be made.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BundleError(f"cannot write in {path.parent}: {error.strerror}") from error
        yield
    finally:
        with suppress(OSError):  # one that is not empty, and so are those above it
            for folder in missing:
                folder.rmdir()


def _make_empty(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    except OSError as error:
        raise BundleError(f"cannot write in {folder.parent}: {error.strerror}") from error


def _swap(temporary: Path, out: Path) -> None:
    """Rename `temporary` to `out`; an older folder is set aside first and removed afterwards."""
    old = out.parent / f".{out.name}.{os.getpid()}.old"
    try:
        if out.exists():
            out.rename(old)
        temporary.rename(out)
    finally:
        # Ctrl-C may land between the two renames: the older bundle comes back.
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)
