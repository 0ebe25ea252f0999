"""Calibrate and decide: from the traced graph to the decisions that the shipped graph is made of.

Each step takes the decisions so far and what it measures, and gives decisions. A graph that is
measured is `lower`ed from them and walked piece by piece; only the one that ships is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from iq_export.checkpoint import Checkpoint
from iq_export.decide.budget import MixedPlan, Site
from iq_export.decide.cache import cache_scales
from iq_export.decide.codes import CodeStore
from iq_export.decide.convolutions import convolution_scales
from iq_export.decide.forms import Insertion, formed
from iq_export.decide.job import OBSERVED_WINDOWS, Calibration, Job, Run
from iq_export.decide.matching import MatchQuality, match_quality, sink_warnings
from iq_export.decide.mixed import leave_in_half, search_mixed_plan, within_budget
from iq_export.decide.prepare import prepare
from iq_export.decide.quantizers import Quantizer, calibrate_quantizers
from iq_export.decide.queries import loud_attentions, loud_note
from iq_export.decide.recall import keep_recall
from iq_export.decide.restore import restored
from iq_export.decide.sinks import Decision, everyone_warning, fit_sinks, to_insert
from iq_export.decide.traced import observed
from iq_export.decide.trial import Reference
from iq_export.decisions import Decisions
from iq_export.evaluate.final_check import FinalCheck
from iq_export.formats.base import CacheScale
from iq_export.graph.sites import Sites
from iq_export.observe.ranges import TensorStats
from iq_export.observe.samples import Window
from iq_export.observe.tail import Tail
from iq_export.observe.token_stats import TokenStats
from iq_export.passes.order import INSERTED, ROUNDED, SHIPPED, lower
from iq_export.progress import Progress
from iq_export.recipe import Recipe
from iq_export.ship import MODEL, Made, check_file, started, weight_blocks, written
from iq_export.sinks.lifecycle import discover
from iq_export.sinks.ops import DOMAIN


@dataclass(frozen=True)
class Rewrite(Made):
    """What was decided, what was measured on the way, and the file that ships.

    `decisions`: one for each lifecycle that was found. `matching`: one for each of `sinks`, empty
    without held-out text. `mixed`: what stays in half precision, None without a budget. `warnings`:
    for people. `check`: the finished file `quantized` against fp32.
    """

    chosen: Decisions
    sites: Sites
    stats: TokenStats
    decisions: list[Decision]
    insertions: list[Insertion]  # of `sinks`, in order
    quantizers: dict[str, Quantizer]
    cache: dict[str, CacheScale]  # by the name of a step's keys or values
    before: dict[str, TensorStats]
    observed_before: dict[str, list[float]]
    observed_after: dict[str, list[float]]
    recall: float | None
    sink_nodes: int
    traced: Path
    quantized: Path
    matching: list[MatchQuality] = field(default_factory=list)
    mixed: MixedPlan | None = None
    warnings: list[str] = field(default_factory=list)
    check: FinalCheck | None = None

    @property
    def absmax(self) -> dict[str, float]:
        """The largest magnitude of every product's input in the traced graph, all tokens alike."""
        return {name: stats.absmax for name, stats in self.before.items()}


