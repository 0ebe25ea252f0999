"""A bundle's update, as a database does it: staged aside, flushed, switched once, recovered.

    OUT/.iq-export/          there while a process updates it; its mark is the lock (lock.py)
    OUT/.iq-export/staged/   new files under their names in the bundle: nothing counts yet
    OUT/.iq-export/update/   `staged`, flushed and renamed, which is the switch: all of it counts

The files of `update` are then moved to their places, the manifest last. Who opens a bundle that has
an `update` moves the rest first or, where nothing can be written, reads those files there.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from iq_export.bundle.lock import Busy, Say, claim, is_marked, quiet
from iq_export.bundle.manifest import CHECKSUM_NAME, MANIFEST_NAME, Manifest, checksum_line
from iq_export.checksum import sha256_stream
from iq_export.errors import BundleError
from iq_export.files import (
    create_inside,
    flush,
    make_place,
    move_inside,
    open_inside,
    read_inside,
    remove_inside,
    sync,
)

STATE = ".iq-export"
_STAGED, _UPDATE = "staged", "update"
# The parts of a bundle that an update may replace; all else is the compile's.
UPDATED = ("engines/", "plugins/", "report.html", MANIFEST_NAME, CHECKSUM_NAME)
LARGEST_MANIFEST = 16 << 20  # as in the C++ reader; what is written is far smaller
# What killed builds left, of this version and of earlier ones, which worked in the bundle itself.
_LEFTOVER = re.compile(
    r"\.build-[a-z0-9_]{8}|\.model\.\d+\.fused\.onnx"
    r"|\.(manifest\.json|manifest\.json\.sha256|manifest\.json\.sig|report\.html)\.[a-z0-9_]{8}"
)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)
_PATIENCE_SECONDS = 30.0


@contextmanager
def bundle_lock(folder: Path, say: Say = quiet, *, wait: bool = True) -> Iterator[Path]:
    """Hold the bundle at `folder` alone: the block gets a folder for what it makes, soon removed.

    An update that another process could not finish is finished first. Raises BundleError if the
    bundle cannot be written, Busy as `claim` does.
    """
    state = folder / STATE
    with ExitStack() as stack:
        try:
            stack.enter_context(
                claim(
                    state, say=say, wait=wait, before_clear=lambda: _recover(folder), spare=_UPDATE
                )
            )
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
            raise BundleError(f"cannot write in {folder}: {error.strerror}") from error
        yield state


def pending(folder: Path) -> Path | None:
    """Finish a switched update of the bundle; where it cannot be finished, the folder to read
    first. None if there is none, as nearly always."""
    update = folder / STATE / _UPDATE
    end = time.monotonic() + _PATIENCE_SECONDS
    while not (folder / STATE).is_symlink() and update.is_dir() and not update.is_symlink():
        try:
            with bundle_lock(folder, wait=False):
                pass
        except Busy:  # its writer is about to finish it
            if time.monotonic() > end:
                return update
            time.sleep(0.01)
        except (OSError, BundleError):  # read only, or the disk is full
            return update
        else:
            return None
    return None


def write_update(
    folder: Path, manifest: Manifest, files: Mapping[str, Path | str] | None = None
) -> None:
    """Switch the bundle to `manifest` and the new `files`, by name: texts, or files made in the
    folder that `bundle_lock` gave. The lock is held.

    Nothing counts before the switch; if what follows it fails, the next to open the bundle does it.
    """
    state = folder / STATE
    staged = state / _STAGED
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    text = manifest.to_json()
    texts = {MANIFEST_NAME: text, CHECKSUM_NAME: checksum_line(text.encode())}
    for name, content in {**(files or {}), **texts}.items():
        if isinstance(content, str):
            with create_inside(staged, name) as stream:
                stream.write(content.encode("utf-8", "backslashreplace"))
        else:
            inside = content.relative_to(state).as_posix()
            move_inside(state, inside, f"{_STAGED}/{name}")
        make_place(folder, name)  # what follows the switch must not fail, nor take space
    flush(staged)
    fill(folder, staged)


def fill(folder: Path, whole: Path) -> None:
    """Switch the bundle, or the empty folder, to the files of `whole`, which are on the disk. The
    lock is held."""
    os.rename(whole, folder / STATE / _UPDATE)
    sync(folder / STATE)
    _finish(folder)


def is_empty(folder: Path) -> bool:
    """Whether there is nothing in the folder but what an update that never counted left."""
    return all(entry.name == STATE and is_state(folder) for entry in os.scandir(folder))


def is_state(folder: Path) -> bool:
    """Whether what is called STATE in the folder is ours."""
    state = folder / STATE
    if state.is_symlink() or not state.is_dir():
        return False
    return is_marked(state) or not any(os.scandir(state))


def leftovers(folder: Path) -> list[Path]:
    """What builds that were killed left in the bundle; all dead while its lock is held."""
    return [Path(e.path) for e in os.scandir(folder) if _LEFTOVER.fullmatch(e.name)]


def remove_leftovers(folder: Path) -> None:
    """Remove what killed builds left. The lock is held."""
    for path in leftovers(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _recover(folder: Path) -> None:
    update = folder / STATE / _UPDATE
    if update.is_dir() and not update.is_symlink():
        _check(folder)
        _finish(folder)


def _check(folder: Path) -> None:
    """BundleError unless what is left to move is what its manifest says: it may be a stranger's."""
    names, manifest = _names(folder), _read_manifest(folder / STATE / _UPDATE)
    if manifest is None:  # it was moved last
        return
    for name in names:
        if name in (MANIFEST_NAME, CHECKSUM_NAME):
            continue
        with open_inside(folder / STATE / _UPDATE, name) as stream:
            record = manifest.files.get(name)
            if record is None or sha256_stream(stream) != record.sha256:
                raise BundleError(
                    f"{folder} has an unfinished update that is damaged ({name}): copy it again "
                    "or compile it again"
                )


def _finish(folder: Path) -> None:
    """Move what `update` holds to its places, the manifest last, and drop what it replaced."""
    update = folder / STATE / _UPDATE
    last = (CHECKSUM_NAME, MANIFEST_NAME)
    names = sorted(_names(folder), key=lambda name: (name in last, name == MANIFEST_NAME, name))
    new = _read_manifest(update)
    old = _read_manifest(folder) if new is not None else None
    for name in names:
        if name == MANIFEST_NAME and new is not None and old is not None:
            gone = [n for n in old.files if n not in new.files and n.startswith(UPDATED)]
            for each in gone:
                remove_inside(folder, each)
        if name in last:
            _sync_folders(folder, names)
        move_inside(folder, f"{STATE}/{_UPDATE}/{name}", name)
    sync(folder)
    shutil.rmtree(update, ignore_errors=True)


def _sync_folders(folder: Path, names: list[str]) -> None:
    for part in sorted({name.rpartition("/")[0] for name in names}):
        sync(folder / part)


def _names(folder: Path) -> list[str]:
    update = folder / STATE / _UPDATE
    found = []
    for here, _, files in os.walk(update):
        found += [(Path(here) / name).relative_to(update).as_posix() for name in files]
    return found


def _read_manifest(folder: Path) -> Manifest | None:
    """The manifest there, None if it is missing or none."""
    try:
        content = read_inside(folder, MANIFEST_NAME, LARGEST_MANIFEST)
        return Manifest.from_json(content.decode(), str(folder / MANIFEST_NAME))
    except (FileNotFoundError, UnicodeDecodeError, BundleError):
        return None
