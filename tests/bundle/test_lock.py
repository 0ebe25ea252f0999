"""A folder belongs to one process at a time; what has no mark is never touched."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from iq_export.bundle.lock import MARK, Busy, claim, claim_shared
from iq_export.errors import BundleError
from tests import dying


def hold(folder: Path, seconds: float, keep: bool = False) -> int:
    """A fork that claims the folder and writes into it; its process id, once it has it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with claim(folder, keep=keep):
            (folder / "graph").write_text("x")
            os.write(writer, b"1")
            time.sleep(seconds)
        os._exit(0)
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    return child


def test_a_second_process_waits_and_says_for_whom(tmp_path: Path) -> None:
    child = hold(tmp_path / "w", 0.3)
    said: list[str] = []
    with pytest.raises(Busy, match=f"process {child} on"), claim(tmp_path / "w", wait=False):
        pass
    with claim(tmp_path / "w", say=said.append):
        assert [path.name for path in (tmp_path / "w").iterdir()] == [MARK]
    assert len(said) == 1
    assert f"process {child} on" in said[0] and "waiting for" in said[0]
    assert not (tmp_path / "w").exists()
    os.waitpid(child, 0)


@pytest.mark.parametrize("keep", [True, False])
def test_a_dead_holder_is_taken_over(tmp_path: Path, keep: bool) -> None:
    child = hold(tmp_path / "w", 60, keep)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "w" / "graph").exists()
    with claim(tmp_path / "w", wait=False):
        assert (tmp_path / "w" / "graph").exists() == keep
    assert (tmp_path / "w" / "graph").exists() == keep == (tmp_path / "w").exists()


def test_what_has_no_mark_is_left(tmp_path: Path) -> None:
    (tmp_path / "w" / "traced").mkdir(parents=True)
    with pytest.raises(BundleError, match="not empty and has no mark"), claim(tmp_path / "w"):
        pass
    assert (tmp_path / "w" / "traced").exists()
    (tmp_path / "empty").mkdir()
    with claim(tmp_path / "empty", keep=True):
        pass
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"keep": 1}'])
def test_a_damaged_mark_deletes_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / MARK).write_text(text)
    (tmp_path / "graph").write_text("x")
    with claim(tmp_path):
        pass
    assert (tmp_path / "graph").exists()


def test_a_link_is_no_mark(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "other").write_text(json.dumps({"keep": False}))
    (tmp_path / "w" / MARK).symlink_to(tmp_path / "other")
    (tmp_path / "w" / "graph").write_text("x")
    with pytest.raises(BundleError, match="no mark"), claim(tmp_path / "w"):
        pass
    (tmp_path / "l").symlink_to(tmp_path / "w")
    with pytest.raises(BundleError, match="no folder"), claim(tmp_path / "l"):
        pass


def test_readers_keep_it_as_it_is(tmp_path: Path) -> None:
    with claim(tmp_path / "w", keep=True):
        (tmp_path / "w" / "graph").write_text("x")
    w = tmp_path / "w"
    with claim_shared(w), claim_shared(w), pytest.raises(Busy), claim(w, wait=False):
        pass
    with claim_shared(tmp_path / "nobodys"):
        pass


@pytest.mark.parametrize("keep", [True, False])
def test_every_file_operation_may_be_the_last(tmp_path: Path, keep: bool) -> None:
    def work(folder: Path) -> None:
        with claim(folder, keep=keep):
            (folder / "sub").mkdir(exist_ok=True)
            (folder / "sub" / "graph").write_text("x")

    for at in range(1, 50):
        folder = tmp_path / str(at)
        code = dying.run(lambda folder=folder: work(folder), at)
        work(folder)
        assert folder.exists() == keep
        if code == 0:
            break
    assert at > 3


def _count(folder: Path, log: Path) -> None:
    for _ in range(20):
        with claim(folder / "w"), log.open("a") as stream:
            stream.write("(")
            stream.flush()
            time.sleep(0.001)
            stream.write(")")


def test_many_at_once(tmp_path: Path) -> None:
    """The folder is made and removed again and again, and never has two owners."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_count, args=(tmp_path, tmp_path / "log")) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert (tmp_path / "log").read_text() == "()" * 80
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
