"""Text that came from elsewhere (names, messages, manifests), made fit for a terminal."""

from __future__ import annotations

import re

# What a terminal obeys instead of showing it; a line break and a tab are text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# An error is read, not scrolled: its head says what and where, its tail what to do.
_HEAD, _TAIL = 600, 250


def printable(text: str) -> str:
    """`text` with its control characters written out, as in `\\x1b`."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def sentence(text: object) -> str:
    """A message fit for stderr: printable, and its middle left out where it is too long."""
    shown = printable(str(text))
    if len(shown) <= _HEAD + _TAIL:
        return shown
    return f"{shown[:_HEAD]} [...] {shown[-_TAIL:]}"


def is_utf8(text: str) -> bool:
    """Whether an argument or a file's name is: bytes that are not reach Python as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
