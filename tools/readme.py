"""Write the generated tables of the documents: python -m tools.readme

README.md has the options of `compile`, docs/commands.md those of the other commands, and
docs/targets.md the targets.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from iq_export.cli import parser
from iq_export.engine.targets import SINGLE_OPS_TENSORRT, TARGETS
from iq_export.options import markdown
from tools.pages import fill

ROOT = Path(__file__).parents[1]
README, COMMANDS = ROOT / "README.md", ROOT / "docs" / "commands.md"
DEVICES = ROOT / "docs" / "targets.md"
# Every command has these, which the README says once.
_COMMON = ("help", "json", "verbose", "quiet")


def tables() -> dict[tuple[Path, str], str]:
    """(page, name of its marks) -> what belongs there."""
    return {
        (README, "options"): markdown(),
        (COMMANDS, "options"): other_commands(),
        (DEVICES, "targets"): targets(),
    }


def targets() -> str:
    """Every target, with the TensorRT that builds for it."""
    lines = ["| target | GPUs | compute capability | built by | |", "|---|---|---|---|---|"]
    for target in TARGETS.values():
        capabilities = ", ".join(f"sm_{sm}" for sm in target.compute_capabilities)
        builder = "TensorRT for RTX" if target.portable else "TensorRT"
        oldest = ".".join(map(str, target.tensorrt))
        refused = target.tensorrt and target.tensorrt < SINGLE_OPS_TENSORRT
        lines.append(
            f"| `{target.name}` | {target.device} | {capabilities} | {builder} {oldest}".rstrip()
            + f" | {'refused' if refused else ''} |"
        )
    return "\n".join(lines)


def other_commands() -> str:
    """The options of every command but `compile`, as its parser has them."""
    lines = ["| command | option | default | |", "|---|---|---|---|"]
    for name, command in _commands().items():
        for group in command._action_groups if name != "compile" else []:
            lines += [
                f"| {name} | {_cells(action, group.title or '')} |"
                for action in group._group_actions
                if action.option_strings and action.dest not in _COMMON
            ]
    return "\n".join(lines)


def _commands() -> dict[str, argparse.ArgumentParser]:
    (subparsers,) = parser()._subparsers._group_actions  # type: ignore[union-attr]
    return dict(subparsers.choices)  # type: ignore[arg-type]


def _cells(action: argparse.Action, title: str) -> str:
    value = action.metavar or "|".join(map(str, action.choices or ()))
    if not value and action.nargs != 0:
        value = action.dest.upper()
    default = action.default
    shown = "" if default in (None, "", 0) and not isinstance(default, float) else str(default)
    help = (action.help or title).replace("%(default)s", str(default))
    cells = (f"`{action.option_strings[0]}{value and f' {value}'}`", shown and f"`{shown}`", help)
    return " | ".join(cell.replace("|", "\\|") for cell in cells)


def main() -> None:
    """Rewrite the pages."""
    for (page, name), text in tables().items():
        fill(page, name, text)


if __name__ == "__main__":
    main()
