"""From lifecycles to templates that the graph can carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from iq_export.calibrate.data import Window
from iq_export.calibrate.token_stats import TokenStats
from iq_export.graph.sites import Sites
from iq_export.observe.walk import Graph, walk
from iq_export.progress import Progress
from iq_export.sinks import templates as fitting
from iq_export.sinks.lifecycle import Lifecycle, threshold_between
from iq_export.sinks.templates import (
    KV,
    EarlyRows,
    KeyValueTemplates,
    SinkTemplates,
    collect_rows,
    early_norm_outputs,
    norm_outputs,
)

_UNDETECTED = "; but other tokens reach the sinks' magnitude, so it cannot be detected"


@dataclass(frozen=True)
class Decision:
    """One lifecycle, its templates, and whether it is replaced; `reason` is for people."""

    lifecycle: Lifecycle
    templates: SinkTemplates | None
    replaced: bool
    reason: str


def decide(
    traced: Graph,
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
    """Fit templates on the traced graph, that of `stats`; replace only what is constant there.

    `limit` is the largest accepted mean relative deviation of a post-norm sink row from its
    template, at the worst norm, on held-out tokens. Rows are compared as the products read them,
    with the norms' weights. Those hold the spike's channel down; a graph that has folded them into
    the products shows rows that this channel dominates, and these look alike whatever else they
    carry.
    """
    decisions = []
    for lifecycle in lifecycles:
        if not norm_outputs(sites, lifecycle):
            reason = "the spike does not outlive its block, so no norm reads it"
            decisions.append(Decision(lifecycle, None, False, reason))
            continue
        rows = _collect(traced, sites, lifecycle, stats, windows, providers, progress)
        fitted = fitting.fit(
            lifecycle, rows.detection, rows.norms, lifecycle.threshold,
            limit=limit, seed=seed, early=rows.early,
        )  # fmt: skip
        fitted.key_values = rows.key_values_of(fitted)
        constant = fitted.is_constant(limit)
        reason = (
            f"mean relative deviation {fitted.mean_deviation:.1%} with K={fitted.count}, "
            f"{'within' if constant else 'above'} the limit of {limit:.0%}"
        )
        peaks = [stats.down_max[block] for block, _ in lifecycle.detections]
        fitted, separable = _with_thresholds(fitted, peaks)
        if constant and not separable:
            reason += _UNDETECTED
        decisions.append(Decision(lifecycle, fitted, constant and separable, reason))
    return decisions


def refit(
    prepared: Graph,
    sites: Sites,
    decisions: Sequence[Decision],
    stats: TokenStats,
    windows: Sequence[Window],
    *,
    providers: Sequence[str],
    progress: Progress,
) -> list[Decision]:
    """The `decisions` with the templates of replaced lifecycles as the graph `prepared` has them.

    Every token stays in its cluster; how constant the model's rows are stays what it was. Smoothing
    moves the magnitudes that tell sinks from other tokens: thresholds are measured again, and a
    lifecycle for which none is left is not replaced.
    """
    found = []
    for decision in decisions:
        if not decision.replaced or decision.templates is None:
            found.append(decision)
            continue
        life = decision.lifecycle
        rows = _collect(prepared, sites, life, stats, windows, providers, progress)
        fitted = fitting.fit_again(decision.templates, rows.detection, rows.norms, rows.early)
        fitted.untouched = rows.residual
        fitted.key_values = rows.key_values_of(fitted)
        peaks = _peaks(prepared, sites, life, windows, providers, progress)
        fitted, separable = _with_thresholds(fitted, peaks)
        reason = decision.reason + ("" if separable else _UNDETECTED)
        found.append(Decision(life, fitted, separable, reason))
    return found


def with_restore(
    untouched: Graph,
    clamped: Graph,
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
        kept = templates.untouched
        full, lacking = (
            kept[chosen]
            if graph is untouched and kept is not None
            else collect_rows(
                graph, {residual: sites.hidden}, stats, members, windows,
                providers=providers, progress=progress,
            )[residual]
            for graph in (untouched, clamped)
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


@dataclass(frozen=True)
class _Rows:
    """Values of a lifecycle's members, float32 `[members, features]` each.

    `detection`: the down-projection input at the birth. `norms`, `keys_values`: by value name.
    `residual`: after the last block.
    """

    detection: np.ndarray
    norms: dict[str, np.ndarray]
    keys_values: dict[str, np.ndarray]
    residual: np.ndarray
    early: list[EarlyRows]

    def key_values_of(self, fitted: SinkTemplates) -> KeyValueTemplates | None:
        if not self.keys_values:
            return None
        return fitting.fit_key_values(
            self.keys_values, self.residual, fitted.assignment, fitted.count
        )


def _collect(
    graph: Graph,
    sites: Sites,
    lifecycle: Lifecycle,
    stats: TokenStats,
    windows: Sequence[Window],
    providers: Sequence[str],
    progress: Progress,
) -> _Rows:
    names = norm_outputs(sites, lifecycle)
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
        graph, widths, stats, lifecycle.members, windows,
        providers=providers, progress=progress,
    )  # fmt: skip
    early = [
        EarlyRows(
            site,
            rows[sites.blocks[site.block].mlp.output.input],
            {name: rows[name] for name in norms},
        )
        for site, norms in zip(lifecycle.early, between, strict=True)
    ]
    return _Rows(
        detection=rows[down.input],
        norms={name: rows[name] for name in names},
        keys_values={name: rows[name] for name in attended},
        residual=rows[residual],
        early=early,
    )


def _peaks(
    graph: Graph,
    sites: Sites,
    lifecycle: Lifecycle,
    windows: Sequence[Window],
    providers: Sequence[str],
    progress: Progress,
) -> list[np.ndarray]:
    """Per site of detection, the largest magnitude of every token: float32 `[tokens]`, all windows
    end to end."""
    names = [sites.blocks[block].mlp.output.input for block, _ in lifecycle.detections]
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for _, values in walk(graph, names, windows, providers=providers, progress=progress):
        for name, value in values.items():
            found[name].append(np.abs(value).max(1))
    return [np.concatenate(found[name]) for name in names]
