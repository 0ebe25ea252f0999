"""What comes from elsewhere is shown, not obeyed, and not without end."""

from __future__ import annotations

import pytest

from iq_export.bundle.manifest import TensorInfo
from iq_export.terminal import in_a_line, is_utf8, printable, sentence


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 漢\tx\n", "plain ü 漢\tx\n"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("bell\x07 back\x08 return\r", r"bell\x07 back\x08 return\x0d"),
        ("\x7f \x9b2J", r"\x7f \x9b2J"),
        ("\0", r"\x00"),
        ("abc\u202edcba\u2069\u2028x", r"abc\u202edcba\u2069\u2028x"),
    ],
)
def test_control_characters_are_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_record_is_shown_in_its_line() -> None:
    record = {"a\nb": ["\t", TensorInfo("x\x1b", "int64", ["batch\n", 3])], "n": 1.5, "none": None}
    shown = {
        r"a\x0ab": [r"\x09", TensorInfo(r"x\x1b", "int64", [r"batch\x0a", 3])],
        "n": 1.5,
        "none": None,
    }
    assert in_a_line(record) == shown


def test_a_long_message_keeps_its_head_and_its_tail() -> None:
    text = "cannot read " + "x" * 5000 + ": give another"
    shown = sentence(text)
    assert shown.startswith("cannot read xxx") and shown.endswith(": give another")
    assert len(shown) < 900 and " [...] " in shown
    assert sentence(ValueError("short")) == "short"


def test_bytes_that_are_not_utf8() -> None:
    assert is_utf8("漢字") and not is_utf8("caf\udce9")
