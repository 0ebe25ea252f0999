"""What cannot be written, and why: system errors, and what libraries make of them."""

from __future__ import annotations

import errno
import re

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would get larger than is allowed here (ulimit -f, or the file system)",
    errno.EROFS: "the file system is read-only",
}
# Rust (safetensors, tokenizers) writes the number into its message.
_IN_TEXT = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)|\[Errno (\d+)\]")
# NumPy's error for a file that took only a part has no number.
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


def trouble(error: BaseException) -> str | None:
    """One sentence if a disk did not take what was written, and `error` came of that; else None."""
    link: BaseException | None = error
    while link is not None:
        reason = _reason(link)
        if reason is not None:
            name = getattr(link, "filename", None)
            return f"{reason}: {'the output' if name is None else name} was not written"
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None


def _reason(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno is not None:
        return _REASONS.get(error.errno)
    text = str(error)
    if isinstance(error, OSError) and _SHORT_WRITE.search(text):
        return "the disk is full, or a file would get larger than is allowed here"
    found = _IN_TEXT.search(text)
    return _REASONS.get(int(next(filter(None, found.groups())))) if found else None
