"""What README.md shows exists: examples parse, options are options, exit codes are real."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from iq_export import errors
from iq_export.cli import parser
from tools.pages import part
from tools.readme import tables

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\n(.*?)```", README, re.DOTALL)
EXAMPLES = [line for block in BLOCKS for line in block.splitlines() if line.startswith("iq-export")]


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_parse(line: str) -> None:
    assert parser().parse_args(shlex.split(line)[1:]).command


def test_options_exist() -> None:
    known = {"--system-site-packages"}
    for action in parser()._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]
        known.update(action._option_string_actions)
    shown = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]+", README))
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
