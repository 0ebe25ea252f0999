"""What each lifecycle must restore behind its last block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from iq_export.decide.job import Job
from iq_export.decisions import Decisions
from iq_export.graph.sites import Sites
from iq_export.observe.rows import collect_rows
from iq_export.observe.samples import Sample
from iq_export.observe.token_stats import TokenStats
from iq_export.observe.walk import Graph
from iq_export.passes.insert_sinks import set_restore
from iq_export.passes.order import PREPARED, ROUNDED
from iq_export.progress import Progress
from iq_export.sinks.fit import means
from iq_export.sinks.templates import KV, SinkTemplates

# Sinks per template that are looked at again in the rounded graph: it differs little from the
# inserted one.
_CHECKED_SINKS = 8


def restored(job: Job, chosen: Decisions, stage: str) -> Decisions:
    """With what each lifecycle must restore, as measured on the graph at `stage`.

    In order of their ends: a later life of the same tokens must find the earlier one restored.
    """
    if all(sinks.form == KV for sinks in chosen.sinks):
        return chosen  # it sets the residual
    measured, most = list(chosen.sinks), _CHECKED_SINKS if stage == ROUNDED else None
    prepared, model = job.at(PREPARED, chosen), job.at(stage, chosen)
    for number in sorted(range(len(measured)), key=lambda n: measured[n].lifecycle.end):
        (measured[number],) = with_restore(
            prepared, model, job.sites, [measured[number]], job.stats, job.data.all, most=most,
            **job.options,
        )  # fmt: skip
        set_restore(model, measured)
    return replace(chosen, sinks=tuple(measured))


def with_restore(
    untouched: Graph,
    clamped: Graph,
    sites: Sites,
    sinks: Sequence[SinkTemplates],
    stats: TokenStats,
    windows: Sequence[Sample],
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
        difference = means(full - lacking, labels, templates.count)
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
