"""The page of `iq-export analyze`: one self-contained file that says where a model spikes and what
that costs, before anything is compiled. Everything comes from the record that lies beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from iq_export.report.chart import Series, line_chart
from iq_export.report.findings import PLACES, large
from iq_export.report.found import (
    channels_table,
    charts,
    findings_list,
    in_float_table,
    lifecycles_table,
    spikes,
    templates_table,
)
from iq_export.report.heatmap import heatmap
from iq_export.report.page import html_table, listed, number, page, paragraph, section

Record = Mapping[str, Any]

# Rows shown before the fold: inputs that lose most to spikes.
_SHOWN = 12


def render(record: Record) -> str:
    """The page as text; `record` as `iq_export.analyze` makes it."""
    sections = [
        _head(record),
        section("Findings", findings_list(record["findings"])),
        section("Where it spikes", spikes(record)),
        section("Largest channels", channels_table(record["channels"])),
        section("Birth, persistence, death", lifecycles_table(record["lifecycles"])),
        section("Templates", templates_table(record["lifecycles"])),
        section("Ranges with and without sinks", _ranges(record)),
        section("What attention does with sinks", _attention(record["attention"])),
        section("What stays in float", in_float_table(record["in_float"])),
        section("Notes", listed([*record["warnings"], *record["notes"]])),
        section("How it was made", _made(record)),
    ]
    return page(f"{record['model']}: analysis", sections)


def _head(record: Record) -> str:
    options = record["options"]
    seen = (
        f"{record['blocks']} blocks of {record['hidden']} channels, looked at on "
        f"{record['tokens']:,} tokens of {options['calibration']} (seed {options['seed']}), in "
        "float32, with nothing changed"
    )
    return f'<h1>{escape(record["model"])}</h1>\n<p class="sub">{escape(seen)}</p>'


def _ranges(record: Record) -> str:
    products = record["products"]
    lines = []
    for place, title in PLACES.items():
        here = [p for p in products if p["place"] == place]
        chart = line_chart(
            [
                Series("all tokens", [p["int8_error"] for p in here], "before"),
                Series("without sinks", [p["int8_error_without"] for p in here], "after"),
            ],
            "rounding error / typical value", "block",
        )  # fmt: skip
        if chart:
            lines.append(f"<h3>{escape(title)}</h3>{chart}")
    lead = paragraph(
        "What rounding to a static int8 range adds to a typical value (the root mean square of "
        "tokens that do not spike); at 1 nothing of it is left. Estimated as a step / sqrt(12), "
        "with the whole range, nothing clipped, smoothed or rotated."
    )
    ordered = sorted(products, key=lambda p: p["int8_error_without"] - p["int8_error"])
    rows = [
        [p["input"], str(p["block"]), large(p["absmax"]), large(p["absmax_without"]),
         number(p["typical"], ".3g"), number(p["int8_error"], ".1%"),
         number(p["int8_error_without"], ".1%"), ", ".join(map(str, p["lifecycles"])) or "-"]
        for p in ordered
    ]  # fmt: skip
    header = ["input", "block", "range", "without sinks", "typical", "int8 error",
              "without sinks", "lifecycles"]  # fmt: skip
    text = html_table(header, rows[:_SHOWN])
    if rows[_SHOWN:]:
        more = html_table(header, rows[_SHOWN:])
        text += f"\n<details><summary>{len(rows) - _SHOWN} more</summary>\n{more}</details>"
    return f"{lead}{charts(lines)}\n{text}"


def _attention(attention: Sequence[Record]) -> str:
    parts = []
    for each in attention:
        blocks = each["blocks"]
        if each["not_understood"]:
            parts.append(
                f"<p>Lifecycle {each['lifecycle']}: the attention of block "
                f"{', '.join(map(str, each['not_understood']))} is no single operation, so its "
                "heads were not looked at.</p>"
            )
        if blocks:
            parts.append(f"<h3>Lifecycle {each['lifecycle']}</h3>\n{_heads(blocks)}")
    if not parts:
        return ""
    lead = paragraph(
        "Attention: the share that other tokens behind a sink give to sinks. Queries: the share "
        "that points towards a sink's key, and the mean cosine. Alike: mean cosine of two sinks' "
        "rows before and keys after the key's product (before the rotary embedding), in brackets "
        "of two other tokens. Values: their length over that of others'. Energy: the share of a "
        "row on the half of the value weight's directions that it amplifies most, in brackets "
        "of other tokens. Rotary: of the products that point towards a sink, the share of the "
        "slowest quarter of the rotary pairs, and of the one pair that gives most. Columns have "
        "the median of the heads, and from the least to the most."
    )
    return lead + "\n".join(parts)


def _heads(blocks: Sequence[Record]) -> str:
    mass = [block["mass"] for block in blocks]
    names = [str(head) for head in range(len(mass[0]))]
    numbers = [block["block"] for block in blocks]
    even = all(len(row) == len(names) for row in mass)
    joined = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    picture = (
        heatmap(
            mass, names, "attention on sinks", ("heads", "block"), limits=(0.0, 1.0),
            first=numbers[0],
        )
        if even and joined else ""
    )  # fmt: skip
    rows = []
    for block in blocks:
        spectrum = block["spectrum"] or {}
        upper = {name: float(np.median(found["upper"])) for name, found in spectrum.items()}
        keys, others = block["keys_alike"], block["keys_alike_others"]
        rows.append([
            str(block["block"]), _spread(block["mass"], ".0%"), _spread(block["aligned"], ".0%"),
            _spread(block["query_cosine"], ".2f"),
            _beside(block["rows_alike"], block["rows_alike_others"], ".2f"),
            _beside(None if keys is None else float(np.median(keys)),
                    None if others is None else float(np.median(others)), ".2f"),
            _spread(block["value_ratio"], ".2g"),
            _beside(upper.get("sinks"), upper.get("others"), ".1%"), _rotary(block),
        ])  # fmt: skip
    header = ["block", "attention on sinks", "queries towards", "cosine", "rows alike",
              "keys alike", "values' length", "energy", "rotary"]  # fmt: skip
    return f"{picture}\n{html_table(header, rows)}"


def _spread(values: Sequence[float], spec: str) -> str:
    middle, low, high = (
        format(value, spec) for value in (float(np.median(values)), min(values), max(values))
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def _rotary(block: Record) -> str:
    if not block.get("zones"):
        return "-"
    slow = float(np.median([zones[-1] for zones in block["zones"]]))
    return f"{slow:.0%}, {float(np.median(block['pair_share'])):.0%}"


def _beside(value: float | None, other: float | None, spec: str) -> str:
    return f"{number(value, spec)} ({number(other, spec)})"


def _made(record: Record) -> str:
    options, windows = record["options"], record["windows"]
    lines = [
        f"{windows['long']} windows of {options['length']} tokens and {windows['short']} short "
        "ones, with and without BOS",
        f"a spike that varies by more than {options['max_relative_deviation']:.0%} is not replaced",
        f"{record['seconds']['total']:.0f} s, {record['peak_rss_bytes'] / 1e9:.2f} GB of memory",
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    ]
    return listed(lines)
