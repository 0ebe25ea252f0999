"""Signals that end a run: Ctrl-C, SIGTERM (a container is stopped) and SIGHUP (a terminal closes).

A signal raises a KeyboardInterrupt wherever the main thread is, and a library there may swallow
it: a bare `except`, a callback of C++. So the signal is remembered, and `check` raises it again:
before and after each step, and at the end of the run, whatever became of the first one.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from iq_export.errors import INTERRUPTED_EXIT_CODE

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
# Within it a second signal is the first one again: a closing terminal sends several.
_SAME_SECONDS = 1.0


class Interrupted(KeyboardInterrupt):
    """A signal arrived.

    KeyboardInterrupt itself, if it passes through `exec` of a text on its way, has CPython end
    the process by SIGINT later on, with no regard to the exit code.
    """


class _Arrival:
    """When (by `time.monotonic`) the first signal came; None before."""

    at: float | None = None


def install() -> None:
    """Handle the signals, but for those that whoever started this process had it ignore (nohup)."""
    for number in _numbers():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _arrive)
    sys.unraisablehook = _report_unraisable


def ignore() -> None:
    """From here on nothing is left to stop: the exit code is known."""
    for number in _numbers():
        signal.signal(number, signal.SIG_IGN)


def check() -> None:
    """Raise KeyboardInterrupt if a signal arrived, also if something swallowed it."""
    if _Arrival.at is not None:
        raise Interrupted


@contextmanager
def never_swallowed() -> Iterator[None]:
    """If a signal arrived, the block ends in KeyboardInterrupt, and in nothing that came of it."""
    try:
        yield
    except BaseException:
        check()
        raise
    check()


def _numbers() -> list[signal.Signals]:
    return [signal.Signals[name] for name in SIGNALS if name in signal.Signals.__members__]


def _arrive(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _Arrival.at is None:
        _Arrival.at = now
        raise Interrupted
    if now - _Arrival.at > _SAME_SECONDS:
        # What is left over is found by the next run, and child processes end with this one.
        with suppress(OSError):
            os.write(2, b"\niq-export: interrupted again: stopped at once\n")
        os._exit(INTERRUPTED_EXIT_CODE)


def _report_unraisable(unraisable: Any) -> None:
    # Raised where Python cannot pass it on (a finalizer): it is remembered, and no traceback.
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
