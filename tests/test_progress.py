"""Progress prints a line per step, a bar on terminals only, and remembers the times."""

from __future__ import annotations

import io

import pytest

from iq_export.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_step_is_one_numbered_line() -> None:
    stream = io.StringIO()
    progress = Progress(9, stream=stream)
    for name in ("Load", "Trace"):
        with progress.step(name):
            progress.update(1, 2)
    first, second = stream.getvalue().splitlines()
    assert first.startswith("[1/9] Load ... ") and first.endswith(" s")
    assert second.startswith("[2/9] Trace ... ")


def test_times_are_recorded_and_added_up() -> None:
    progress = Progress(quiet=True)
    for _ in range(2):
        with progress.step("Observe"), progress.step("inner"):
            pass
    assert set(progress.timings) == {"Observe", "inner"}
    assert progress.timings["Observe"] >= progress.timings["inner"] >= 0


def test_inner_steps_are_not_printed() -> None:
    stream = io.StringIO()
    progress = Progress(1, stream=stream)
    with progress.step("Trace"), progress.step("load model"):
        pass
    assert "load model" not in stream.getvalue()
    assert stream.getvalue().count("\n") == 1


def test_quiet_prints_nothing() -> None:
    stream = Terminal()
    progress = Progress(3, quiet=True, stream=stream)
    with progress.step("Load"):
        progress.update(1, 2)
        progress.note("a remark")
    assert stream.getvalue() == ""


def test_a_bar_only_on_a_terminal() -> None:
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        progress = Progress(1, stream=stream)
        with progress.step("Observe"):
            progress.update(8, 16)
    assert "8/16" in terminal.getvalue() and "############----" in terminal.getvalue()
    assert "8/16" not in plain.getvalue() and "\r" not in plain.getvalue()


def test_a_failed_step_says_so_and_has_no_time() -> None:
    stream = io.StringIO()
    progress = Progress(1, stream=stream)
    with pytest.raises(ValueError), progress.step("Trace"):
        raise ValueError
    assert stream.getvalue().endswith("failed\n")
    assert progress.timings == {}
    with progress.step("Again"):
        pass
    assert "Again" in progress.timings


def test_a_note_in_a_step_keeps_the_line_readable() -> None:
    stream = io.StringIO()
    progress = Progress(1, stream=stream)
    with progress.step("Trace"):
        progress.note("a remark")
    lines = stream.getvalue().splitlines()
    assert lines[1].strip() == "a remark"
    assert lines[2].startswith("[1/1] Trace ... ")
