"""How well the inserted graph finds and matches sinks on text that no template was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iq_export.decide.job import Job
from iq_export.decisions import Decisions
from iq_export.graph.sites import Sites
from iq_export.observe.rows import collect_rows
from iq_export.observe.samples import Sample
from iq_export.observe.token_stats import TokenStats
from iq_export.observe.walk import Graph, walk
from iq_export.passes.insert_sinks import index_name
from iq_export.passes.order import INSERTED, PREPARED
from iq_export.progress import Progress
from iq_export.sinks.fit import nearest
from iq_export.sinks.lifecycle import Lifecycle, discover
from iq_export.sinks.templates import TOKENS_PER_TEMPLATE, SinkTemplates


@dataclass(frozen=True)
class MatchQuality:
    """One lifecycle on held-out text; counts of tokens.

    `sinks` spike in the untouched graph, `detected` are sinks to the inserted graph, `both` are
    both; a position 0 that is forced counts in none of them. `template_tokens[k]`: matched to
    template k, position 0 included. `agreement`: share of the sinks whose match is the nearest
    template after the norms too, None without sinks. The paper assigns templates in order of
    appearance where a sequence has exactly K sinks: `order_windows` is the number of such windows,
    `order_differs` of those where that gives another template than the nearest.
    """

    tokens: int
    sinks: int
    detected: int
    both: int
    template_tokens: tuple[int, ...]
    agreement: float | None
    order_windows: int
    order_differs: int

    @property
    def precision(self) -> float | None:
        """Share of what is detected that spikes; None if nothing is."""
        return self.both / self.detected if self.detected else None

    @property
    def recall(self) -> float | None:
        """Share of what spikes that is detected; None if nothing does."""
        return self.both / self.sinks if self.sinks else None

    @property
    def unmatched(self) -> list[int]:
        """Numbers of the templates that no token matches, from 0."""
        return [k for k, tokens in enumerate(self.template_tokens) if tokens == 0]


def measure(
    untouched: Graph,
    inserted: Graph,
    indices: Sequence[str],
    sites: Sites,
    sinks: Sequence[SinkTemplates],
    stats: TokenStats,
    windows: Sequence[Sample],
    *,
    providers: Sequence[str],
    progress: Progress,
) -> list[MatchQuality]:
    """One MatchQuality per lifecycle of `sinks`, whose sink indices in `inserted` are `indices`.

    `stats` are those of `windows` in the traced graph: they tell who spikes. `untouched` is the
    graph without sink ops that the templates were fitted on.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in indices}
    for _, values in walk(inserted, indices, windows, providers=providers, progress=progress):
        for name, value in values.items():
            found[name].append(value)
    lives = discover(stats)
    measured = []
    for name, templates in zip(indices, sinks, strict=True):
        index = np.concatenate(found[name]).astype(np.int64)
        truth = _spiking(lives, templates.lifecycle, index.size)
        agreement = None
        if truth.size:
            widths = dict.fromkeys(templates.norms, sites.hidden)
            rows = collect_rows(
                untouched, widths, stats, truth, windows, providers=providers, progress=progress
            )
            agreement = _agreement(rows, templates, index[truth])
        measured.append(summarise(templates, index, truth, stats, agreement))
    return measured


def sink_warnings(sinks: Sequence[SinkTemplates], matching: Sequence[MatchQuality]) -> list[str]:
    """What to know of templates that are in the graph: few tokens behind one, none for one."""
    found = []
    for number, templates in enumerate(sinks):
        life = templates.lifecycle
        where = f"the lifecycle of blocks {life.birth} to {life.end}"
        tokens = np.bincount(templates.assignment, minlength=templates.count)
        for k in templates.thin:
            found.append(
                f"template {k + 1} of {where} rests on {tokens[k]} tokens, fewer than "
                f"{TOKENS_PER_TEMPLATE}; it stays because the others explain them too badly; "
                "more --samples would make it surer"
            )
        for k in matching[number].unmatched if matching else ():
            found.append(
                f"template {k + 1} of {where} matches no sink among {matching[number].tokens} "
                "held-out tokens: it may describe the calibration text only"
            )
    return found


def summarise(
    templates: SinkTemplates,
    index: np.ndarray,
    spiking: np.ndarray,
    stats: TokenStats,
    agreement: float | None,
) -> MatchQuality:
    """Count: `index` int `[tokens]` as the graph gives it, `spiking` the tokens that do."""
    counted = np.ones(index.size, bool)
    if templates.lifecycle.force_first:
        counted[stats.position == 0] = False
    spikes = np.zeros(index.size, bool)
    spikes[spiking] = True
    windows, differs = order_of_appearance(templates.count, index, stats)
    return MatchQuality(
        tokens=index.size,
        sinks=int((spikes & counted).sum()),
        detected=int(((index > 0) & counted).sum()),
        both=int(((index > 0) & spikes & counted).sum()),
        template_tokens=tuple(np.bincount(index, minlength=templates.count + 1)[1:].tolist()),
        agreement=agreement,
        order_windows=windows,
        order_differs=differs,
    )


def _spiking(lives: Sequence[Lifecycle], wanted: Lifecycle, tokens: int) -> np.ndarray:
    """Tokens of the lives that are `wanted` on this text: same channel, overlapping blocks."""
    spikes = np.zeros(tokens, bool)
    for life in lives:
        overlap = life.birth < wanted.end and wanted.birth < life.end
        overlap |= life.birth == wanted.birth
        if life.channel == wanted.channel and overlap:
            spikes[life.members] = True
    return np.flatnonzero(spikes)


def _agreement(
    rows: dict[str, np.ndarray], templates: SinkTemplates, index: np.ndarray
) -> float | None:
    """Share of the detected sinks whose match is the nearest after the norms, weighing alike."""
    features, tables = [], []
    for name, table in templates.norms.items():
        size = np.linalg.norm(table, axis=1).mean()
        features.append(rows[name][index > 0] / size)
        tables.append(table / size)
    if not features or not (index > 0).any():
        return None
    after_norms = nearest(np.concatenate(features, axis=1), np.concatenate(tables, axis=1))
    return float((after_norms + 1 == index[index > 0]).mean())


def order_of_appearance(count: int, index: np.ndarray, stats: TokenStats) -> tuple[int, int]:
    """Windows with exactly `count` sinks, and those where the paper's rule gives another template.

    `index` int `[tokens]` is 0 or the number of the nearest template, from 1. A template's place in
    the order is where its tokens stand on average. One template cannot be mistaken.
    """
    if count < 2:
        return 0, 0
    positions = [stats.position[index == k + 1] for k in range(count)]
    places = [float(p.mean()) if p.size else np.inf for p in positions]
    order = np.argsort(places, kind="stable") + 1
    windows = differs = 0
    for number in np.unique(stats.window):
        sinks = index[(stats.window == number) & (index > 0)]
        if sinks.size == count:
            windows += 1
            differs += int((sinks != order).any())
    return windows, differs


def match_quality(job: Job, chosen: Decisions, stats: TokenStats | None) -> list[MatchQuality]:
    """How well the inserted graph finds and matches the sinks of held-out text, if there is any,
    which has `stats`."""
    heldout = job.data.heldout
    if not chosen.sinks or stats is None:
        return []
    indices = [index_name(number) for number in range(len(chosen.sinks))]
    return measure(
        job.at(PREPARED, chosen), job.at(INSERTED, chosen), indices, job.sites, chosen.sinks, stats,
        heldout, **job.options,
    )  # fmt: skip
