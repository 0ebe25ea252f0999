"""The page of `iq-export analyze`: one self-contained file that says where a model spikes and what
that costs, before anything is compiled. Everything comes from the record that lies beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from iq_export.report.chart import Series, line_chart
from iq_export.report.findings import PLACES, blocks_between, large
from iq_export.report.heatmap import LEVELS, heatmap
from iq_export.report.html import html_table, number
from iq_export.report.lifecycles import spelled

Record = Mapping[str, Any]

# Rows shown before the fold: inputs that lose most to spikes.
_SHOWN = 12

_LIGHT = {
    "page": "#ffffff", "text": "#1c2026", "sub": "#5a6472", "rule": "#e3e6ea", "box": "#f6f7f9",
    "before": "#c0392b", "after": "#1f78b4",
}  # fmt: skip
_DARK = {
    "page": "#14171c", "text": "#e3e6ea", "sub": "#a0a9b5", "rule": "#323842", "box": "#1d2229",
    "before": "#f0836f", "after": "#6cb4ea",
}  # fmt: skip
_LIGHT_RAMP = ("#f0f4fa", "#dbe7f5", "#bfd5ee", "#9dbfe5", "#76a5d9", "#5189c8", "#336db0",
               "#1f5293", "#123a70", "#08234a")  # fmt: skip
_DARK_RAMP = ("#1b2530", "#1e3146", "#224060", "#29527e", "#34689d", "#4581bb", "#629dd4",
              "#8abae6", "#b9d7f3", "#ecf5fd")  # fmt: skip

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem;
       color: var(--text); background: var(--page); }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
table { border-collapse: collapse; font-size: .88rem; display: block; overflow-x: auto; }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child, .words th:last-child, .words td:last-child { text-align: left; }
@media print { table { font-size: .7rem; } th, td { padding: .1rem .35rem; }
               body { max-width: none; margin: 0; } }
code, .sub { color: var(--sub); }
.finding { background: var(--box); border-left: 3px solid var(--after); padding: .5rem .9rem;
           margin: .7rem 0; break-inside: avoid; }
.finding p { margin: 0; }
.finding dl { margin: .35rem 0 0; display: grid; grid-template-columns: 3.2rem 1fr; gap: .1rem; }
.finding dt { font-weight: 600; font-size: .85rem; } .finding dd { margin: 0; font-size: .9rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(27rem, 1fr)); gap: 0 1rem; }
svg { width: 100%; height: auto; break-inside: avoid; } .grid { stroke: var(--rule); }
.tick { font-size: 11px; fill: var(--sub); } .charts .tick { font-size: 13px; }
.map .tick { font-size: 9px; }
.map .marked { fill: var(--before); font-weight: 700; }
polyline { fill: none; stroke-width: 1.8; }
polyline.before { stroke: var(--before); stroke-width: 4; } polyline.after { stroke: var(--after); }
circle.before { fill: var(--before); } circle.after { fill: var(--after); }
.key { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem;
       print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.key.before { background: var(--before); } .key.after { background: var(--after); }
.legend { font-size: .85rem; margin-top: 0; }
"""


def render(record: Record) -> str:
    """The page as text; `record` as `iq_export.analyze` makes it."""
    sections = [
        _head(record),
        _section("Findings", _findings(record["findings"])),
        _section("Where it spikes", _map(record)),
        _section("Largest channels", _channels(record["channels"])),
        _section("Birth, persistence, death", _lifecycles(record)),
        _section("Templates", _templates(record["lifecycles"])),
        _section("Ranges with and without sinks", _ranges(record)),
        _section("What attention does with sinks", _attention(record["attention"])),
        _section("What stays in float", _in_float(record["in_float"])),
        _section("Notes", _list([*record["warnings"], *record["notes"]])),
        _section("How it was made", _made(record)),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(record['model'])}: analysis</title>"
        f"<style>{_style()}</style></head><body>\n{body}\n</body></html>\n"
    )


