"""`python -m tests.faults` in part, and its instruments."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import __main__ as command
from tests.faults.kills import Store, interleaved, spread
from tests.faults.watch import Watch

ROOT = Path(__file__).parents[2]


def run(*argv: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *argv], capture_output=True, text=True,
        check=False, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_a_sample() -> None:
    run("--sample")


@pytest.mark.heavy
def test_every_bar() -> None:
    run("--minutes", "60")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("shim") / "shim.so"
    arguments = ["-shared", "-fPIC", "-Wall", "-Werror", "-o", str(path), str(command.SHIM), "-ldl"]
    subprocess.run([compiler, *arguments], check=True)
    return path


_WRITER = """
import os, sys
from tests.faults.run import Faults
faults = Faults.make(int(sys.argv[1]), int(sys.argv[2]))
faults.arm(os.getcwd())
try:
    open("/dev/null", "w").write("x")
    with open("a", "w") as stream:
        stream.write("x")
        stream.flush()
        os.fsync(stream.fileno())
    os.rename("a", "b")
    os.mkdir("c")
    os.rmdir("c")
except OSError as error:
    print(error.errno)
faults.mode = 0
print(faults.operations, faults.takers)
"""


@pytest.mark.parametrize(
    ("mode", "at", "code", "out", "left"),
    [
        (2, 4, -signal.SIGKILL, "", ["a"]),
        (2, 6, -signal.SIGKILL, "", ["b", "c"]),
        (2, 7, 0, "6 3", ["b"]),
        (3, 1, 0, "28 1 1", []),
        (3, 3, 0, "28 5 3", ["b"]),
    ],
)
def test_the_shim(
    shim: Path, tmp_path: Path, mode: int, at: int, code: int, out: str, left: list[str]
) -> None:
    """open, write, fsync, rename, mkdir, rmdir: killed before one, or no space from one on."""
    done = subprocess.run(
        [sys.executable, "-c", _WRITER, str(mode), str(at)], capture_output=True, text=True,
        check=False, cwd=tmp_path,
        env={**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout.split()) == (code, out.split()), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_a_state_is_put_back(tmp_path: Path) -> None:
    place, store = tmp_path / "place", Store()
    (place / "folder" / "empty").mkdir(parents=True)
    (place / "folder" / "file").write_text("one")
    (place / "link").symlink_to("folder/file")
    os.utime(place / "folder" / "file", ns=(5, 5))
    state = store.take(place)
    (place / "folder" / "file").write_text("two")
    (place / "link").unlink()
    assert store.take(place).key() != state.key()
    store.put(state, place)
    assert store.take(place) == state
    assert (place / "link").read_text() == "one"


def test_the_watch_sees_what_goes_through_links(tmp_path: Path) -> None:
    root, inside = tmp_path / "outside", tmp_path / "in"
    (root / "folder").mkdir(parents=True)
    (root / "secret").write_text("x")
    inside.symlink_to(root)
    watch = Watch(root)
    list(root.iterdir())
    assert watch.close() == []
    watch = Watch(root)
    (inside / "secret").read_text()
    (inside / "folder" / "new").touch()
    assert {event.split()[0] for event in watch.close()} == {"reads", "writes"}


def test_beginnings_are_spread() -> None:
    assert list(spread(range(8)))[:4] == [0, 4, 2, 6]
    assert sorted(spread(range(11))) == list(range(11))
    assert list(interleaved([[1, 2, 3], [4]])) == [1, 4, 2, 3]
