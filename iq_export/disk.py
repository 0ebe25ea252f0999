"""What cannot be written, and why: system errors, and what libraries make of them."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iq_export.errors import BundleError

_LIMIT = "a file would get larger than is allowed (ulimit -f, or the file system)"
_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another folder"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another folder"),
    errno.EFBIG: (_LIMIT, "raise the limit or choose another folder"),
    errno.EROFS: ("the file system is read-only", "choose another folder"),
}
FULL = (errno.ENOSPC, errno.EDQUOT)
# Rust (safetensors, tokenizers) writes the number into its message.
_IN_TEXT = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)|\[Errno (\d+)\]")
# NumPy's error for a file that took only a part has no number.
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


def trouble(error: BaseException, where: str = "the output") -> str | None:
    """One sentence if a disk did not take what was written, and `error` came of that; else None.

    where: what was to be written, if the error itself names no file.
    """
    link: BaseException | None = error
    while link is not None:
        found = _reason(link)
        if found is not None:
            # Of two names the second is that of the copy.
            names = [getattr(link, name, None) for name in ("filename2", "filename")]
            name = next((name for name in names if name is not None), where)
            return f"{found[0]}: {name} was not written; {found[1]}"
        link = _cause(link)
    return None


@contextmanager
def trouble_is_bundle_error(where: str | Path, but: str = "") -> Iterator[None]:
    """Raise BundleError with the sentence of `trouble` if the disk does not take what the block
    writes; `but`, what is done all the same, comes before it."""
    try:
        yield
    except Exception as error:
        full = trouble(error, str(where))
        if full is None or (isinstance(error, BundleError) and not but):  # it is said already
            raise
        raise BundleError(f"{but}{full}") from error


def is_read_only(error: BaseException) -> bool:
    """Whether `error` came of a place that may not be written at all, as a bundle on an image."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return True
        link = _cause(link)
    return False


def _cause(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _reason(error: BaseException) -> tuple[str, str] | None:
    if isinstance(error, OSError) and error.errno is not None:
        return _REASONS.get(error.errno)
    text = str(error)
    if isinstance(error, OSError) and _SHORT_WRITE.search(text):
        return f"the disk is full, or {_LIMIT}", _REASONS[errno.ENOSPC][1]
    found = _IN_TEXT.search(text)
    return _REASONS.get(int(next(filter(None, found.groups())))) if found else None
