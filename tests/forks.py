"""`iq-export` in processes of its own, without the seconds that its imports take: they are forks
of a process that has imported everything, computed nothing and started no thread.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

ROOT = Path(__file__).parents[1]
_LONGEST = 1 << 16  # bytes of a request


class Forks:
    """Starts commands, one at a time. Use it as a context: the process that forks ends with it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forks", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            )

    def __enter__(self) -> Forks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._socket.close()
        self._process.wait()

    def start(self, argv: Sequence[str]) -> tuple[int, TextIO]:
        """The id of the process, and its stderr."""
        read, write = os.pipe()
        socket.send_fds(self._socket, [json.dumps(list(argv)).encode()], [write])
        os.close(write)
        return int(self._received()), os.fdopen(read, encoding="utf-8")

    def code(self) -> int:
        """Waits for the command; -N where signal N ended it."""
        return int(self._received())

    def _received(self) -> bytes:
        answer = self._socket.recv(_LONGEST)
        assert answer, "the process that forks has died"
        return answer


def _serve(number: int) -> None:
    from tests.faults.run import warm_up

    warm_up()
    gc.freeze()  # else the first collection in each child copies all of this
    requests = socket.socket(fileno=number)
    while True:
        argv, streams, _, _ = socket.recv_fds(requests, _LONGEST, 1)
        if not argv:
            return
        child = os.fork()
        if child == 0:
            from iq_export.cli import entry

            requests.close()
            os.dup2(streams[0], 2)
            os.close(streams[0])
            sys.argv = ["iq-export", *json.loads(argv)]
            entry()
        os.close(streams[0])
        requests.send(str(child).encode())
        requests.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
