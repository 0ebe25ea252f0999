"""The tables of docs/discovery.md, between two marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.pages import fill


def tables(found: dict[str, Any]) -> str:
    lines = [
        f"{found['recalled']} of {found['lifecycles']} planted lifecycles are recalled "
        f"({found['recall']:.2%}); {found['false alarms']} of {found['models without spikes']} "
        "models without spikes raise an alarm.",
        "",
        "| wrong | lifecycles |",
        "|---|---|",
        *(f"| {fault} | {number} |" for fault, number in found["faults"].items()),
        f"| additional lifecycle (models) | {found['models with additional lifecycles']} |",
    ]
    for title, what in (("by size", "spike"), ("by kind", "kind of model")):
        lines += ["", f"| {what} | recalled |", "|---|---|"]
        lines += [f"| {name} | {a} of {n} |" for name, (a, n) in found[title].items() if n]
    lines += ["", "| model without spikes | false alarms |", "|---|---|"]
    lines += [f"| {name} | {a} of {n} |" for name, (a, n) in found["false alarms by kind"].items()]
    return "\n".join(lines)


def write_tables(found: dict[str, Any], page: Path) -> None:
    """Replace what stands between the marks of `page`."""
    fill(page, "measured", tables(found))
