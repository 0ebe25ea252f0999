"""What README.md and docs/ show exists: examples parse, options are options, exit codes are real,
links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from iq_export import errors
from iq_export.cli import parser
from tools.pages import part
from tools.readme import tables

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
TEXTS = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", TEXTS, re.DOTALL | re.MULTILINE)
EXAMPLES = [line for block in BLOCKS for line in block.splitlines() if line.startswith("iq-export")]


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_parse(line: str) -> None:
    assert parser().parse_args(shlex.split(line)[1:]).command


def test_options_exist() -> None:
    known = {"--system-site-packages"}
    for action in parser()._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]
        known.update(action._option_string_actions)
    ours = [page for page in PAGES if page.stem in ("README", "commands", "measured", "targets")]
    text = "".join(page.read_text(encoding="utf-8") for page in ours)
    shown = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]+", text))
    assert shown <= known


def test_every_command_is_in_the_table() -> None:
    commands = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    for name in commands:
        assert f"`iq-export {name}" in README


def test_exit_codes_are_listed() -> None:
    header = re.search(r"\n(\| 0 \|.*)\n", README)
    assert header is not None
    listed = {int(code) for code in re.findall(r"\d+", header.group(1))}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    real = {kind.exit_code for kind in kinds if issubclass(kind, errors.IqError)}
    assert listed == {0, errors.INTERRUPTED_EXIT_CODE} | real


@pytest.mark.parametrize(("page", "name"), tables())
def test_generated_tables_are_up_to_date(page: Path, name: str) -> None:
    """`python -m tools.readme` writes them."""
    assert part(page, name) == tables()[page, name]


def test_the_readme_is_read_in_a_few_minutes() -> None:
    """Its prose; tables and code are looked up."""
    prose = re.sub(r"```.*?```|<!--.*?-->", "", README, flags=re.DOTALL)
    lines = [line for line in prose.splitlines() if not line.startswith("|")]
    assert len(" ".join(lines).split()) <= 1000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_is_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads}
