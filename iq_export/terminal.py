"""Text that came from elsewhere (names, messages, manifests), made fit for a terminal."""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any

# What a terminal obeys instead of showing it, changes of the direction included; a line break and a
# tab are text.
_OBEYED = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"
_CONTROL = re.compile(f"[{_OBEYED}]")
_IN_A_LINE = re.compile(f"[{_OBEYED}\\t\\n]")
# An error is read, not scrolled: its head says what and where, its tail what to do.
_HEAD, _TAIL = 600, 250


def printable(text: str) -> str:
    """`text` with its control characters written out, as in `\\x1b`."""
    return _CONTROL.sub(_written_out, text)


def in_a_line(value: Any) -> Any:
    """Every string in a record (of dicts, lists and dataclasses) as a part of one line: what it
    says can neither command the terminal nor look like a line of ours."""
    if isinstance(value, str):
        return _IN_A_LINE.sub(_written_out, value)
    if isinstance(value, dict):
        return {in_a_line(key): in_a_line(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(in_a_line, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: in_a_line(getattr(value, f.name)) for f in fields(value)})
    return value


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


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


def drop_stdout() -> None:
    """Python flushes stdout once more at exit, and would complain where that fails."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Unfailing(io.FileIO):
    """A stream that nobody may read: what cannot be written is lost, and raises nothing.

    `iq-export compile ... 2>&1 | head` ends as it does without `head`.
    """

    stream: io.TextIOWrapper  # it would close the descriptor when nothing refers to it

    @classmethod
    def like(cls, stream: io.TextIOWrapper) -> io.TextIOWrapper:
        """`stream` as one, of the same descriptor and encoding."""
        raw = cls(stream.fileno(), "w", closefd=False)
        raw.stream = stream
        buffer = io.BufferedWriter(raw)
        return io.TextIOWrapper(
            buffer, encoding=stream.encoding, line_buffering=True, write_through=True
        )

    def write(self, content: Any) -> int:
        """All of `content`, as far as the caller can tell."""
        with suppress(OSError):
            return super().write(content)
        # From now on this holds for libraries that write to the descriptor as well.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        return memoryview(content).nbytes
