"""Generated parts of Markdown pages, each between two marks."""

from __future__ import annotations

from pathlib import Path


def part(page: Path, name: str) -> str:
    """What stands between the marks `name` of `page`."""
    return _split(page, name)[1].strip("\n")


def fill(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks `name` of `page`."""
    before, _, after = _split(page, name)
    begin, end = _marks(name)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def _split(page: Path, name: str) -> tuple[str, str, str]:
    """Before, between and after the marks; ValueError if they are not there once each."""
    begin, end = _marks(name)
    before, rest = page.read_text(encoding="utf-8").split(begin)
    between, after = rest.split(end)
    return before, between, after


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