def _style() -> str:
    """Paper is white whatever the screen is."""

    def variables(colours: Mapping[str, str], ramp: Sequence[str]) -> str:
        pairs = [*colours.items(), *((f"h{level}", colour) for level, colour in enumerate(ramp))]
        return ":root { " + " ".join(f"--{name}: {colour};" for name, colour in pairs) + " }"

    levels = " ".join(f".h{level} {{ fill: var(--h{level}); }}" for level in range(LEVELS))
    dark = variables(_DARK, _DARK_RAMP)
    return (
        f"{variables(_LIGHT, _LIGHT_RAMP)}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ {dark} }}\n{levels}{_STYLE}"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}" if body else ""


def _paragraph(text: str) -> str:
    return f'<p class="sub">{escape(text)}</p>\n'


def _head(record: Record) -> str:
    options = record["options"]
    seen = (
        f"{record['blocks']} blocks of {record['hidden']} channels, looked at on "
        f"{record['tokens']:,} tokens of {options['calibration']} (seed {options['seed']}), in "
        "float32, with nothing changed"
    )
    return f'<h1>{escape(record["model"])}</h1>\n<p class="sub">{escape(seen)}</p>'


def _findings(found: Sequence[Record]) -> str:
    parts = []
    for finding in found:
        means = "".join(
            f"<dt>{name}</dt><dd>{escape(finding[key])}</dd>"
            for key, name in (("int8", "INT8"), ("fp8", "FP8"), ("half", "Half"))
            if finding[key]
        )
        means = f"<dl>{means}</dl>" if means else ""
        parts.append(f'<div class="finding"><p>{escape(finding["text"])}</p>{means}</div>')
    return "\n".join(parts)


def _map(record: Record) -> str:
    sample, blocks = record["sample"], record["per_block"]
    marked = {x for x, life in enumerate(sample["lifecycle"]) if life}
    axes = ("tokens of one window, in order", "block")
    maps = [
        f"<h3>{escape(title)}</h3>\n"
        + heatmap(sample[key], sample["tokens"], f"largest |{what}|", axes, marked=marked)
        for title, key, what in (
            ("Residual stream after each block", "residual_max", "residual"),
            ("What each down-projection reads", "down_max", "down-projection input"),
        )
    ]
    lines = [
        line_chart(
            [
                Series("largest of all tokens", blocks[f"{key}_max"], "before"),
                Series("without tokens that spike", blocks[f"{key}_max_without"], "after"),
            ],
            f"largest |{what}|", "block",
        )
        for key, what in (("residual", "residual"), ("down", "down-projection input"))
    ]  # fmt: skip
    lead = _paragraph(
        "Each cell is the largest magnitude of one token behind one block, on a logarithmic scale. "
        "Marked tokens belong to a lifecycle. The lines are of all tokens that were looked at."
    )
    return lead + "\n".join(maps) + f'\n<div class="charts">{"".join(_each(lines))}</div>'


def _each(charts: Sequence[str]) -> list[str]:
    return [f"<div>{chart}</div>" for chart in charts if chart]


def _channels(channels: Sequence[Record]) -> str:
    rows = [
        [str(c["channel"]), large(c["peak"]), str(c["block"]), str(c["position"]),
         f"{c['tokens']:,}", ", ".join(map(str, c["lifecycles"])) or "-"]
        for c in channels
    ]  # fmt: skip
    header = ["residual channel", "largest", "behind block", "at position",
              "tokens whose largest it is", "lifecycle"]  # fmt: skip
    return html_table(header, rows)


def _lifecycles(record: Record) -> str:
    rows = []
    for n, life in enumerate(record["lifecycles"], start=1):
        births = ", ".join(str(site["block"]) for site in life["sites"])
        tokens = ", ".join(
            f"{spelled(entry['token'])} ({entry['first'] + entry['later']})"
            for entry in life["common_tokens"]
        )
        rows.append([
            str(n), births, blocks_between(life["birth"] + 1, life["end"]),
            number(life["death"], "d"),
            str(life["channel"]), f"{life['tokens']:,}", f"{life['at_position_0']:.0%}",
            large(life["down_proj_peak"]), number(life["down_proj_median"], ".2g"),
            large(life["residual_peak"]), tokens,
        ])  # fmt: skip
    if not rows:
        return "<p>None: no token leaves the others.</p>"
    header = ["lifecycle", "birth", "persists in", "death", "channel", "tokens", "at position 0",
              "down-projection input up to", "its median", "residual up to",
              "most often"]  # fmt: skip
    return _words(header, rows)


