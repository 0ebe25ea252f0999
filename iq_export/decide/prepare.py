"""Scale, rotate and smooth: what is done to the graph before sinks are inserted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from iq_export.decide.job import Job
from iq_export.decide.sinks import Decision, refit, wanted
from iq_export.decide.smoothing import smoothed
from iq_export.decisions import Decisions, Smoothing
from iq_export.graph.half import HALF_MAX
from iq_export.observe.token_stats import TokenStats
from iq_export.passes.order import PREPARED, TURNED, lower
from iq_export.sinks.lifecycle import Lifecycle


def prepare(
    job: Job, chosen: Decisions, fits: list[Decision]
) -> tuple[Decisions, list[Decision], dict[str, np.ndarray]]:
    """Scale, rotate and smooth; fit templates and thresholds on what comes of it.

    A lifecycle that smoothing hides from detection stays, and smoothing is chosen again with its
    tokens. The last value is the power of each product's input, by name (see `smoothed`).
    """
    progress, recipe = job.options["progress"], chosen.recipe
    while True:
        taken = [d.lifecycle for d in fits if d.replaced and wanted(d, chosen)]
        exponent = stream_exponent(job.stats, taken) if chosen.half else 0
        chosen = replace(chosen, exponent=exponent, smoothing=Smoothing({}, {}), side={})
        # Tokens of a lifecycle that stays must be rounded well like all others.
        left_out = taken if recipe.sinks == "always" else []
        with progress.step("Observe ranges"):
            turned = lower(job.base, chosen, TURNED)
            chosen, power = smoothed(job, turned.model, chosen, left_out)
        with progress.step("Smooth and rotate"):
            prepared = lower(turned, chosen, PREPARED).model
            found = refit(prepared, job.sites, fits, job.stats, job.data.all, **job.options)
        lost = [old for old, new in zip(fits, found, strict=True) if old.replaced > new.replaced]
        fits = found
        if not lost:
            return chosen, fits, power
        progress.note(_lost_note(lost))  # and now smoothing sees its tokens


def stream_exponent(stats: TokenStats, taken: Sequence[Lifecycle]) -> int:
    """The n for which half precision holds the residual stream over `2^n`, a factor 2 to spare.

    The tokens of `taken` do not count from birth on, while sink ops keep their spike out of the
    stream, but count where what is left of it is restored.
    """
    held = stats.residual_max.copy()
    for life in taken:
        for block, members in life.detections:
            held[block : life.end, members] = 0
    return max(0, math.ceil(math.log2(max(2 * float(held.max()), 1.0) / HALF_MAX)))


def _lost_note(lost: Sequence[Decision]) -> str:
    births = ", ".join(str(decision.lifecycle.birth) for decision in lost)
    return (
        f"the spike born at block {births} stays, since smoothing hides its tokens from detection: "
        "smoothing is chosen again"
    )
