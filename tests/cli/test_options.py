"""What the shared option types take, and how they print what came from elsewhere."""

from __future__ import annotations

import argparse
import json

import pytest

from iq_export.cli import options
from iq_export.options import positive, seed, window_tokens


@pytest.mark.parametrize("text", ["", "x", "1.5", "nan", "1e3", "9" * 5000, "0x10"])
def test_no_whole_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number"):
        positive(text)


def test_bounds() -> None:
    assert positive("1") == 1 and seed("0") == 0
    assert window_tokens("512") == 512
    with pytest.raises(argparse.ArgumentTypeError, match="0 is not at least 1"):
        positive("0")
    with pytest.raises(argparse.ArgumentTypeError, match="1 is not at least 2 tokens"):
        window_tokens("1")
    with pytest.raises(argparse.ArgumentTypeError, match="-1 is not at least 0"):
        seed("-1")
    with pytest.raises(argparse.ArgumentTypeError, match="is more than"):
        positive("9" * 400)


def test_what_is_printed_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    options.say("a\x1b[2J")
    assert capsys.readouterr().out == "a\\x1b[2J\n"
    options.print_json({"name\x9b": "\x1b\x7f漢"})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"name\x9b": "\x1b\x7f漢"}
    assert printed.isprintable() or not set(printed) & set("\x1b\x7f\x9b")
    assert "漢" in printed
