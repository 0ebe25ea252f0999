"""Files below a folder that somebody else may have made: a bundle, a model, a work folder.

One rule for all: what is read or written lies inside, is a regular file and no link, and is opened
so that it cannot be exchanged in between. The folder itself may be a link: the user named it.

In a model's folder a file may be a link to another one inside, and in the cache of the Hugging Face
hub, where every file is one, to a blob of that cache: `open_belonging`.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from iq_export.errors import BundleError, IqError

_LONGEST_PART = 255
_CHUNK_BYTES = 1 << 20
# Opening a pipe must not wait for its other end, nor a terminal become ours.
_SAFE = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


def parts_inside(name: str, error: type[IqError] = BundleError) -> tuple[str, ...]:
    """The parts of a relative, `/`-separated name. Raises `error` if it could lead outside."""
    parts = PurePosixPath(name).parts
    whole = "/".join(parts) == name and bool(parts)
    if not whole or name.startswith("/") or ".." in parts or "\\" in name or not name.isprintable():
        raise error(f"{name!a} is no name of a file inside its folder")
    if any(len(part.encode()) > _LONGEST_PART for part in parts):
        raise error(f"{name[:40]!a}... is too long for a name of a file")
    return parts


def open_inside(root: Path, name: str, error: type[IqError] = BundleError) -> BinaryIO:
    """Open the regular file `name` below the folder `root` to read it.

    Raises FileNotFoundError if it is missing, and `error` if it or a folder on the way is a link or
    anything else than it should be, or cannot be read.
    """
    parts = parts_inside(name, error)
    with _folder(root, parts[:-1], error) as folder, _sentence(root / name, error):
        return os.fdopen(_regular(root / name, parts[-1], os.O_RDONLY, folder, error), "rb")


def read_inside(root: Path, name: str, most: int, error: type[IqError] = BundleError) -> bytes:
    """All bytes of a file as `open_inside` opens it. Raises `error` if it has more than `most`."""
    with open_inside(root, name, error) as stream:
        return _at_most(stream, root / name, most, error)


def read_named(path: Path, most: int, error: type[IqError]) -> bytes:
    """All bytes of a file that the user named, which may be a link.

    Raises FileNotFoundError if it is missing, and `error` if it is no regular file, cannot be read
    or has more than `most` bytes: nothing of it is read then.
    """
    with _sentence(path, error):
        found = os.open(path, os.O_RDONLY | _SAFE & ~os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise error(f"{path} is not a regular file: give a file")
    os.set_blocking(found, True)
    with os.fdopen(found, "rb") as stream:
        return _at_most(stream, path, most, error)


def check_size(path: Path, most: int, error: type[IqError]) -> None:
    """Raise `error` if the file has more than `most` bytes: `read_named` would read nothing."""
    if path.stat().st_size > most:
        raise error(_too_large(path, most))


def open_belonging(root: Path, name: str, error: type[IqError] = BundleError) -> BinaryIO:
    """As `open_inside`, and the file may be a link that stays inside, or in the hub's blobs.

    Raises `error` if it leads out.
    """
    parts_inside(name, error)
    whole = Path(os.path.realpath(root))
    found = Path(os.path.realpath(whole / name))
    for home in (whole, *_blobs(whole)):
        if home in found.parents:
            return open_inside(home, found.relative_to(home).as_posix(), error)
    raise error(
        f"{root / name} is a link that leads out of its folder: put the file itself there, "
        "e.g. with cp -L"
    )


def read_belonging(root: Path, name: str, most: int, error: type[IqError] = BundleError) -> bytes:
    """As `read_inside`, of a file as `open_belonging` opens it."""
    with open_belonging(root, name, error) as stream:
        return _at_most(stream, root / name, most, error)


def copy_belonging(root: Path, name: str, target: Path, error: type[IqError] = BundleError) -> None:
    """Copy a file as `open_belonging` opens it to the new file `target`.

    Raises `error` also if something of that name is there.
    """
    with (
        open_belonging(root, name, error) as source,
        create_inside(target.parent, target.name, error) as made,
    ):
        shutil.copyfileobj(source, made, _CHUNK_BYTES)


def create_inside(root: Path, name: str, error: type[IqError] = BundleError) -> BinaryIO:
    """Make the file `name` below `root`, and the folders on the way, and open it to write.

    Raises `error` if something of that name is there, a link included, or if a folder on the way is
    none.
    """
    parts = parts_inside(name, error)
    with (
        _folder(root, parts[:-1], error, make=True) as folder,
        _sentence(root / name, error),
    ):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        return os.fdopen(_regular(root / name, parts[-1], flags, folder, error), "wb")


def move_inside(root: Path, source: str, target: str, error: type[IqError] = BundleError) -> None:
    """Rename the file `source` below `root` to `target` below it, in place of what is there.

    Makes the folders on the way. Raises FileNotFoundError if `source` is missing, and `error` if
    one of those folders is a link or no folder, or `target` is a folder.
    """
    old, new = parts_inside(source, error), parts_inside(target, error)
    with (
        _folder(root, old[:-1], error) as here,
        _folder(root, new[:-1], error, make=True) as there,
        _sentence(root / target, error),
    ):
        os.rename(old[-1], new[-1], src_dir_fd=here, dst_dir_fd=there)


def make_place(root: Path, name: str, error: type[IqError] = BundleError) -> None:
    """Make the folders on the way to `name` below `root`. Raises `error` if one is a link or no
    folder, or `name` is a folder: no file could be moved there."""
    parts = parts_inside(name, error)
    with _folder(root, parts[:-1], error, make=True) as folder, suppress(FileNotFoundError):
        if stat.S_ISDIR(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode):
            raise error(f"{root / name} is a folder: remove it")


def remove_inside(root: Path, name: str, error: type[IqError] = BundleError) -> None:
    """Remove the file or link `name` below `root`, if it is there, but never through a link."""
    parts = parts_inside(name, error)
    with (
        suppress(FileNotFoundError),
        _folder(root, parts[:-1], error) as folder,
        _sentence(root / name, error),
    ):
        os.unlink(parts[-1], dir_fd=folder)


def flush(folder: Path) -> None:
    """Put every file and folder below `folder` on the disk."""
    for here, _, names in os.walk(folder):
        for path in [*(os.path.join(here, name) for name in names), here]:
            with suppress(FileNotFoundError):
                sync(Path(path))


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY | _SAFE)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EROFS):  # a file system that cannot
            raise
    finally:
        os.close(descriptor)


def _at_most(stream: BinaryIO, path: Path, most: int, error: type[IqError]) -> bytes:
    large = os.fstat(stream.fileno()).st_size > most  # its memory is not even asked for
    content = b"" if large else stream.read(most + 1)
    if large or len(content) > most:
        raise error(_too_large(path, most))
    return content


def _too_large(path: Path, most: int) -> str:
    return f"{path} has more than {most} bytes: it is not what its name says"


def _blobs(folder: Path) -> tuple[Path, ...]:
    """Where the files of a snapshot in the hub's cache lie: its repository's blobs, and those that
    all repositories share."""
    for place in (folder, *folder.parents):
        repository = place.parent.parent
        if place.parent.name == "snapshots" and repository.name.startswith("models--"):
            return repository / "blobs", repository.parent / "blobs"
    return ()


@contextmanager
def _folder(
    root: Path, parts: tuple[str, ...], error: type[IqError], *, make: bool = False
) -> Iterator[int]:
    """A descriptor of the folder `parts` below `root`, none of which is a link."""
    here = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for number, part in enumerate(parts):
            with _sentence(root.joinpath(*parts[: number + 1]), error):
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=here)
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | _SAFE, dir_fd=here)
            os.close(here)
            here = inner
        yield here
    finally:
        os.close(here)


def _regular(path: Path, part: str, flags: int, folder: int, error: type[IqError]) -> int:
    found = os.open(part, flags | _SAFE, 0o666, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise error(f"{path} is not a regular file: copy it again")
    os.set_blocking(found, True)
    return found


@contextmanager
def _sentence(path: Path, error: type[IqError]) -> Iterator[None]:
    """Links and wrong kinds are one sentence; a missing file stays FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as problem:
        if problem.errno in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK):
            raise error(
                f"{path} is a link or no folder: what belongs to a folder must lie inside it"
            ) from problem
        if problem.errno == errno.EEXIST:
            raise error(f"{path} is there already") from problem
        if problem.errno in (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENXIO):
            raise error(f"cannot use {path}: {problem.strerror}") from problem
        raise
