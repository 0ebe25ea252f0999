"""From lifecycles to templates that the graph can carry (method.md steps 2, 3 and 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from iq_export.calibrate.data import Window
from iq_export.calibrate.taps import tapped_runs
from iq_export.calibrate.token_stats import TokenStats
from iq_export.graph.sites import Sites
from iq_export.progress import Progress
from iq_export.sinks import templates as fitting
from iq_export.sinks.lifecycle import Lifecycle, threshold_between
from iq_export.sinks.templates import (
    KV,
    EarlyRows,
    SinkTemplates,
    collect_rows,
    early_norm_outputs,
    norm_outputs,
)


@dataclass(frozen=True)
class Decision:
    """One lifecycle, its templates, and whether it is replaced; `reason` is for people."""

    lifecycle: Lifecycle
    templates: SinkTemplates | None
    replaced: bool
    reason: str


def decide(
    model_path: Path,
    sites: Sites,
    lifecycles: Sequence[Lifecycle],
    stats: TokenStats,
    windows: Sequence[Window],
    *,
    limit: float,
    seed: int,
    providers: Sequence[str],
    progress: Progress,
) -> list[Decision]:
    """Fit templates on the graph that will be rewritten; replace only constant lifecycles.

    `limit` is the largest accepted mean relative deviation of a post-norm sink row from its
    template, at the worst norm, on held-out tokens.
    """
    decisions = []
    for lifecycle in lifecycles:
        names = norm_outputs(sites, lifecycle)
        if not names:
            reason = "the spike does not outlive its block, so no norm reads it"
            decisions.append(Decision(lifecycle, None, False, reason))
            continue
        down = sites.blocks[lifecycle.birth].mlp.output
        residual = sites.blocks[lifecycle.end].mlp.residual
        attended = fitting.key_value_sizes(sites, lifecycle)
        widths = {down.input: down.in_features} | dict.fromkeys([*names, residual], sites.hidden)
        widths |= attended
        between = early_norm_outputs(sites, lifecycle)
        for site, norms in zip(lifecycle.early, between, strict=True):
            first = sites.blocks[site.block].mlp.output
            widths |= {first.input: first.in_features} | dict.fromkeys(norms, sites.hidden)
        rows = collect_rows(
            model_path, widths, stats, lifecycle.members, windows,
            providers=providers, progress=progress,
        )  # fmt: skip
        detection, untouched = rows.pop(down.input), rows.pop(residual)
        keys_values = {name: rows.pop(name) for name in attended}
        early = [
            EarlyRows(
                site,
                rows.pop(sites.blocks[site.block].mlp.output.input),
                {name: rows.pop(name) for name in norms},
            )
            for site, norms in zip(lifecycle.early, between, strict=True)
        ]
        fitted = fitting.fit(
            lifecycle, detection, rows, lifecycle.threshold, limit=limit, seed=seed, early=early
        )
        if keys_values:
            fitted.key_values = fitting.fit_key_values(
                keys_values, untouched, fitted.assignment, fitted.count
            )
        replaced = fitted.is_constant(limit)
        reason = (
            f"mean relative deviation {fitted.mean_deviation:.1%} with K={fitted.count}, "
            f"{'within' if replaced else 'above'} the limit of {limit:.0%}"
        )
        if replaced:  # smoothing has moved the magnitudes that tell sinks from other tokens
            peaks = _peaks(model_path, sites, lifecycle, windows, providers, progress)
            fitted, separable = _with_thresholds(fitted, peaks)
            if not separable:
                replaced = False
                reason += "; but other tokens reach the sinks' magnitude, so it cannot be detected"
        decisions.append(Decision(lifecycle, fitted, replaced, reason))
    return decisions


def with_restore(
    untouched: Path,
    clamped: Path,
    sites: Sites,
    sinks: Sequence[SinkTemplates],
    stats: TokenStats,
    windows: Sequence[Window],
    *,
    providers: Sequence[str],
    progress: Progress,
    most: int | None = None,
) -> list[SinkTemplates]:
    """Measure what the clamped residual lacks after the last block of each lifecycle.

    The kv form lacks nothing: it sets the residual, whose templates are known from the fit.
    `clamped` is the rewritten graph; what its SinkRestore adds does not matter. At most `most`
    sinks per template are looked at, spread over the calibration, all if None.
    """
    measured = []
    for templates in sinks:
        if templates.form == KV:
            measured.append(templates)
            continue
        life = templates.lifecycle
        residual = sites.blocks[life.end].mlp.residual
        chosen = _spread_over(templates.assignment, templates.count, most)
        members, labels = life.members[chosen], templates.assignment[chosen]
        full, lacking = (
            collect_rows(
                path, {residual: sites.hidden}, stats, members, windows,
                providers=providers, progress=progress,
            )[residual]
            for path in (untouched, clamped)
        )  # fmt: skip
        difference = fitting.means(full - lacking, labels, templates.count)
        measured.append(replace(templates, restore=difference))
    return measured


def _spread_over(labels: np.ndarray, count: int, most: int | None) -> np.ndarray:
    """Indices of at most `most` members of every template, evenly spaced."""
    chosen = []
    for template in range(count):
        mine = np.flatnonzero(labels == template)
        picks = np.linspace(0, mine.size - 1, min(most or mine.size, mine.size))
        chosen.append(mine[picks.round().astype(int)])
    return np.sort(np.concatenate(chosen))


def _with_thresholds(
    fitted: SinkTemplates, peaks: Sequence[np.ndarray]
) -> tuple[SinkTemplates, bool]:
    """The templates with the thresholds that `peaks` (per site, `[tokens]`) ask for.

    The second value tells whether they separate the sinks from all other tokens.
    """
    caught = fitted.lifecycle.members[:0]
    thresholds, separable = [], True
    for (_, members), peak in zip(fitted.lifecycle.detections, peaks, strict=True):
        thresholds.append(threshold_between(peak, members, caught))
        caught = np.union1d(caught, members)
        separable &= bool(np.delete(peak, caught).max(initial=0) < thresholds[-1])
    early = tuple(
        replace(site, threshold=tau) for site, tau in zip(fitted.early, thresholds, strict=False)
    )
    return replace(fitted, threshold=thresholds[-1], early=early), separable


def _peaks(
    model_path: Path,
    sites: Sites,
    lifecycle: Lifecycle,
    windows: Sequence[Window],
    providers: Sequence[str],
    progress: Progress,
) -> list[np.ndarray]:
    """Per site of detection, the largest magnitude of every token: float32 `[tokens]`, all windows
    end to end."""
    names = [sites.blocks[block].mlp.output.input for block, _ in lifecycle.detections]
    runs = tapped_runs(model_path, [names], windows, providers=providers, progress=progress)
    found = [[np.abs(values[name]).max(1) for name in names] for _, values in runs]
    return [np.concatenate(each) for each in zip(*found, strict=True)]
