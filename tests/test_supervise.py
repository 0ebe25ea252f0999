"""Child processes end with their parent, and so does what they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from iq_export import supervise

linux = pytest.mark.skipif(sys.platform != "linux", reason="it is Linux's prctl")
# A program that starts another one, as CMake does, and both would run for a minute.
_TREE = "sh -c 'echo $$ > {0}/inner; exec sleep 60' & echo $$ > {0}/outer; wait"


def test_output_and_codes(tmp_path: Path) -> None:
    done = supervise.run(["sh", "-c", "pwd; echo said >&2; cat; exit 3"], cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, f"{tmp_path}\n", "said\n")
    assert supervise.run(["sh", "-c", "kill -9 $$"]).returncode == 128 + 9
    missing = supervise.run(["/no/such/program"])
    assert (missing.returncode, missing.stderr) == (
        127,
        "/no/such/program: No such file or directory\n",
    )


def _parent(tmp_path: Path) -> subprocess.Popen[bytes]:
    program = (
        f"from iq_export import supervise; supervise.run(['sh', '-c', {_TREE.format(tmp_path)!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    _until(lambda: len(_pids(tmp_path)) == 2)
    return process


def _pids(tmp_path: Path) -> list[int]:
    found = [tmp_path / name for name in ("outer", "inner")]
    return [int(path.read_text()) for path in found if path.exists() and path.read_text().strip()]


def _until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def _alive(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_whole_tree_ends_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    process = _parent(tmp_path)
    pids = _pids(tmp_path)
    assert all(map(_alive, pids))
    process.send_signal(number)
    process.wait(10)
    _until(lambda: not any(map(_alive, pids)), 5)


@linux
@pytest.mark.parametrize("module", ["iq_export.engine.worker", "iq_export.run.chat_template"])
def test_a_python_child_ends_with_its_parent(tmp_path: Path, module: str) -> None:
    """The parent is killed while its child waits for a request."""
    start = f"""
import os, subprocess, sys, time
p = subprocess.Popen([sys.executable, '-m', {module!r}, str(os.getpid())], stdin=subprocess.PIPE,
                     pass_fds=[0])
open({str(tmp_path / "outer")!r}, 'w').write(str(p.pid))
time.sleep(60)
"""
    reader, writer = os.pipe()  # it stays open: the end of stdin must not be what ends the child
    with subprocess.Popen([sys.executable, "-c", start], stdin=reader) as process:
        _until(lambda: len(_pids(tmp_path)) == 1)
        (number,) = _pids(tmp_path)
        process.kill()
    _until(lambda: not _alive(number), 5)
    os.close(writer)
    os.close(reader)


def test_a_child_whose_parent_is_gone_stops() -> None:
    program = "from iq_export.supervise import end_with_parent; end_with_parent(1); print('ran')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (128 + 9, "")
