"""`report.html`: one self-contained page that says why the model broke and what was done about it.

Everything comes from the manifest and `plan.json`; parts that they lack are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from iq_export.bundle.lock import Say, quiet
from iq_export.bundle.manifest import Manifest, reading_records, write_atomically
from iq_export.bundle.package import Bundle, update_manifest
from iq_export.bundle.update import bundle_lock
from iq_export.options import CompileOptions
from iq_export.report.chart import Series, line_chart
from iq_export.report.findings import findings
from iq_export.report.found import (
    findings_list,
    in_float_table,
    lifecycles_table,
    spikes,
    templates_table,
)
from iq_export.report.lifecycles import describe_lifecycle
from iq_export.report.page import html_table, listed, number, page, section

REPORT_NAME = "report.html"

# Quantizers shown before the fold: those that the rewrite changed most.
_SHOWN_QUANTIZERS = 12


def write_report(manifest: Manifest, plan: Mapping[str, Any], path: Path) -> Path:
    """Write the page for `manifest` and the content of `plan.json` to `path`, atomically."""
    write_atomically(path, render(manifest, plan))
    return path


def check_report(bundle: Bundle) -> None:
    """BundleError if the report cannot be made anew: before the work that is to go into it."""
    if REPORT_NAME in bundle.manifest.files:
        _render(bundle, bundle.manifest)


def update_with_report(
    bundle: Bundle,
    *,
    new: Mapping[str, Path | str] | None = None,
    drop: Sequence[str] = (),
    say: Say = quiet,
    **changes: Any,
) -> Bundle:
    """`bundle.package.update_manifest`, and the bundle's report, if it has one, made anew."""
    with bundle_lock(bundle.folder, say):
        now = Bundle.open(bundle.folder, verify=False)
        new = dict(new or {})
        if REPORT_NAME in now.manifest.files:
            new[REPORT_NAME] = _render(now, replace(now.manifest, **changes))
        return update_manifest(bundle, new=new, drop=drop, **changes)


def _render(bundle: Bundle, manifest: Manifest) -> str:
    plan = bundle.plan()
    with reading_records(bundle.folder):
        return render(manifest, plan)


def render(manifest: Manifest, plan: Mapping[str, Any]) -> str:
    """The page as text."""
    found = plan.get("found")
    lives = manifest.graph.lifecycles or plan.get("lifecycles") or []
    said = found and findings({**found, "lifecycles": lives, "options": _limits(manifest)})
    sections = [
        _head(manifest),
        section("Accuracy", _accuracy(manifest)),
        section("Findings", findings_list(said) if said else ""),
        _largest(plan, bool(lives)),
        section("Sink lifecycles", _lifecycles(lives)),
        section("Birth, persistence, death", lifecycles_table(lives) if found and lives else ""),
        section("Templates", templates_table(lives) if found else ""),
        section("Ranges of the quantizers", _quantizers(plan.get("quantizers") or [])),
        section("What stays in float", in_float_table(found["in_float"]) if found else ""),
        section("Engines", _engines(manifest)),
        section("Cost of the compile", _cost(manifest)),
        section("Notes", listed(manifest.notes)),
    ]
    return page(f"{manifest.name} {manifest.recipe}", sections)


def _limits(manifest: Manifest) -> dict[str, float]:
    """What a finding is held against."""
    name = "max_relative_deviation"
    return {name: manifest.options.get(name, CompileOptions.max_relative_deviation)}


def _head(manifest: Manifest) -> str:
    facts = [manifest.recipe, manifest.dtype, f"opset {manifest.opset}", *manifest.targets]
    source = ", ".join(f"{key} {value}" for key, value in manifest.source.items() if value)
    return (
        f"<h1>{escape(manifest.name)}</h1>\n"
        f'<p class="sub">{escape(" · ".join(facts))}<br>{escape(source)}</p>'
    )


def _accuracy(manifest: Manifest) -> str:
    measured = manifest.accuracy
    if measured is None:
        return "<p>Not measured yet: <code>iq-export eval</code> fills this table.</p>"
    rows = []
    for row in measured["rows"]:
        numbers = (
            [row["error"], "", "", ""]
            if row["error"] is not None
            else [
                number(row["perplexity"], ".4f"),
                number(row["ratio"], ".4f"),
                number(row["top1_agreement"], ".1%"),
                number(row["kl"], ".5f"),
            ]
        )
        rows.append([row["graph"], "with" if row["bos"] else "without", *numbers])
    header = ["graph", "BOS", "perplexity", "x fp32", "same top token", "KL (nats)"]
    ours = {i for i, row in enumerate(measured["rows"]) if row["graph"].startswith("bundle")}
    return (
        f'<p class="sub">{measured["windows"]} windows of {measured["length"]} tokens of '
        f"{escape(str(measured['text']))}, ONNX Runtime</p>\n" + html_table(header, rows, ours)
    )


