"""The output folder: written whole or not at all, and checked before it is used."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from iq_export.bundle.lock import Say, claim, clear_dead, is_marked, quiet
from iq_export.bundle.manifest import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    UNLISTED,
    FileRecord,
    GraphInfo,
    Manifest,
    checksum_line,
    record_files,
)
from iq_export.bundle.schema import parse
from iq_export.bundle.signature import check_signature
from iq_export.bundle.update import (
    LARGEST_MANIFEST,
    STATE,
    UPDATED,
    bundle_lock,
    fill,
    is_empty,
    is_state,
    leftovers,
    pending,
    write_update,
)
from iq_export.checksum import sha256_file, sha256_stream
from iq_export.disk import FULL, trouble_is_bundle_error
from iq_export.errors import BundleError
from iq_export.files import flush, open_inside, read_inside, sync

MODEL_NAME = GraphInfo().file
PLAN_NAME = "plan.json"
PLUGIN_NAME = "plugins/libiq_plugins.so"
PLUGIN_VERSION = "1"  # of the plugin layers in a plan, as kPluginVersion of the C++ reader
# As in the C++ reader; what is written is far smaller.
_LARGEST_CHECKSUM = 4096
_LARGEST_PLAN = 64 << 20
_SHOWN_MISMATCHES = 8
# Openings of a bundle that is replaced all the time before it is given up.
_TRIES = 20
_PATIENCE_SECONDS = 5.0
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2
_HERE = -100  # AT_FDCWD
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Bundle:
    """A compiled model on disk: `folder` and its manifest.

    `ahead` is where files lie that an update could not move to their places yet, None nearly
    always.
    """

    folder: Path
    manifest: Manifest
    ahead: Path | None = field(default=None, compare=False)

    @classmethod
    def open(
        cls, folder: str | Path, *, verify: bool = True, key: str | Path | None = None
    ) -> Bundle:
        """Read a bundle, its manifest compared with its checksum, and with `verify` every file.

        With `key`, the file of a public key, the manifest is signed by that key, or nothing of it
        is read. An update that a killed process left is finished first. A bundle that is replaced
        while it is read is read again. Raises BundleError if it is no bundle, or with a table of
        what differs; with `key` also what `signature.check_signature` raises.
        """
        folder = Path(folder)
        for left in reversed(range(_TRIES)):
            before = _generation(folder)
            try:
                return cls._open(folder, verify, None if key is None else Path(key))
            except (BundleError, FileNotFoundError):
                if not left or _generation(folder) == before:
                    raise
        raise AssertionError

    @classmethod
    def _open(cls, folder: Path, verify: bool, key: Path | None) -> Bundle:
        if not folder.is_dir():
            _wait_for(folder)
        if not folder.is_dir():
            raise BundleError(f"{folder} is not a folder: give the output folder of a compile")
        ahead = pending(folder)
        path = folder / MANIFEST_NAME
        content = read_manifest(folder, ahead)
        if key is not None:
            check_signature(folder, content, key)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise BundleError(f"{path} is not UTF-8 text: compile the bundle again") from error
        bundle = cls(folder, Manifest.from_json(text, str(path)), ahead)
        if verify:
            mismatches = bundle.mismatches()
            if mismatches:
                raise BundleError(_mismatch_text(folder, mismatches))
        return bundle

    def root(self, name: str) -> Path:
        """The folder below which the file `name` of the manifest lies."""
        return _root(self.folder, self.ahead, name)

    def path(self, name: str) -> Path:
        """Where the file `name` of the manifest lies."""
        return self.root(name) / name

    def is_current(self) -> bool:
        """Whether the bundle at `folder` still has the files that this one had when opened."""
        try:
            return Bundle.open(self.folder, verify=False).manifest.files == self.manifest.files
        except (BundleError, OSError):
            return False

    def same_model(self, other: Bundle) -> bool:
        """Whether both are of one compile: all files are the same but those that updates write."""
        ours, theirs = (
            {n: r for n, r in bundle.manifest.files.items() if not n.startswith(UPDATED)}
            for bundle in (self, other)
        )
        return ours == theirs

    @property
    def model(self) -> Path:
        """The one ONNX file that ships. Raises GraphError if there are several."""
        return self.folder / self.manifest.graph.file

    def plan(self) -> dict[str, Any]:
        """The content of `plan.json`. Raises BundleError if it is missing or no JSON object."""
        path = self.path(PLAN_NAME)
        try:
            content = parse(_read(self.root(PLAN_NAME), PLAN_NAME, _LARGEST_PLAN).decode())
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
        return [*_gaps(self.manifest), *self._differing_files()]

    def _differing_files(self) -> Iterator[tuple[str, str, str]]:
        for name, expected in sorted(self.manifest.files.items()):
            try:
                with open_inside(self.root(name), name) as stream:
                    size = os.fstat(stream.fileno()).st_size
                    if size != expected.bytes:
                        yield name, f"{expected.bytes} bytes", f"{size} bytes"
                    elif (found := sha256_stream(stream)) != expected.sha256:
                        yield name, f"sha256 {expected.sha256[:16]}", f"sha256 {found[:16]}"
            except FileNotFoundError:
                yield name, f"{expected.bytes} bytes", "missing"
            except BundleError as error:
                yield name, f"{expected.bytes} bytes", str(error)


def read_whole(
    folder: str | Path,
    read: Callable[[Bundle], _Result],
    *,
    verify: bool = True,
    key: Path | None = None,
) -> _Result:
    """What `read` makes of the bundle at `folder`, all of whose files were of one generation.

    A bundle that is replaced meanwhile is read again. Raises as `read` does, and BundleError.
    """
    for left in reversed(range(_TRIES)):
        bundle = Bundle.open(folder, verify=verify, key=key)
        try:
            result = read(bundle)
        except Exception:
            if not left or bundle.is_current():
                raise
        else:
            if bundle.is_current():
                return result
    raise BundleError(f"{folder} was replaced again and again while it was read: try again later")


def _generation(folder: Path) -> tuple[Any, ...]:
    """What changes whenever the bundle at `folder` is replaced or updated.

    The switch is looked for first: an update that ends between two looks shows in the second, the
    manifest that it moved last.
    """
    found: list[Any] = [(folder / STATE / "update").exists()]
    for path in (folder, folder / MANIFEST_NAME, folder / CHECKSUM_NAME):
        try:
            there = path.stat()
            found += [there.st_dev, there.st_ino]
            if path != folder:  # a file that is replaced twice may get its first number again
                found.append(there.st_ctime_ns)
        except OSError:
            found.append(None)
    return tuple(found)


def _root(folder: Path, ahead: Path | None, name: str) -> Path:
    """The folder below which the file `name` of the bundle lies."""
    if ahead is not None:
        with suppress(OSError, BundleError), open_inside(ahead, name):
            return ahead
    return folder


def _gaps(manifest: Manifest) -> Iterator[tuple[str, str, str]]:
    """What the engines need and `manifest` does not have (manifestGaps of the C++ reader)."""
    engines = [entry for graph in manifest.graphs for entry in graph.engines.items()]
    for name, engine in engines:
        needed = [f"engines/{engine['plan']}"]
        if engine["form"] == "plugin":
            version = engine.get("plugin_version") or "none"
            if version != PLUGIN_VERSION:
                yield f"engine {name}: plugin version", PLUGIN_VERSION, version
            needed += [] if engine["plugin_embedded"] else [PLUGIN_NAME]
        for file in needed:
            if file not in manifest.files:
                yield file, f"in the manifest's files, for engine {name}", "not there"


def read_manifest(folder: Path, ahead: Path | None = None) -> bytes:
    """The manifest's bytes, compared with its checksum, of an update that is `ahead` if there is
    one. Raises BundleError."""
    try:
        content = _read(_root(folder, ahead, MANIFEST_NAME), MANIFEST_NAME, LARGEST_MANIFEST)
    except FileNotFoundError as error:
        raise BundleError(f"{folder} has no {MANIFEST_NAME}: it is not a bundle") from error
    _check_manifest(folder, ahead, content)
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


def _check_manifest(folder: Path, ahead: Path | None, content: bytes) -> None:
    """BundleError if the manifest is not the one that its checksum was written for."""
    line = checksum_line(content).encode()
    try:
        recorded = _read(_root(folder, ahead, CHECKSUM_NAME), CHECKSUM_NAME, _LARGEST_CHECKSUM)
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


def update_manifest(
    bundle: Bundle,
    *,
    new: Mapping[str, Path | str] | None = None,
    drop: Sequence[str] = (),
    rehash: Sequence[str] = (),
    say: Say = quiet,
    **changes: Any,
) -> Bundle:
    """The bundle as it is now on the disk with `changes` of its manifest and `new` files, all or
    nothing of it: texts, or files made in the folder of `bundle_lock`.

    `drop` names files that go, and `rehash` files that were added or rewritten in place; one that
    no longer exists is dropped from the manifest. Waits for another update. Raises BundleError if
    the bundle was replaced since it was opened, or cannot be written.
    """
    new = new or {}
    with bundle_lock(bundle.folder, say), trouble_is_bundle_error(bundle.folder):
        now = Bundle.open(bundle.folder, verify=False)
        if not now.same_model(bundle):
            raise BundleError(
                f"{bundle.folder} was replaced by another compile in the meantime: what was made "
                "for the older one is not kept, run the command again"
            )
        gone = {*drop, *rehash}
        files = {name: record for name, record in now.manifest.files.items() if name not in gone}
        there = [name for name in rehash if (bundle.folder / name).is_file()]
        files.update(record_files(bundle.folder, there))
        files.update({name: _record(content) for name, content in new.items()})
        manifest = replace(now.manifest, files=dict(sorted(files.items())), **changes)
        write_update(bundle.folder, manifest, new)
    return Bundle(bundle.folder, manifest)


def _record(content: Path | str) -> FileRecord:
    if isinstance(content, str):
        return FileRecord.of(content.encode("utf-8", "backslashreplace"))
    return FileRecord(content.stat().st_size, sha256_file(content))


def check_output(out: str | Path, force: bool) -> Path:
    """`out` as an absolute path, if a bundle may be put there.

    Raises BundleError if `out` exists and is not an empty folder, unless `force` is set and it is
    a bundle with nothing in it but what its manifest lists: nothing else is ever deleted.
    """
    out = Path(os.path.abspath(out))
    if not out.exists() and not out.is_symlink():
        return out
    if not out.is_dir() or out.is_symlink():
        raise BundleError(f"{out} exists and is not a folder: choose another output")
    pending(out)
    if is_empty(out):
        return out
    listed = _listed(out)
    if listed is None:
        raise BundleError(
            f"{out} exists and is not a bundle (it has no {MANIFEST_NAME} of iq-export): choose "
            "another output folder"
        )
    if not force:
        raise BundleError(f"{out} exists: choose another output folder or give --force")
    foreign = _foreign(out, listed)
    if foreign is not None:
        raise BundleError(
            f"{out} holds {foreign!r}, which is not of the bundle: --force would delete it; move "
            "it away or choose another output folder"
        )
    return out


def _listed(out: Path) -> set[str] | None:
    """The files that the manifest of any version, damaged or not, lists; None if it is not ours."""
    try:
        record = parse(read_inside(out, MANIFEST_NAME, LARGEST_MANIFEST).decode())
    except (OSError, ValueError, RecursionError, BundleError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        return None
    texts = all(isinstance(record.get(key), str) for key in ("name", "recipe", "dtype"))
    if not texts or not isinstance(record.get("format_version"), int):
        return None
    return {*record["files"], *UNLISTED}


def _foreign(out: Path, listed: set[str]) -> str | None:
    """The first file or folder below `out` that is neither listed nor what a build left there."""
    folders = {"engines", "plugins"}
    folders.update(str(parent) for name in listed for parent in PurePosixPath(name).parents)
    left = {path.name for path in leftovers(out)}
    if is_state(out):
        left.add(STATE)
    for here, inner, names in os.walk(out):
        place = Path(here).relative_to(out)
        if place == Path("."):
            inner[:] = [name for name in inner if name not in left]
        for name in sorted(inner):
            path = place / name
            if path.as_posix() not in folders or (out / path).is_symlink():
                return path.as_posix()
        for name in sorted(names):
            beside = place == Path(".") and name in left
            if not beside and (place / name).as_posix() not in listed:
                return (place / name).as_posix()
    return None


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
def atomic_folder(
    out: str | Path,
    force: bool = False,
    check: Callable[[Path, bool], Path] = check_output,
    say: Say = quiet,
) -> Iterator[Path]:
    """A new folder beside `out` to write into; it becomes `out` when the block succeeds.

    One process at a time writes for `out`; another waits, and `say` tells for whom. On any failure,
    Ctrl-C included, the new folder is removed and what stood at `out` stays as it was. Raises
    BundleError as `check` does, which says what may be replaced, or if the folder cannot be written
    or the disk fills.
    """
    out = check(Path(out), force)
    with parents_of(out), trouble_is_bundle_error(out):
        with _own(out, say) as holder:
            check(out, force)  # the one that was waited for may have put something there
            folder = holder / "new"
            folder.mkdir()
            yield folder
            flush(folder)
            _switch(folder, check(out, force), force, check, say)
        sync(out.parent)


def clear_partial(out: Path) -> None:
    """Remove what a killed run left beside `out` that was to become it."""
    out = Path(os.path.abspath(out))
    clear_dead(_holder(out), lambda: _restore(out))


def unmarked_partials(out: Path) -> list[Path]:
    """What versions without a mark left beside `out` when they were killed, or one may be writing:
    nobody can tell, so it is named and stays."""
    out = Path(os.path.abspath(out))
    pattern = re.compile(rf"\.{re.escape(out.name)}\.\d+\.partial")
    try:
        return sorted(
            Path(entry.path)
            for entry in os.scandir(out.parent)
            if pattern.fullmatch(entry.name) and entry.is_dir()
        )
    except OSError:  # what is wrong with the folder shows when something is written there
        return []


@contextmanager
def _own(out: Path, say: Say) -> Iterator[Path]:
    """Claim the folder in which what becomes `out` grows."""
    holder = _holder(out)
    with ExitStack() as stack:
        try:
            stack.enter_context(claim(holder, say=say, before_clear=lambda: _restore(out)))
        except OSError as error:
            if error.errno in FULL:
                raise
            raise BundleError(f"cannot write in {holder.parent}: {error.strerror}") from error
        yield holder


def _restore(out: Path) -> None:
    """Put the older `out` back where a replacement was killed between its two renames."""
    old = _holder(out) / "old"
    if not os.path.lexists(out) and old.is_dir():
        os.rename(old, out)


def _holder(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def _wait_for(out: Path) -> None:
    """Where folders cannot be exchanged, a replacement passes through a moment without `out`: wait
    for its end or, if its process died, undo it."""
    out = Path(os.path.abspath(out))
    holder = _holder(out)
    end = time.monotonic() + _PATIENCE_SECONDS
    while is_marked(holder) and (holder / "old").is_dir() and time.monotonic() < end:
        clear_partial(out)
        time.sleep(0.01)


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


def _switch(
    new: Path, out: Path, force: bool, check: Callable[[Path, bool], Path], say: Say
) -> None:
    """Put `new` in the place of `out`. What stood there lies beside `new`'s old place then."""
    if not out.exists():
        os.rename(new, out)
    elif is_empty(out):  # it stays the folder that it is: somebody may be in it
        with bundle_lock(out, say):
            fill(out, new)
    elif (out / MANIFEST_NAME).exists():
        with bundle_lock(out, say):  # an update ends first
            _replace(new, out, force, check)
    else:
        _replace(new, out, force, check)


def _replace(new: Path, out: Path, force: bool, check: Callable[[Path, bool], Path]) -> None:
    if not _exchange(new, out):
        old = new.with_name("old")
        try:
            os.rename(out, old)
            os.rename(new, out)
        finally:
            if not os.path.lexists(out):  # Ctrl-C may land between the two
                os.rename(old, out)
        return
    try:
        check(new, force)  # the older one: what came into it at the last moment is not lost
    except BundleError:
        _exchange(new, out)
        check(out, force)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step. False where the system or the file system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))
