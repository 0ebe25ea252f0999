"""Progress for people: a line per step on stderr, a bar on a terminal, timings for the manifest."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from iq_export.interrupt import check
from iq_export.terminal import printable

_BAR_WIDTH = 24
_REDRAW_SECONDS = 0.2


class Progress:
    """Prints `[3/9] Observe ... 12.3 s` per step and remembers the seconds of each in `timings`.

    Steps may be nested; an inner step is timed as well, but neither numbered nor printed, so that
    a function with steps of its own can be called inside a step. `quiet=True` prints nothing but
    what is waited for.
    """

    def __init__(
        self, total: int | None = None, *, quiet: bool = False, stream: TextIO | None = None
    ) -> None:
        self.total = total
        self.quiet = quiet
        self.timings: dict[str, float] = {}
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._number = 0
        self._depth = 0
        self._head = ""
        self._drawn_at = 0.0
        self._unread = False

    @contextmanager
    def step(self, name: str) -> Iterator[Progress]:
        """Time one step; a step that raises is closed by `failed`, and its time is not recorded.

        Raises KeyboardInterrupt before and after it if a signal was swallowed; so does `update`.
        """
        check()
        outer = self._depth == 0
        if outer:
            self._number += 1
            self._head = f"[{self._number}/{self.total or '?'}] {name} ..."
            self._write(self._head)
        self._depth += 1
        start = time.perf_counter()
        word = "failed"
        try:
            yield self
            check()
            seconds = time.perf_counter() - start
            self.timings[name] = self.timings.get(name, 0.0) + seconds
            word = f"{seconds:.1f} s"
        finally:
            self._depth -= 1
            if outer:
                self._write(self._line_start() + f" {word}\n")
                self._head = ""

    def update(self, done: int, total: int) -> None:
        """Redraw the bar of the running step (terminals only; at most five times a second)."""
        check()
        now = time.perf_counter()
        if not self._terminal or not self._head or now - self._drawn_at < _REDRAW_SECONDS:
            return
        self._drawn_at = now
        filled = _BAR_WIDTH * done // max(total, 1)
        bar = "#" * filled + "-" * (_BAR_WIDTH - filled)
        self._write(self._line_start() + f" [{bar}] {done}/{total}")

    def note(self, text: str) -> None:
        """Print a remark on a line of its own, also in the middle of a step."""
        text = printable(text)
        if self._head:
            self._write(("\r\x1b[K" if self._terminal else "\n") + f"      {text}\n{self._head}")
        else:
            self._write(f"{text}\n")

    def waits(self, text: str) -> None:
        """As `note`, and also when quiet: who stands still without a word seems to hang."""
        if self.quiet:
            self._write(f"{printable(text)}\n", always=True)
        else:
            self.note(text)

    def _line_start(self) -> str:
        return f"\r\x1b[K{self._head}" if self._terminal else ""

    def _write(self, text: str, *, always: bool = False) -> None:
        if self._unread or (self.quiet and not always):
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # nobody reads it any more: no reason to stop the work
            self._unread = True
