"""The parts of a page that say what was found in a model: those of an analysis, and of a bundle's
report beside what was made of it. Records as `iq_export.found` makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from iq_export.report.chart import Series, line_chart
from iq_export.report.findings import blocks_between, large
from iq_export.report.heatmap import heatmap
from iq_export.report.lifecycles import spelled
from iq_export.report.page import html_table, number, paragraph, words

Record = Mapping[str, Any]


def findings_list(found: Sequence[Record]) -> str:
    """What was found, in words."""
    parts = [
        paragraph(
            "A sink is a token whose activations spike far beyond all others'. A lifecycle is one "
            "such spike: a block writes it on a residual channel, it persists through blocks, and "
            "a later one takes it out. Templates are the constant vectors that its tokens are "
            "behind the norms."
        )
    ]
    for finding in found:
        means = "".join(
            f"<dt>{name}</dt><dd>{escape(finding[key])}</dd>"
            for key, name in (("int8", "INT8"), ("fp8", "FP8"), ("half", "Half"))
            if finding[key]
        )
        means = f"<dl>{means}</dl>" if means else ""
        parts.append(f'<div class="finding"><p>{escape(finding["text"])}</p>{means}</div>')
    return "\n".join(parts)


def spikes(record: Record, after: Mapping[str, Sequence[float]] | None = None) -> str:
    """The maps, and the largest values by block; `after` those of the compiled graph, by the names
    of `per_block`."""
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
                *([Series("compiled graph", after[f"{key}_max"], "made")] if after else []),
            ],
            f"largest |{what}|", "block",
        )
        for key, what in (("residual", "residual"), ("down", "down-projection input"))
    ]  # fmt: skip
    lead = paragraph(
        "Each cell is the largest magnitude of one token behind one block, on a logarithmic scale. "
        "Marked tokens belong to a lifecycle. The lines are of all tokens that were looked at."
    )
    return lead + "\n".join(maps) + f"\n{charts(lines)}"


def charts(found: Sequence[str]) -> str:
    """Those that there are, beside each other."""
    parts = "".join(f"<div>{chart}</div>" for chart in found if chart)
    return f'<div class="charts">{parts}</div>' if parts else ""


def channels_table(channels: Sequence[Record]) -> str:
    """The residual channels with the largest values."""
    rows = [
        [str(c["channel"]), large(c["peak"]), str(c["block"]), str(c["position"]),
         f"{c['tokens']:,}", ", ".join(map(str, c["lifecycles"])) or "-"]
        for c in channels
    ]  # fmt: skip
    header = ["residual channel", "largest", "behind block", "at position",
              "tokens whose largest it is", "lifecycle"]  # fmt: skip
    return html_table(header, rows)


def lifecycles_table(lifecycles: Sequence[Record]) -> str:
    """Birth, persistence, death of each."""
    rows = []
    for n, life in enumerate(lifecycles, start=1):
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
    return words(header, rows)


def templates_table(lifecycles: Sequence[Record]) -> str:
    """The constants that stand for each, and how well."""
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
    lead = paragraph(
        "A template is the mean row of a lifecycle's tokens behind each norm. The spread is that "
        "of a template's own tokens; the deviation is of held-out tokens, at the worst norm."
    )
    header = ["lifecycle", "templates", "tokens", "spread", "mean deviation", "largest",
              "so it"]  # fmt: skip
    return lead + words(header, rows)


def in_float_table(left: Sequence[Record]) -> str:
    """Products that no recipe quantizes."""
    if not left:
        return "<p>Every product of every block can be quantized.</p>"
    rows = [[entry["node"], entry["reason"]] for entry in left]
    lead = paragraph(
        "Norms, softmax, the residual stream and the embedding are no products and stay in half "
        "precision in every recipe. Of the products these stay:"
    )
    return lead + words(["node", "why"], rows)
