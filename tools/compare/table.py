"""The table for people: one row per method and recipe, medians over seeds, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.compare.data import TASKS
from tools.compare.measure import describe
from tools.compare.methods import ALWAYS_FLOAT
from tools.compare.statistics import over_seeds

_TEXT_FIGURES = ("perplexity", "ratio", "kl", "top1")
_TASK_FIGURES = ("accuracy", "difference", "low", "high", "flips")
_NAMED = 6


def summarize(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records of all seeds -> one row per (method, recipe), in their order.

    Each figure is `{"median", "low", "high"}` over the seeds that have it, or None. Without fp32
    among the records there is nothing to compare with, and no rows.
    """
    exact = next((r for r in records if r["method"] == "fp32" and not r["error"]), None)
    if exact is None:
        return []
    groups: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["method"], record["recipe"]), []).append(record)
    return [_row(group, exact) for group in groups.values()]


def _row(group: Sequence[Mapping[str, Any]], exact: Mapping[str, Any]) -> dict[str, Any]:
    first = group[0]
    done = [record for record in group if not record["error"]]
    row: dict[str, Any] = {
        name: first[name] for name in ("method", "kind", "label", "about", "recipe")
    }
    row["simulation"] = first["simulation"]
    row["seeds"] = [record["seed"] for record in done]
    row["errors"] = [record["error"] for record in group if record["error"]]
    described = [describe(record["results"], exact["results"]) for record in done]
    for name in exact["results"]["texts"]:
        row[name] = {f: over_seeds([d[name].get(f) for d in described]) for f in _TEXT_FIGURES}
        row["errors"] += [d[name]["error"] for d in described if "error" in d[name]]
    for name in exact["results"]["tasks"]:
        row[name] = {
            f: over_seeds([d.get(name, {}).get(f) for d in described]) for f in _TASK_FIGURES
        }
    builds = [record["build"] for record in done]
    row["share"] = over_seeds([b["quantized"] / b["linears"] for b in builds])
    row["seconds"] = over_seeds([b["seconds"] for b in builds])
    row["peak_bytes"] = over_seeds([b["peak_bytes"] for b in builds])
    row["left"] = unquantized(builds[0]) if builds else ""
    row["notes"] = sorted({note for b in builds for note in b["notes"]})
    return row


def unquantized(build: Mapping[str, Any]) -> str:
    """What a graph leaves in floating point, counted in the finished file."""
    left = build["left"]
    if len(left) == build["linears"]:
        return "everything"
    if not left:
        return ALWAYS_FLOAT
    named = ", ".join(left[:_NAMED]) + (", ..." if len(left) > _NAMED else "")
    return f"{ALWAYS_FLOAT}, and {len(left)} of {build['linears']} block linears: {named}"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table, and under it what each leaves in floating point."""
    if not rows:
        return "No row is finished."
    texts = text_names(rows[0])
    tasks = [name for name in TASKS if name in rows[0]]
    head = ["method", "recipe", "int8 linears"]
    for name in texts:
        head += [f"{name} ppl", "x fp32", "KL", "top-1"]
    for name in tasks:
        head += [f"{name} acc", "difference [95 %]", "flips"]
    head += ["s", "GB"]
    lines = [_line(head), _line(["---"] * len(head))]
    lines += [_line(_cells(row, texts, tasks)) for row in rows]
    lines += ["", "What each row is, and what it leaves in floating point:", ""]
    for row in rows:
        recipe = f" {row['recipe']}" if row["recipe"] else ""
        notes = "".join(f"; {note}" for note in row["notes"])
        lines.append(f"- **{row['label']}{recipe}**: {row['about']}. Leaves {row['left']}{notes}.")
        lines += [f"  - failed: {error}" for error in dict.fromkeys(row["errors"])]
    return "\n".join(lines)


def text_names(row: Mapping[str, Any]) -> list[str]:
    """The texts that a row has figures of."""
    return [name for name, value in row.items() if isinstance(value, dict) and "ratio" in value]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: Mapping[str, Any], texts: Sequence[str], tasks: Sequence[str]) -> list[str]:
    recipe = row["recipe"] or "-"
    cells = [row["label"], f"{recipe} (simulated)" if row["simulation"] else recipe]
    cells.append(_figure(row["share"], ".1%"))
    for name in texts:
        figures = row[name]
        cells += [_figure(figures["perplexity"], ".3f"), _figure(figures["ratio"], ".4f")]
        cells += [_figure(figures["kl"], ".5f"), _figure(figures["top1"], ".1%")]
    for name in tasks:
        figures = row[name]
        cells.append(_figure(figures["accuracy"], ".1%"))
        cells.append(_interval(figures))
        cells.append(_figure(figures["flips"], ".1%"))
    peak = row["peak_bytes"]
    return [*cells, _median(row["seconds"], ".0f"), _median(peak, ".1f", 1e9)]


def _figure(value: Mapping[str, float] | None, spec: str) -> str:
    """The median; behind it the lowest and highest seed, if they differ."""
    if value is None:
        return "-"
    middle, low, high = (format(value[key], spec) for key in ("median", "low", "high"))
    return middle if low == high else f"{middle} ({low}..{high})"


def _median(value: Mapping[str, float] | None, spec: str, unit: float = 1.0) -> str:
    return "-" if value is None else format(value["median"] / unit, spec)


def _interval(figures: Mapping[str, Any]) -> str:
    """The median seed's difference in points and its interval."""
    if figures["difference"] is None:
        return "-"
    middle, low, high = (100 * figures[key]["median"] for key in ("difference", "low", "high"))
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"
