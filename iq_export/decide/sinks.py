"""Which lifecycles are replaced: templates that the graph can carry, and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from iq_export.decide.job import Job
from iq_export.decisions import Decisions
from iq_export.graph.half import HALF_MAX
from iq_export.graph.sites import Sites
from iq_export.observe.rows import RowObserver
from iq_export.observe.samples import Sample
from iq_export.observe.token_stats import TokenStats
from iq_export.observe.walk import Graph, Observer, Values, loaded, observe
from iq_export.progress import Progress
from iq_export.sinks import fit as fitting
from iq_export.sinks.fit import EarlyRows
from iq_export.sinks.form import calibrated_form
from iq_export.sinks.lifecycle import Lifecycle, everyone_spikes, threshold_between
from iq_export.sinks.templates import (
    KeyValueTemplates,
    SinkTemplates,
    early_norm_outputs,
    key_value_sizes,
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


def fit_sinks(
    traced: Graph,
    sites: Sites,
    lifecycles: Sequence[Lifecycle],
    stats: TokenStats,
    windows: Sequence[Sample],
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
    collected = [
        _Members(sites, life, stats, len(windows)) if norm_outputs(sites, life) else None
        for life in lifecycles
    ]
    read = [rows for rows in collected if rows is not None]
    observe(traced, read, windows, providers=providers, progress=progress)
    strengths = _strengths(traced, sites) if read else {}
    decisions = []
    for lifecycle, rows in zip(lifecycles, collected, strict=True):
        if rows is None:
            reason = "the spike does not outlive its block, so no norm reads it"
            decisions.append(Decision(lifecycle, None, False, reason))
            continue
        fitted = fitting.fit(
            lifecycle, rows.detection, rows.norms, lifecycle.threshold,
            limit=limit, seed=seed, early=rows.early, read=strengths,
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


def _strengths(traced: Graph, sites: Sites) -> dict[str, np.ndarray]:
    """By the name of a residual value that products read as it is: the length of their weights' row
    for each channel, float32 `[hidden]`. No norm's weight holds the spike's channel down there:
    theirs do."""
    initializers = loaded(traced).graph.initializers
    found: dict[str, np.ndarray] = {}
    for name, linears in sites.bare.items():
        squares = np.zeros(sites.hidden, np.float32)
        for linear in linears:  # one weight in memory at a time
            squares += (initializers[linear.weight].const_value.numpy() ** 2).sum(1)
        found[name] = np.sqrt(squares)
    return found


def refit(
    prepared: Graph,
    sites: Sites,
    decisions: Sequence[Decision],
    stats: TokenStats,
    windows: Sequence[Sample],
    *,
    providers: Sequence[str],
    progress: Progress,
) -> list[Decision]:
    """The `decisions` with the templates of replaced lifecycles as the graph `prepared` has them.

    Every token stays in its cluster; how constant the model's rows are stays what it was. Smoothing
    moves the magnitudes that tell sinks from other tokens: thresholds are measured again, and a
    lifecycle for which none is left is not replaced.
    """
    taken = [d.lifecycle for d in decisions if d.replaced]
    collected = [_Members(sites, life, stats, len(windows)) for life in taken]
    peaks = [_Peaks(sites, life, len(windows)) for life in taken]
    observe(prepared, [*collected, *peaks], windows, providers=providers, progress=progress)
    seen = iter(zip(collected, peaks, strict=True))
    found = []
    for decision in decisions:
        if not decision.replaced:
            found.append(decision)
            continue
        assert decision.templates is not None
        life, (rows, its_peaks) = decision.lifecycle, next(seen)
        fitted = fitting.fit_again(decision.templates, rows.detection, rows.norms, rows.early)
        fitted.untouched = rows.residual
        fitted.key_values = rows.key_values_of(fitted)
        fitted, separable = _with_thresholds(fitted, its_peaks.all())
        reason = decision.reason + ("" if separable else _UNDETECTED)
        found.append(Decision(life, fitted, separable, reason))
    return found


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


class _Members(RowObserver):
    """Rows of a lifecycle's members, to fit templates on; `count` windows are walked."""

    def __init__(self, sites: Sites, lifecycle: Lifecycle, stats: TokenStats, count: int) -> None:
        self._sites, self._lifecycle = sites, lifecycle
        self._norms = norm_outputs(sites, lifecycle)
        self._attended = key_value_sizes(sites, lifecycle)
        self._between = early_norm_outputs(sites, lifecycle)
        mlps = [sites.blocks[block].mlp for block, _ in lifecycle.detections]
        widths = {mlp.inner: mlp.inner_features for mlp in mlps} | self._attended
        hidden = [*self._norms, self._end, *(name for norms in self._between for name in norms)]
        widths |= dict.fromkeys(hidden, sites.hidden)
        super().__init__(widths, stats, lifecycle.members, count)

    @property
    def _end(self) -> str:
        return self._sites.blocks[self._lifecycle.end].mlp.residual

    def _down(self, block: int) -> np.ndarray:
        """The down-projection's input."""
        return self.rows[self._sites.blocks[block].mlp.inner]

    @property
    def detection(self) -> np.ndarray:
        """The down-projection's input at the birth."""
        return self._down(self._lifecycle.birth)

    @property
    def norms(self) -> dict[str, np.ndarray]:
        return {name: self.rows[name] for name in self._norms}

    @property
    def residual(self) -> np.ndarray:
        """After the last block."""
        return self.rows[self._end]

    @property
    def early(self) -> list[EarlyRows]:
        return [
            EarlyRows(site, self._down(site.block), {name: self.rows[name] for name in norms})
            for site, norms in zip(self._lifecycle.early, self._between, strict=True)
        ]

    def key_values_of(self, fitted: SinkTemplates) -> KeyValueTemplates | None:
        if not self._attended:
            return None
        rows = {name: self.rows[name] for name in self._attended}
        return fitting.fit_key_values(rows, self.residual, fitted.assignment, fitted.count)


