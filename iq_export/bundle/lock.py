"""Folders that one run owns: a mark in the folder says whose it is, and a lock on the mark that it
lives.

A run claims the folder beside OUT in which a bundle grows, its work folder, and the folder inside a
bundle in which an update is staged. What has no mark is never touched. The kernel releases the lock
of a process that died, however it died, and the next claim takes its folder over.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from iq_export.errors import BundleError

MARK = ".iq-export-owner"
Say = Callable[[str], None]

# A file system without locks (some network mounts) is used without: they are advisory anyway.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_LONGEST_MARK = 1 << 12
# Claims of this process, which may be nested: a lock of its own would stop it for ever.
_held: set[Path] = set()


class Busy(BundleError):
    """Another process holds the folder."""


def quiet(_: str) -> None:
    """Say nothing while waiting."""


def is_marked(folder: Path) -> bool:
    """Whether `folder` is one that a claim made or took over."""
    mark = folder / MARK
    return not mark.is_symlink() and mark.is_file()


@contextmanager
def claim(
    folder: Path,
    *,
    keep: bool = False,
    say: Say = quiet,
    wait: bool = True,
    before_clear: Callable[[], None] | None = None,
    spare: str = "",
) -> Iterator[None]:
    """Own `folder` within the block; it is made if it is not there, and gone afterwards.

    With `keep`, now or in an earlier claim, its content stays, and so does a folder that was there.
    What a dead run left that kept nothing is removed, once `before_clear` has saved what is to be
    saved; `spare` names what only `before_clear` may take away. Waits for a living holder, whom
    `say` names. Raises BundleError if the folder is not empty and has no mark, or is no folder,
    Busy if it is held and `wait` is False, and OSError if it cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    if folder in _held:
        yield
        return
    descriptor, made = _lock(folder, say, wait)
    _held.add(folder)
    try:
        # In doubt it was kept: an unreadable mark deletes nothing.
        kept = _record(descriptor).get("keep", _has_content(folder))
        keep = keep or kept is not False
        _write_mark(descriptor, keep)
        if before_clear is not None:
            before_clear()
        if kept is False:
            _clear(folder, spare)
        yield
    finally:
        _held.discard(folder)
        if _is_at(descriptor, folder / MARK):  # else it was moved away with what it lies in
            if not keep:
                _clear(folder, spare)
            if not _has_content(folder):
                with suppress(OSError):
                    os.unlink(folder / MARK)
                    if made or not keep:
                        os.rmdir(folder)  # fails if the next one has marked it already
        os.close(descriptor)


def clear_dead(folder: Path, before_clear: Callable[[], None] | None = None) -> None:
    """Remove `folder` if it is what a dead run left that kept nothing, as the next claim would."""
    if not folder.is_symlink() and (is_marked(folder) or _is_empty(folder)):
        with (
            suppress(BundleError, OSError),
            claim(folder, wait=False, before_clear=before_clear),
        ):
            pass


@contextmanager
def claim_shared(folder: Path, *, say: Say = quiet, wait: bool = True) -> Iterator[None]:
    """Keep a claimed folder as it is within the block: no other process can claim it.

    A folder without a mark, or whose mark cannot be read, is nobody's: nothing is held.
    """
    folder = Path(os.path.abspath(folder))
    try:
        descriptor = os.open(folder / MARK, os.O_RDONLY | _FLAGS)
    except OSError:
        yield
        return
    try:
        if folder not in _held:
            _flock(descriptor, fcntl.LOCK_SH, folder, say, wait)
        elif not wait:
            raise Busy(f"{folder} is held by this process")
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path, say: Say, wait: bool) -> tuple[int, bool]:
    """The descriptor of the locked mark, and whether the folder is new."""
    made = False
    while True:
        try:
            os.mkdir(folder)
            made = True
        except FileExistsError:
            try:  # one look: between two of them another run may have removed its folder
                kind = os.lstat(folder).st_mode
            except FileNotFoundError:
                continue
            if not stat.S_ISDIR(kind):
                raise BundleError(f"{folder} is there and is no folder: give another one") from None
        if not is_marked(folder) and _has_content(folder) and not is_marked(folder):
            raise BundleError(
                f"{folder} is not empty and has no mark of iq-export ({MARK}): it is left as it "
                "is; move it away or give another folder"
            )
        try:
            descriptor = os.open(folder / MARK, os.O_RDWR | os.O_CREAT | _FLAGS, 0o644)
        except FileNotFoundError:  # the one before us has just removed it
            continue
        except OSError:
            if made:
                with suppress(OSError):
                    os.rmdir(folder)
            raise
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise BundleError(f"{folder / MARK} is no file: give another folder")
            _flock(descriptor, fcntl.LOCK_EX, folder, say, wait)
            if _is_at(descriptor, folder / MARK):
                return descriptor, made
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it went away with its folder while we waited


def _flock(descriptor: int, kind: int, folder: Path, say: Say, wait: bool) -> None:
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise Busy(f"{folder} is in use: {_holder(descriptor)}") from None
            say(f"waiting for {folder}, in use: {_holder(descriptor)}")
            fcntl.flock(descriptor, kind)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _write_mark(descriptor: int, keep: bool) -> None:
    record = {
        "about": "iq-export made this folder and may remove it",
        "keep": keep,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": " ".join(map(ascii, sys.argv[1:2])),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(record, indent=1) + "\n").encode(), 0)


def _record(descriptor: int) -> dict[str, Any]:
    """What the mark says; nothing if it is new or damaged."""
    try:
        record = json.loads(os.pread(descriptor, _LONGEST_MARK, 0))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _holder(descriptor: int) -> str:
    record = {key: str(value)[:64] for key, value in _record(descriptor).items()}
    if "pid" not in record:
        return "its holder is not known"
    return (
        f"iq-export {record.get('command', '')} has it, process {record['pid']} on "
        f"{record.get('host', '?')}, since {record.get('since', '?')}"
    )


def _has_content(folder: Path) -> bool:
    try:
        return any(entry.name != MARK for entry in os.scandir(folder))
    except FileNotFoundError:
        return False


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not _has_content(folder)


def _clear(folder: Path, spare: str) -> None:
    """Remove all but the mark and what is spared."""
    with suppress(FileNotFoundError):
        for entry in list(os.scandir(folder)):
            if entry.name in (MARK, spare):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with suppress(OSError):
                    os.unlink(entry.path)