_CHARTS = (
    ("residual_max", "largest |residual|", "Residual stream"),
    ("down_max", "largest |down-projection input|", "Down-projection inputs"),
)
_OBSERVED = {"residual_max": "residual_max_per_block", "down_max": "down_proj_max_per_block"}


def _largest(plan: Mapping[str, Any], spiking: bool) -> str:
    """The largest absolute values by block, before and after the rewrite; where tokens spike, what
    that does to a range."""
    observed = plan.get("observations") or {}
    series = {key: _series(observed.get(name)) for key, name in _OBSERVED.items()}
    if found := plan.get("found"):
        after = {key: lines[-1].values for key, lines in series.items() if len(lines) > 1}
        body = spikes(found, after)
    else:  # a bundle of an older version
        charts = ((line_chart(series[key], y, "block"), title) for key, y, title in _CHARTS)
        body = "\n".join(f"<h3>{escape(title)}</h3>\n{chart}" for chart, title in charts if chart)
    if not body:
        return ""
    why = (
        "<p>A static per-tensor int8 range must hold the largest value. A few tokens carry values "
        "thousands of times larger than the rest through the residual stream: they stretch the "
        "range, and every other token is rounded to almost nothing.</p>\n"
    )
    lead = (
        "<p>The compiled graph's values are those it computes with: spikes clamped, and, where the "
        "recipe folds scales or rotations into weights, scaled and rotated.</p>\n"
    )
    if not spiking:
        return section("Largest values by block", lead + body)
    return section("Why the model broke", why + lead + body)


def _series(values: Any) -> list[Series]:
    """A chart's lines from `[..]` (before only) or `{"before": [..], "after": [..]}`."""
    if not values:
        return []
    if not isinstance(values, Mapping):
        values = {"before": values}
    names = {"before": "traced model", "after": "compiled graph"}
    return [Series(names[key], values[key], key) for key in names if values.get(key)]


def _lifecycles(lifecycles: Sequence[Mapping[str, Any]]) -> str:
    if not lifecycles:
        return "<p>None: no token stretches a range, so no sink op was added.</p>"
    items = (f"<li>{'<br>'.join(map(escape, describe_lifecycle(r)))}</li>" for r in lifecycles)
    return f"<ol>{''.join(items)}</ol>"


def _quantizers(quantizers: Sequence[Mapping[str, Any]]) -> str:
    """Range over the 99.9th percentile of every quantizer, before and after."""
    if not quantizers:
        return ""
    header = ["quantizer", "absmax before", "after", "p99.9 before", "after",
              "range / p99.9 before", "after", "scale"]  # fmt: skip
    ordered = sorted(quantizers, key=_gain, reverse=True)
    rows = [_quantizer_row(q) for q in ordered]
    first, rest = rows[:_SHOWN_QUANTIZERS], rows[_SHOWN_QUANTIZERS:]
    text = html_table(header, first)
    if rest:
        text += (
            f"\n<details><summary>{len(rest)} more</summary>\n{html_table(header, rest)}</details>"
        )
    return f"<p>{len(rows)} activation quantizers, those that changed most first.</p>\n{text}"


def _gain(quantizer: Mapping[str, Any]) -> float:
    return _ratio(quantizer.get("absmax_before"), quantizer.get("absmax_after")) or 0.0


def _quantizer_row(quantizer: Mapping[str, Any]) -> list[str]:
    before, after = quantizer.get("absmax_before"), quantizer.get("absmax_after")
    p_before, p_after = quantizer.get("p999_before"), quantizer.get("p999_after")
    values = (before, after, p_before, p_after, _ratio(before, p_before), _ratio(after, p_after),
              quantizer.get("scale"))  # fmt: skip
    return [str(quantizer.get("name", "")), *(number(value, ".4g") for value in values)]


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None


def _engines(manifest: Manifest) -> str:
    header = ["target", "MB", "TensorRT", "compute capability", "sink ops", "plugin layers", "s"]
    rows = [
        [
            target,
            number(engine.get("bytes", 0) / 1e6, ".1f"),
            f"{engine.get('flavour', '')} {engine.get('tensorrt_version', '')}".strip(),
            " ".join(map(str, engine.get("compute_capabilities", []))),
            str(engine.get("form", "")),
            str(engine.get("plugin_layers", "")),
            number(engine.get("seconds"), ".1f"),
        ]
        for target, engine in manifest.graph.engines.items()
    ]
    if not rows:
        return "<p>None: <code>iq-export build</code> makes them.</p>"
    return html_table(header, rows)


def _cost(manifest: Manifest) -> str:
    rows = [[step, number(seconds, ".1f")] for step, seconds in manifest.timings.items()]
    if manifest.peak_rss_bytes is not None:
        rows.append(["peak memory, GB", number(manifest.peak_rss_bytes / 1e9, ".2f")])
    return html_table(["step", "seconds"], rows) if rows else ""
