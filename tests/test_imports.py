"""Imports point one way: from the command line down to the graph, and never in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import iq_export

ROOT = Path(iq_export.__file__).parent
# Each may import what stands before it, and its own row. `sinks/ops.py` tells what the ops are,
# which whoever reads a graph must know.
ROWS = (
    "errors", "files", "graph sinks.ops", "formats", "recipe", "run", "observe", "sinks",
    "decisions", "passes", "evaluate", "decide", "ship", "saved_decisions", "pipeline carry",
    "found", "baselines plan", "fill", "compile", "references analyze", "cli",
)  # fmt: skip
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row.split()}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {
                a.name.partition(".")[2] for a in node.names if a.name.startswith("iq_export.")
            }
        elif (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").partition(".")[0] == "iq_export"
        ):
            name = str(node.module).partition(".")[2]
            inside = {f"{name}.{alias.name}".lstrip(".") for alias in node.names}
            found |= inside & set(MODULES) or {name} - {""}
    return found


EDGES = {name: imported(path) for name, path in MODULES.items()}


def rank(module: str) -> int | None:
    return RANK.get(module, RANK.get(module.partition(".")[0]))


def test_every_row_is_there() -> None:
    known = {*MODULES, *(name.partition(".")[0] for name in MODULES)}
    assert set(RANK) <= known


def test_imports_point_one_way() -> None:
    against = [
        f"{module} imports {other}"
        for module, others in EDGES.items()
        for other in others
        if (mine := rank(module)) is not None and (its := rank(other)) is not None and its > mine
    ]
    assert against == []


def test_no_file_imports_itself_by_a_detour() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in sorted(EDGES.get(module, ())):
                visit(other, (*way, module))
            done.add(module)

    for module in sorted(MODULES):
        visit(module, ())