def rewrite(
    traced: Path,
    work: Path,
    recipe: Recipe,
    dtype: str,
    data: Calibration,
    progress: Progress,
    kept: Checkpoint | None = None,
) -> Rewrite:
    """Run all steps on the traced graph; `work` receives the file that ships and rounded weights.
    What is in `kept` already is not made again.

    Raises GraphError if the graph is not understood, not finite, or loses its sinks.
    """
    base, notes = started(traced, progress)
    weight_blocks(base.sites, recipe)  # refuses a width that has none
    options = Run(providers=data.providers, progress=progress)
    kept = kept or Checkpoint()
    store = CodeStore((kept.folder or work) / "codes")
    kept.given.update(recipe=recipe, activations=recipe.activations, codes=store)
    chosen = Decisions(recipe, dtype)
    warnings: list[str] = []

    def warn(*texts: str | None) -> None:
        for text in filter(None, texts):
            warnings.append(text)
            progress.note(f"warning: {text}")

    with progress.step("Observe tokens"):
        seen = kept.step("tokens", observed, base, data, dtype, options)
    stats, before, tail = seen.stats, seen.before, Tail(base.model, seen.tail, data.providers)
    kept.given.update({f"before {name}": found for name, found in before.items()})
    job = Job(base, data, stats, options, work, kept)
    loud = loud_attentions(job, seen.peaks)
    if loud:
        chosen = replace(chosen, scaled_queries=tuple(loud))
        notes.append(loud_note(loud))
        progress.note(notes[-1])
    with progress.step("Fit sinks"):
        fits = kept.step(
            "fits", fit_sinks, job.traced, job.sites, discover(stats), stats, data.all,
            limit=data.max_relative_deviation, seed=data.seed, **options,
        )  # fmt: skip
    chosen, fits, power = kept.step("ranges", prepare, job, chosen, fits)
    with progress.step("Insert sinks"):
        chosen = replace(chosen, sinks=tuple(to_insert(job, chosen, fits)))
        chosen = kept.step("inserted", restored, job, chosen, INSERTED)
        matching = kept.step("matching", match_quality, job, chosen, seen.heldout)
    warn(seen.surprise, *everyone_warning(stats), *sink_warnings(chosen.sinks, matching))
    chosen, quantizers = calibrate_quantizers(job, chosen, before, power, store)
    chosen = kept.step("convolutions", convolution_scales, job, chosen)
    cache: dict[str, CacheScale] = {}
    if recipe.cache is not None:
        with progress.step("Calibrate the KV cache"):
            cache = kept.step("cache", cache_scales, job, chosen)
        chosen = replace(chosen, cache={name: found.scale for name, found in cache.items()})
    with progress.step("Choose the insertion"):
        chosen, insertions = kept.step("forms", formed, job, chosen, tail)
    mixed, reference = None, None
    everything = [Site(q.name, q.linears) for q in quantizers.values()]
    if math.isfinite(data.budget) and quantizers:
        with progress.step("Search a mixed plan"):
            text = [window for window in data.windows if isinstance(window, Window)]
            reference = Reference.of(job.traced, text, **options)
            mixed = kept.step("mixed", search_mixed_plan, job, chosen, everything, reference)
            chosen, quantizers = leave_in_half(chosen, quantizers, mixed)
    with progress.step("Quantize"):
        ranges = chosen.activations
        chosen, quantizers, recall, after = kept.step(
            "recall", keep_recall, job, chosen, quantizers
        )
        if chosen.sinks and (mixed is not None or chosen.activations != ranges):
            chosen = kept.step("restored", restored, job, chosen, ROUNDED)
        if mixed is not None and reference is not None:
            chosen, quantizers, mixed = kept.step(
                "within", within_budget, job, chosen, quantizers, mixed, everything, reference
            )
            warn(None if mixed.met else mixed.unmet())
        lowered, path = lower(base, chosen, SHIPPED), work / MODEL
        notes += written(lowered, path, progress)
    with progress.step("Check the quantized graph"):
        check = kept.step("check", check_file, base, chosen, path, tail, data.windows, options)
        warn(check.warning())
    first = min(OBSERVED_WINDOWS, len(data.windows))
    return Rewrite(
        chosen=chosen,
        sites=job.sites,
        stats=stats,
        decisions=fits,
        insertions=insertions,
        quantizers=quantizers,
        cache=cache,
        before=before,
        observed_before=_per_block(stats, first),
        observed_after=_observed_after(after, first, quantizers, job.sites),
        recall=recall,
        sink_nodes=sum(node.domain == DOMAIN for node in lowered.model.graph),
        traced=traced,
        quantized=path,
        matching=matching,
        mixed=mixed,
        warnings=[*notes, *warnings],
        check=check,
    )


def _observed_after(
    stats: TokenStats, windows: int, quantizers: dict[str, Quantizer], sites: Sites
) -> dict[str, list[float]]:
    """As `_per_block`, with the down-projections' inputs as their quantizers see them."""
    found = _per_block(stats, windows)
    after = {q.linears: q.after.absmax for q in quantizers.values()}
    downs = [(block.mlp.output.node,) for block in sites.blocks]
    if all(down in after for down in downs):
        found["down_proj_max_per_block"] = [after[down] for down in downs]
    return found


def _per_block(stats: TokenStats, windows: int) -> dict[str, list[float]]:
    """The largest magnitudes in the first windows."""
    columns = stats.window < windows
    return {
        "residual_max_per_block": stats.residual_max[:, columns].max(1).tolist(),
        "down_proj_max_per_block": stats.down_max[:, columns].max(1).tolist(),
    }
