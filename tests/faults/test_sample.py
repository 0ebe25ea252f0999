"""`python -m tests.faults` in part, and its instruments."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import __main__ as command
from tests.faults.kills import State, Store, _not_as_before, interleaved, spread
from tests.faults.run import Case, World
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
    try:
        os.mkdir("c")
    except FileExistsError:
        pass
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
        (2, 8, 0, "7 3", ["b"]),
        (3, 1, 0, "28 1 1", []),
        (3, 3, 0, "28 5 3", ["b"]),
        (3, 4, 0, "7 3", ["b"]),
    ],
)
def test_the_shim(
    shim: Path, tmp_path: Path, mode: int, at: int, code: int, out: str, left: list[str]
) -> None:
    """open, write, fsync, rename, mkdir twice, rmdir: a kill, or no space from one on."""
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


def _state(**files: str) -> State:
    return State({name.replace("__", "/"): (0o100644, 0, what) for name, what in files.items()})


@pytest.mark.parametrize(
    ("after", "complete", "keeps", "why"),
    [
        ({"b__manifest": "1"}, False, False, []),
        ({}, False, False, ["it fails and has changed b/manifest"]),
        ({"b__manifest": "2"}, False, False, ["it fails and has changed b/manifest"]),
        ({"b__manifest": "2", "b__new": "3"}, True, False, []),
        ({"b__manifest": "1", "b__new": "3"}, False, False, ["it leaves b/new"]),
        ({"b__manifest": "2", "b__stray": "3"}, True, False, ["it leaves b/stray"]),
        ({"b__manifest": "1", ".b.work__run": "3"}, False, False, ["it leaves .b.work/run"]),
        ({"b__manifest": "1", ".b.work__run": "3"}, False, True, []),
    ],
)
def test_what_a_full_disk_may_leave(
    after: dict[str, str], complete: bool, keeps: bool, why: list[str]
) -> None:
    before = _state(b__manifest="1")
    allowed = {"b/manifest", "b/new"}
    assert _not_as_before(before, _state(**after), allowed, complete, keeps) == why


def _raises() -> list[str]:
    raise OSError("of this machine")


@pytest.mark.parametrize(
    ("checks", "line", "row"),
    [
        ([lambda: [], lambda: ["it fails"]], [], "2 2 1 x/1: it fails"),
        ([lambda: []], [], "1 1 1 none"),
        ([_raises], [], "1 1 0 x/0: this harness: OSError('of this machine')"),
        ([], [], "0 0 0 none tried"),
        ([lambda: []], ["--repeat", "x/7"], "0 0 0 x/7: there is no case of that name"),
        ([lambda: [], lambda: ["it fails"]], ["--repeat", "x/1"], "1 1 0 x/1: it fails"),
        ([lambda: [], lambda: ["it fails"]], ["--minutes", "0"], "1 2 1 none"),
    ],
)
def test_a_row_says_what_was_tried(
    checks: list[Callable[[], list[str]]],
    line: list[str],
    row: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def cases(world: World, chosen: str | None) -> list[Case]:
        return [Case(f"x/{number}", check) for number, check in enumerate(checks)]

    monkeypatch.setattr(command, "BARS", {"x": command.Bar(cases, 1.0, {})})
    monkeypatch.setattr(command, "make_base", lambda folder: None)
    monkeypatch.setattr(command.run, "warm_up", lambda torch: None)
    monkeypatch.setattr(command.run, "verbose", False)
    code = command.main(line)
    table, repeat, _ = capsys.readouterr().out.replace("0.0", "").partition("repeat one")
    assert table.partition("first failures")[2].split() == ["x", *row.split()]
    assert code == bool(repeat) == (not row.endswith("1 none"))
