"""The tables of docs/families.md, between two marks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tools.families.judge import COMPILES, CONFIGURATION, OUTCOMES, REFUSED, TARGET, Row
from tools.families.record import Record
from tools.pages import fill

# Types whose layers, all or some, carry a state of fixed size from token to token in place of keys
# and values. They count in no share.
RECURRENT = frozenset((
    "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba",
    "kimi_linear", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5",
    "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp",
    "qwen4_exp_text", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
))  # fmt: skip
_LEAST_SHARE = 0.95
_PREFIX = re.compile(r"^\S+ has architecture '[^']*', (?:which is not supported: )?")


def tables(record: Record) -> str:
    """The summary, what compiles, and why the others do not."""
    counted = {kind: row for kind, row in record.rows.items() if kind not in RECURRENT}
    others = {kind: row for kind, row in record.rows.items() if kind in RECURRENT}
    done = {kind: row for kind, row in counted.items() if row["outcome"] == COMPILES}
    left = {kind: row for kind, row in counted.items() if row["outcome"] != COMPILES}
    lines = [
        f"transformers {record.transformers} has {len(record.rows)} types of causal LMs, "
        f"{len(others)} of them recurrent.",
        "",
        "| | types | recurrent ones |",
        "|---|---|---|",
        *(
            f"| {outcome} | {_share(counted.values(), outcome)} | {_count(others, outcome)} |"
            for outcome in OUTCOMES
        ),
        f"| compiles with {_LEAST_SHARE:.0%} of its block products in int8 | "
        f"{sum(_is_quantized(row) for row in done.values())} | |",
        f"| compiles, with an engine for {TARGET} | "
        f"{sum(not row['engine'] for row in done.values())} | |",
        "",
        "| compiles | block products in int8 | off by | in multiples of float32's own error | "
        f"engine for {TARGET} |",
        "|---|---|---|---|---|",
        *(
            f"| {kind} | {row['int8']} of {row['products']} | {row['parity']:.1e} | "
            f"{row['noise_ratio']:.1f} | {row['engine'] or 'built'} |"
            for kind, row in done.items()
        ),
    ]
    for title, rows in (("type", left), ("recurrent type", others)):
        lines += ["", f"| {title} | | when | why |", "|---|---|---|---|"]
        lines += [
            f"| {kind} | {row['outcome']} | {_when(row)} | {_why(row)} |"
            for kind, row in rows.items()
        ]
    return "\n".join(lines)


def write_page(record: Record, page: Path) -> None:
    """Replace what stands between the marks of `page`."""
    fill(page, "families", tables(record))


def _share(rows: Iterable[Row], outcome: str) -> str:
    found = [row["outcome"] == outcome for row in rows]
    return f"{sum(found)} of {len(found)}"


def _count(rows: dict[str, Row], outcome: str) -> int:
    return sum(row["outcome"] == outcome for row in rows.values())


def _is_quantized(row: Row) -> bool:
    return bool(row["int8"] >= _LEAST_SHARE * row["products"])


def _when(row: Row) -> str:
    """The step in which it ended."""
    step = row.get("step", "")
    return "at once" if row["outcome"] == REFUSED and step == CONFIGURATION else step.lower()


def _why(row: Row) -> str:
    reason = _PREFIX.sub("", row.get("reason", "")).replace("|", "\\|").replace("\n", " ")
    reason = re.sub("^whose ", "its ", reason)
    return reason[:1].lower() + reason[1:]
