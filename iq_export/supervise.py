"""Child processes that end with this one, however it ends: SIGKILL leaves no time to end them.

A Python child of ours calls `end_with_parent`. Any other program, which may start more of them
(CMake, pip), runs below a small supervisor in a process group of its own: this file as a script.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

_PR_SET_PDEATHSIG = 1
_NO_SUCH_PROGRAM = 127
_BY_SIGNAL = 128
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the system send this process the signal `number` as soon as its parent ends.

    parent: its process id, which the parent passes; if it has ended already, so does this process.
    Does nothing but that last check where the system has no such call (it is Linux's).
    """
    import ctypes

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(_BY_SIGNAL + number)


def run(
    command: Sequence[str], *, cwd: str | Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with nothing on its stdin; its output as text.

    It and all that it started in its process group are killed if this process ends or the wait is
    interrupted. The return code is 127 if there is no such program, and 128 and the signal's number
    if one ended it.
    """
    supervised = [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]
    with subprocess.Popen(
        supervised, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", cwd=cwd, env=env,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate()
        except BaseException:
            process.terminate()  # the supervisor kills the group
            process.wait()
            raise
    return subprocess.CompletedProcess(list(command), process.returncode, output, errors)


class _Stopped(BaseException):
    """A signal asked the supervisor to stop."""


def _stop(number: int, frame: FrameType | None) -> None:
    for other in _STOPPING:  # a second one must not interrupt the killing
        signal.signal(other, signal.SIG_IGN)
    raise _Stopped


def _supervise(parent: int, command: Sequence[str]) -> int:
    """Run `command` in a group of its own; its exit code."""
    for number in _STOPPING:
        signal.signal(number, _stop)
    process: subprocess.Popen[bytes] | None = None
    try:
        end_with_parent(parent, signal.SIGTERM)
        own = os.getpid()
        process = subprocess.Popen(
            command,
            start_new_session=True,
            preexec_fn=lambda: end_with_parent(own),  # noqa: PLW1509 (there is one thread)
        )
        code = process.wait()
    except _Stopped:
        if process is not None:
            os.killpg(process.pid, signal.SIGKILL)
        return _BY_SIGNAL + signal.SIGTERM
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return _NO_SUCH_PROGRAM
    return code if code >= 0 else _BY_SIGNAL - code


if __name__ == "__main__":
    sys.exit(_supervise(int(sys.argv[1]), sys.argv[2:]))