class _Peaks(Observer):
    """Of every site of detection, the largest magnitude of every token of `count` windows."""

    def __init__(self, sites: Sites, lifecycle: Lifecycle, count: int) -> None:
        self.names = [sites.blocks[block].mlp.inner for block, _ in lifecycle.detections]
        self.of = range(count)
        self._found: dict[str, list[np.ndarray]] = {name: [] for name in self.names}

    def add(self, number: int, values: Values) -> None:
        for name, value in values.items():
            self._found[name].append(np.abs(value).max(1))

    def all(self) -> list[np.ndarray]:
        """float32 `[tokens]` per site, all windows end to end."""
        return [np.concatenate(self._found[name]) for name in self.names]


def to_insert(job: Job, chosen: Decisions, fits: Sequence[Decision]) -> list[SinkTemplates]:
    """The templates of what is replaced, in the form that blocks are calibrated in."""
    int8_cache = chosen.recipe.cache is not None
    return [
        replace(
            fit.templates,
            form=calibrated_form(fit.templates, job.data.insertion, int8_cache=int8_cache),
        )
        for fit in fits
        if fit.templates and fit.replaced and wanted(fit, chosen)
    ]


def wanted(decision: Decision, chosen: Decisions) -> bool:
    """Whether the recipe replaces this spike, if it can be."""
    always = chosen.recipe.sinks == "always"
    return always or (chosen.half and overflows_half(decision.lifecycle))


def overflows_half(lifecycle: Lifecycle) -> bool:
    """Whether half precision may not hold the spike: within a factor 2 of its largest number."""
    return 2 * max(lifecycle.residual_peak, lifecycle.down_peak) > HALF_MAX


def everyone_warning(stats: TokenStats) -> list[str]:
    """What to say of blocks where every token spikes: nothing, if there are none."""
    blocks = everyone_spikes(stats)
    if not blocks:
        return []
    return [
        f"every token spikes at the down-projection of block {', '.join(map(str, blocks))}: none "
        "can be told from the others, so there is no lifecycle and nothing is replaced there; "
        "calibrate on running text, if this is not the model's nature"
    ]
