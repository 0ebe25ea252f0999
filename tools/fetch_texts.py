"""Write texts unlike the built-in calibration text: code, dialogue and French, for evaluation.

    python tools/fetch_texts.py [--output FOLDER]

- `code.txt`: modules of this Python's own standard library.
- `dialogue.txt`: the English conversations of `chatterbot-corpus` (BSD), a wheel on PyPI.
- `french.txt`: the French messages of Django (BSD), a wheel on PyPI.

Wheels are pinned by checksum and never imported. Default output: `texts` in the cache folder.
"""

from __future__ import annotations

import argparse
import ast
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from iq_export.bundle.manifest import write_atomically
from iq_export.errors import IqError
from iq_export.model.fetch import cache_dir, fetch_wheel_members

_DIALOGUE = "chatterbot-corpus==1.3.3"
_DIALOGUE_SHA256 = "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"
_FRENCH = "django==5.2.8"
_FRENCH_SHA256 = "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f"
_MODULES = 40
_SENTENCE_WORDS = 5


def code_text() -> str:
    """The first modules of the standard library, by name."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))
    sources = (path.read_text(encoding="utf-8", errors="replace") for path in modules[:_MODULES])
    return "\n\n".join(sources)


def dialogue_text() -> str:
    """One line per turn, a blank line between conversations. Raises ModelError without network."""
    folder = fetch_wheel_members(
        _DIALOGUE, wheel_sha256=_DIALOGUE_SHA256,
        patterns=("chatterbot_corpus/data/english/*.yml",), folder="dialogue",
    )  # fmt: skip
    talks = []
    for file in sorted(folder.rglob("*.yml")):
        if file.stem != "coding":  # questions about programs: that is what code.txt is for
            talks += yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
    lines = ("\n".join(f"- {turn}" for turn in talk) for talk in talks)
    return "\n\n".join(dict.fromkeys(lines))  # its generated ones repeat


def french_text() -> str:
    """The translated sentences, one per line. Raises ModelError without network."""
    folder = fetch_wheel_members(
        _FRENCH, wheel_sha256=_FRENCH_SHA256,
        patterns=("django/*/locale/fr/LC_MESSAGES/django.po",), folder="french",
    )  # fmt: skip
    files = sorted(folder.rglob("*.po"))
    messages = [m for file in files for m in _translations(file.read_text(encoding="utf-8"))]
    return "\n".join(dict.fromkeys(m for m in messages if len(m.split()) >= _SENTENCE_WORDS))


def _translations(catalog: str) -> Iterator[str]:
    """The `msgstr` entries of a gettext catalogue: quoted strings that may run over many lines."""
    for entry in catalog.split("\n\n")[1:]:  # the first holds the header
        parts: list[str] = []
        inside = False
        for line in entry.splitlines():
            continues = line.startswith('"')
            inside = inside if continues else line.startswith("msgstr")
            if inside:
                parts.append(ast.literal_eval(line if continues else line.partition(" ")[2]))
        yield " ".join("".join(parts).split())


TEXTS: dict[str, Callable[[], str]] = {
    "code": code_text,
    "dialogue": dialogue_text,
    "french": french_text,
}


def main() -> int:
    """Write the files and print their paths; what is there already is not made again."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=cache_dir() / "texts")
    folder: Path = parser.parse_args().output
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, make in TEXTS.items():
            path = folder / f"{name}.txt"
            if not path.is_file():
                write_atomically(path, make() + "\n")
            print(path)
    except IqError as error:
        print(f"fetch_texts: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
