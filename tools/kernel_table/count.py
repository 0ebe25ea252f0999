"""What a kernel costs per element of its row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iq_export.errors import DataError
from tools.kernel_table.build import Compiled
from tools.kernel_table.launch import arguments, launch
from tools.kernel_table.machine import Memory, Thread, Trace
from tools.kernel_table.rows import Row, rows

# Kinds of instructions that a processor issues more slowly than others, and what they are.
KINDS = {
    "MUFU": ("MUFU",),
    "conversions": ("F2I", "F2IP", "I2F", "F2F", "FRND"),
    "shuffles": ("SHFL",),
}
# Of the first warp: between them every bit of a thread's number is 0 and 1.
_FIRST, _LAST = 0, 31


def measured(
    kernels: Mapping[str, Compiled], plugins: Path, architecture: int
) -> dict[str, dict[str, Any]]:
    """The figures of every row, by its label."""
    return {row.label: figures(row, kernels, plugins, architecture) for row in rows()}


def figures(
    row: Row, kernels: Mapping[str, Compiled], plugins: Path, architecture: int
) -> dict[str, Any]:
    name, kernel = _one(row, kernels)
    given = arguments(plugins, row.kernel)
    traces, shared = [], Memory()
    for number in (_FIRST, _LAST):
        bank, memory, _ = launch(given, row.values, architecture, row.threads)
        traces.append(Thread(kernel.code, bank, memory, shared, number).run())
    issued, accesses = _together(traces)
    names: Counter[str] = Counter()
    calls = 0
    for position, times in issued.items():
        instruction = kernel.code.instructions[position]
        names[instruction.name] += times
        # The compiler also calls what is a label of the kernel itself: a branch.
        calls += times if instruction.name == "CALL" and "`($" in instruction.operands[-1] else 0
    each = row.elements / row.threads
    found: dict[str, Any] = {
        "kernel": name, "registers": kernel.registers, "spilled": kernel.spilled,
        "stack": kernel.stack, "shared": kernel.shared,
        "instructions": round(sum(names.values()) / each, 2),
    }  # fmt: skip
    for kind, members in KINDS.items():
        found[kind] = round(sum(names[member] for member in members) / each, 3)
    found["barriers"] = names["BAR"]
    found["calls"] = calls
    for kind in ("LDG", "STG", "LDL", "STL"):
        found[kind] = {
            str(size): times for (access, size), times in sorted(accesses.items()) if access == kind
        }
    return found


def _together(traces: list[Trace]) -> tuple[Counter[int], Counter[tuple[str, int]]]:
    """What their warp issues: each instruction as often as the thread that needs it most."""
    issued: Counter[int] = Counter()
    accesses: Counter[tuple[str, int]] = Counter()
    for trace in traces:
        issued |= trace.executed
        accesses |= trace.accesses
    return issued, accesses


def _one(row: Row, kernels: Mapping[str, Compiled]) -> tuple[str, Compiled]:
    matching = [name for name in kernels if re.search(row.pattern, name)]
    if len(matching) != 1:
        same = sorted(name for name in kernels if row.kernel in name)
        raise DataError(
            f"row '{row.label}': '{row.pattern}' matches {len(matching)} kernels instead of one; "
            f"there are {', '.join(same) or 'none of that name'}."
        )
    return matching[0], kernels[matching[0]]
