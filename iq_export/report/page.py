"""What the two pages have in common: one style for light, dark and print, and parts of a page.

A page is one self-contained file: no scripts, nothing that is fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from iq_export.report.heatmap import LEVELS

_LIGHT = {
    "page": "#ffffff", "text": "#1c2026", "sub": "#5a6472", "rule": "#e3e6ea", "box": "#f6f7f9",
    "before": "#c0392b", "after": "#1f78b4", "made": "#2c7a3f",
}  # fmt: skip
_DARK = {
    "page": "#14171c", "text": "#e3e6ea", "sub": "#a0a9b5", "rule": "#323842", "box": "#1d2229",
    "before": "#f0836f", "after": "#6cb4ea", "made": "#7cc98f",
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
tr.ours td { font-weight: 600; }
svg { width: 100%; height: auto; break-inside: avoid; } .grid { stroke: var(--rule); }
.tick { font-size: 11px; fill: var(--sub); } .charts .tick { font-size: 13px; }
.map .tick { font-size: 9px; }
.map .marked { fill: var(--before); font-weight: 700; }
polyline { fill: none; stroke-width: 1.8; }
polyline.before { stroke: var(--before); stroke-width: 4; } polyline.after { stroke: var(--after); }
polyline.made { stroke: var(--made); } circle.made { fill: var(--made); }
circle.before { fill: var(--before); } circle.after { fill: var(--after); }
.key { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem;
       print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.key.before { background: var(--before); } .key.after { background: var(--after); }
.key.made { background: var(--made); }
.legend { font-size: .85rem; margin-top: 0; }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """The whole file, of the sections that there are."""
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title>"
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


def section(title: str, body: str) -> str:
    """`body` under a heading; nothing without one."""
    return f"<h2>{escape(title)}</h2>\n{body}" if body else ""


def paragraph(text: str) -> str:
    """A small one, escaped."""
    return f'<p class="sub">{escape(text)}</p>\n'


def words(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose last column is text."""
    return f'<div class="words">{html_table(header, rows)}</div>'


def listed(items: Iterable[str]) -> str:
    """A list of escaped items; nothing without one."""
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{lines}</ul>" if lines else ""


def number(value: float | None, spec: str) -> str:
    """`value` formatted by `spec`, a dash where there is none."""
    return "-" if value is None else format(value, spec)


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], marked: Iterable[int] = ()
) -> str:
    """An HTML table of escaped cells; the rows numbered in `marked` stand out."""
    highlighted = set(marked)
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = [
        ('<tr class="ours">' if i in highlighted else "<tr>")
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for i, row in enumerate(rows)
    ]
    return f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "</table>"
