"""Children that die, or whose disk is full, at the n-th file operation that Python announces."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
SURVIVED, FAILED, DIED = 3, 7, 9


def run(work: Callable[[], object], at: int, *, kill: bool = True) -> int:
    """Do `work` in a fork that dies at once at file operation `at`, or gets "no space left" there.

    Its code: 0 done with fewer operations, SURVIVED done nevertheless, DIED, or FAILED where `work`
    raised an OSError or ours.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            reached = _arm(at, kill)
            work()
            code = SURVIVED if reached else 0
        except Exception as error:
            from iq_export.errors import IqError

            code = FAILED if isinstance(error, (OSError, IqError)) else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _arm(at: int, kill: bool) -> list[str]:
    """The event that was reached, once it was."""
    count = 0
    reached: list[str] = []

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(args[2], int) and args[2] & os.O_ACCMODE
        if not writes and event not in _EVENTS:
            return
        if not kill and event in ("os.remove", "os.rmdir"):  # they take no space
            return
        count += 1
        if count == at and kill:
            os._exit(DIED)
        if count == at:
            reached.append(event)
            raise OSError(errno.ENOSPC, "No space left on device")

    sys.addaudithook(hook)
    return reached
