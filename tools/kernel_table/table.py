"""The tables of docs/kernels.md, between two marks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.pages import fill

# What the last table is of: the accesses and the slow instructions hardly differ.
_DETAILED = "87"


def tables(record: Mapping[str, Any]) -> str:
    before, after = record["before"]["figures"], record["after"]["figures"]
    labels = list(after[_DETAILED])

    def cells(label: str, architectures: Iterable[str], show: Callable[[Any], str]) -> list[str]:
        found = []
        for sm in architectures:
            now = show(after[sm][label])
            was = show(before[sm][label]) if label in before[sm] else "-"
            found.append(now if was == now else f"{was} → {now}")
        return found

    by_architecture = _line("kernel", *(f"sm_{sm}" for sm in after))
    # One row for several of the same kernel.
    kernels = {after[_DETAILED][label]["kernel"]: label for label in reversed(labels)}
    columns: dict[str, Callable[[Any], str]] = {
        "MUFU": lambda f: f"{f['MUFU']:.2f}",
        "conversions": lambda f: f"{f['conversions']:.2f}",
        "shuffles": lambda f: f"{f['shuffles']:.2f}",
        "barriers": lambda f: str(f["barriers"]),
        "shared bytes": lambda f: str(f["shared"]),
        "loads": lambda f: _accesses(f["LDG"]),
        "stores": lambda f: _accesses(f["STG"]),
    }
    return "\n".join(
        [
            f"Before is commit {record['before']['commit']}, with nvcc {record['before']['nvcc']}; "
            f"after is this one, with nvcc {record['after']['nvcc']}. One number: nothing changed.",
            "", "Instructions per element:", "", *by_architecture,
            *(_row(label, cells(label, after, lambda f: f"{f['instructions']:.1f}"))
              for label in labels),
            "", "Registers per thread:", "", *by_architecture,
            *(_row(label, cells(label, after, lambda f: str(f["registers"])))
              for label in reversed(kernels.values())),
            "", f"On sm_{_DETAILED}: MUFU, conversions and shuffles per element, barriers per row, "
            "loads and stores per thread:", "", *_line("kernel", *columns),
            *(_row(label, [cell for show in columns.values()
                           for cell in cells(label, [_DETAILED], show)])
              for label in labels),
            "", *_spilled("before", record["before"]), *_spilled("after", record["after"]),
        ]
    ).rstrip()  # fmt: skip


def _row(label: str, cells: Sequence[str]) -> str:
    return f"| {label} | {' | '.join(cells)} |"


def _line(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _accesses(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{times} x {size} B" for size, times in widths.items()) or "none"


def _spilled(when: str, record: Mapping[str, Any]) -> list[str]:
    """Of all kernels, not only of the rows."""
    found = [
        f"- `{name}` on sm_{sm}: {size} bytes"
        for sm, kernels in record["spilled"].items()
        for name, size in kernels.items()
    ]
    if not found:
        return [f"No kernel spills a register {when}.", ""]
    return [f"Kernels that spill {when} (bytes of the loads and stores in their code):", "",
            *found, ""]  # fmt: skip


def write_tables(record: Mapping[str, Any], page: Path) -> None:
    """Replace what stands between the marks of `page`."""
    fill(page, "measured", tables(record))
