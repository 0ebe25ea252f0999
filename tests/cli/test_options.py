"""What the shared option types take, and how they print what came from elsewhere."""

from __future__ import annotations

import argparse
import json

import pytest

from iq_export.cli import options


@pytest.mark.parametrize("text", ["", "x", "1.5", "nan", "1e3", "9" * 5000, "0x10"])
def test_no_whole_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number"):
        options.positive(text)


def test_bounds() -> None:
    assert options.positive("1") == 1 and options.seed("0") == 0
    assert options.window_length("512") == 512
    with pytest.raises(argparse.ArgumentTypeError, match="0 is not at least 1"):
        options.positive("0")
    with pytest.raises(argparse.ArgumentTypeError, match="1 is not at least 2 tokens"):
        options.window_length("1")
    with pytest.raises(argparse.ArgumentTypeError, match="-1 is not at least 0"):
        options.seed("-1")
    with pytest.raises(argparse.ArgumentTypeError, match="is more than"):
        options.positive("9" * 400)


def test_what_is_printed_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    options.say("a\x1b[2J")
    assert capsys.readouterr().out == "a\\x1b[2J\n"
    options.print_json({"name\x9b": "\x1b\x7f漢"})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"name\x9b": "\x1b\x7f漢"}
    assert printed.isprintable() or not set(printed) & set("\x1b\x7f\x9b")
    assert "漢" in printed