def _templates(lifecycles: Sequence[Record]) -> str:
    rows = []
    for n, life in enumerate(lifecycles, start=1):
        if life.get("templates") is None:
            rows.append([str(n), "0", "-", "-", "-", "-", life["reason"]])
            continue
        worst = max(life["deviation_max_per_norm"].values(), default=0.0)
        rows.append([
            str(n), str(life["templates"]), ", ".join(map(str, life["template_tokens"])),
            ", ".join(f"{spread:.1%}" for spread in life["template_spread"]),
            f"{life['deviation']:.1%}", f"{worst:.0%}",
            f"{'can be replaced' if life['replaced'] else 'stays'}: {life['reason']}",
        ])  # fmt: skip
    if not rows:
        return ""
    lead = _paragraph(
        "A template is the mean row of a lifecycle's tokens behind each norm. The spread is that "
        "of a template's own tokens; the deviation is of held-out tokens, at the worst norm."
    )
    header = ["lifecycle", "templates", "tokens", "spread", "mean deviation", "largest",
              "so it"]  # fmt: skip
    return lead + _words(header, rows)


def _ranges(record: Record) -> str:
    products = record["products"]
    charts = []
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
            charts.append(f"<h3>{escape(title)}</h3>{chart}")
    lead = _paragraph(
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
    return lead + f'<div class="charts">{"".join(_each(charts))}</div>\n{text}'


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
    lead = _paragraph(
        "Attention: the share that other tokens behind a sink give to sinks. Queries: the share "
        "that points towards a sink's key, and the mean cosine. Alike: mean cosine of two sinks' "
        "rows before and keys after the key's product (before the rotary embedding), in brackets "
        "of two other tokens. Values: their length over that of others'. Energy: the share of a "
        "row on the half of the value weight's directions that it amplifies most, in brackets "
        "of other tokens. Columns have the median of the heads, and from the least to the most."
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
            _beside(upper.get("sinks"), upper.get("others"), ".1%"),
        ])  # fmt: skip
    header = ["block", "attention on sinks", "queries towards", "cosine", "rows alike",
              "keys alike", "values' length", "energy"]  # fmt: skip
    return f"{picture}\n{html_table(header, rows)}"


def _spread(values: Sequence[float], spec: str) -> str:
    middle, low, high = (
        format(value, spec) for value in (float(np.median(values)), min(values), max(values))
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def _beside(value: float | None, other: float | None, spec: str) -> str:
    return f"{number(value, spec)} ({number(other, spec)})"


def _in_float(left: Sequence[Record]) -> str:
    if not left:
        return "<p>Every product of every block can be quantized.</p>"
    rows = [[entry["node"], entry["reason"]] for entry in left]
    lead = _paragraph(
        "Norms, softmax, the residual stream and the embedding are no products and stay in half "
        "precision in every recipe. Of the products these stay:"
    )
    return lead + _words(["node", "why"], rows)


def _words(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose last column is text."""
    return f'<div class="words">{html_table(header, rows)}</div>'


def _made(record: Record) -> str:
    options, windows = record["options"], record["windows"]
    lines = [
        f"{windows['long']} windows of {options['length']} tokens and {windows['short']} short "
        "ones, with and without BOS",
        f"a spike that varies by more than {options['max_relative_deviation']:.0%} is not replaced",
        f"{record['seconds']['total']:.0f} s, {record['peak_rss_bytes'] / 1e9:.2f} GB of memory",
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    ]
    return _list(lines)


def _list(items: Sequence[str]) -> str:
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{lines}</ul>" if lines else ""
