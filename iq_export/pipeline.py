"""Calibrate and decide: from the traced graph to the decisions that the shipped graph is made of.

Each step takes the decisions so far and what it measures, and gives decisions. A graph that is
measured is `lower`ed from them and walked piece by piece; only the one that ships is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import onnx_ir as ir

from iq_export.checkpoint import Checkpoint
from iq_export.decide.budget import MixedPlan, Site, mixed_plan
from iq_export.decide.codes import CodeStore
from iq_export.decide.matching import MatchQuality, measure, sink_warnings
from iq_export.decide.quantizers import Quantizer, calibrate_blocks
from iq_export.decide.recall import (
    LEAST_RECALL,
    FoundSinks,
    hidden,
    hiding_quantizer,
    recall_of,
    unclipped,
)
from iq_export.decide.search import unit_rows
from iq_export.decide.sinks import Decision, decide, refit, with_restore
from iq_export.decide.smoothing import find_side_channels, find_smoothing
from iq_export.decide.trial import Reference, Trial
from iq_export.decisions import Decisions, Smoothing
from iq_export.errors import GraphError
from iq_export.evaluate.final_check import (
    MOST_LOST,
    FinalCheck,
    block_parts,
    broken,
    final_check,
    scores_overflow,
    short_windows,
)
from iq_export.formats.base import CacheScale
from iq_export.formats.int8_activations import INT8
from iq_export.formats.rounding import W8A8, Rounding
from iq_export.graph import io
from iq_export.graph.attention import attentions
from iq_export.graph.edit import copied
from iq_export.graph.half import HALF_MAX
from iq_export.graph.sites import Linear, Sites
from iq_export.observe.divergence import Divergence, divergence
from iq_export.observe.peaks import PeakObserver
from iq_export.observe.ranges import MagnitudeObserver, TensorStats, observe_ranges
from iq_export.observe.samples import Window
from iq_export.observe.tail import Tail
from iq_export.observe.text_check import SurpriseObserver
from iq_export.observe.token_stats import TokenObserver, TokenStats
from iq_export.observe.walk import Graph, Observer, Values, observe
from iq_export.passes.insert_sinks import index_name, set_restore
from iq_export.passes.order import (
    INSERTED,
    PREPARED,
    ROUNDED,
    SHIPPED,
    TURNED,
    Lowered,
    begin,
    lower,
)
from iq_export.passes.quantize import QuantizePlan, quantize
from iq_export.passes.switches import add_switches
from iq_export.passes.to_half import to_half
from iq_export.progress import Progress
from iq_export.recipe import Recipe
from iq_export.sinks.form import Insertion, calibrated_form, choose_forms
from iq_export.sinks.lifecycle import Lifecycle, discover, everyone_spikes
from iq_export.sinks.ops import DOMAIN
from iq_export.sinks.templates import KV, SinkTemplates

MODEL = "model.onnx"  # as a bundle calls it
_OBSERVED_WINDOWS = 4
# Windows on which the forms of insertion are compared; the loss is paired, so few suffice.
_FORM_WINDOWS = 4
# Sites more than the search found that a file over the budget may leave in half precision.
_MORE_SITES = 6
# What is looked at again in the rounded graph: it differs little from the inserted one.
_CHECKED_PROBES, _CHECKED_SINKS = 16, 8


class _Run(TypedDict):
    """How every observation runs."""

    providers: tuple[str, ...]
    progress: Progress


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on. `windows` measure ranges; `probes` are short ones that only add first
    tokens, since most sinks stand at position 0. `heldout` only tells how well sinks are found and
    matched on text that nothing was made from. `insertion` is of `--insertion`. With a finite
    `budget` (perplexity over the traced graph's) as few products as possible stay in half precision
    to keep within it."""

    windows: Sequence[Window]
    probes: Sequence[Window]
    max_relative_deviation: float
    seed: int
    providers: tuple[str, ...]
    heldout: Sequence[Window] = ()
    insertion: str = "auto"
    budget: float = math.inf

    @property
    def all(self) -> list[Window]:
        return [*self.windows, *self.probes]


class _Made:
    """What follows from `chosen`, `sites` and `traced` of a finished run."""

    chosen: Decisions
    sites: Sites
    traced: Path

    @property
    def sinks(self) -> list[SinkTemplates]:
        """The lifecycles that are replaced."""
        return list(self.chosen.sinks)

    @property
    def smoothing(self) -> Smoothing:
        return self.chosen.smoothing

    @property
    def scale_exponent(self) -> int:
        """The residual stream of what ships is divided by 2 to this power."""
        return self.chosen.exponent

    @property
    def recipe(self) -> Recipe:
        return self.chosen.recipe

    @property
    def blocks(self) -> Mapping[str, int]:
        """How many channels share a scale, by weight name, where the format has blocks."""
        return _weight_blocks(self.sites, self.recipe)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The products that are quantized."""
        return tuple(x for x in self.sites.linears if x.node not in self.chosen.left)

    def graph(self, stage: str) -> ir.Model:
        """The graph at a stage of `passes/order.py`, in memory, its constants lazy."""
        return lower(begin(io.load(self.traced))[0], self.chosen, stage).model

    def write(self, stage: str, path: Path) -> Path:
        """Write the graph at a stage with all its weights, for people and for tests."""
        io.save(self.graph(stage), path)
        return path


@dataclass(frozen=True)
class Rewrite(_Made):
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


@dataclass(frozen=True)
class _Job:
    """What every step reads: the traced graph in memory, which no step changes."""

    base: Lowered
    data: Calibration
    stats: TokenStats
    options: _Run
    work: Path
    kept: Checkpoint

    @property
    def sites(self) -> Sites:
        return self.base.sites

    @property
    def traced(self) -> ir.Model:
        return self.base.model

    def at(self, stage: str, chosen: Decisions) -> ir.Model:
        return lower(self.base, chosen, stage).model


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
    base, shared = begin(io.load(traced))
    notes = _shared_note(shared)
    for note in notes:
        progress.note(note)
    for refusal in base.sites.refused:
        progress.note(f"left as it is: node {refusal.node}: {refusal.reason}")
    options = _Run(providers=data.providers, progress=progress)
    chosen = Decisions(recipe, dtype)
    _weight_blocks(base.sites, recipe)  # refuses a width that has none
    kept = kept or Checkpoint()
    store = CodeStore((kept.folder or work) / "codes")
    kept.given.update(recipe=recipe, activations=recipe.activations, codes=store)

    with progress.step("Observe tokens"):
        seen = kept.step("tokens", _observed, base, data, dtype, options)
    stats, before, tail = seen.stats, seen.before, Tail(base.model, seen.tail, data.providers)
    kept.given.update({f"before {name}": found for name, found in before.items()})
    job = _Job(base, data, stats, options, work, kept)
    if chosen.half:
        loud = _loud_attentions(job, seen.peaks)
        chosen = replace(chosen, scaled_queries=tuple(loud))
        if loud:
            notes.append(_loud_note(loud))
            progress.note(notes[-1])
    with progress.step("Fit sinks"):
        fits = kept.step(
            "fits", decide, job.traced, job.sites, discover(stats), stats, data.all,
            limit=data.max_relative_deviation, seed=data.seed, **options,
        )  # fmt: skip
    chosen, fits, power = kept.step("ranges", _prepared, job, chosen, fits)
    with progress.step("Insert sinks"):
        chosen = replace(chosen, sinks=tuple(_calibrated(job, chosen, fits)))
        chosen = kept.step("inserted", _restored, job, chosen, INSERTED)
        matching = kept.step("matching", _matching, job, chosen, seen.heldout)
    warnings = [seen.surprise] if seen.surprise else []
    warnings += _everyone(stats)
    warnings += sink_warnings(chosen.sinks, matching)
    for warning in warnings:
        progress.note(f"warning: {warning}")
    chosen, quantizers = _rounded(job, chosen, before, power, store)
    cache: dict[str, CacheScale] = {}
    if recipe.cache is not None:
        with progress.step("Calibrate the KV cache"):
            cache = kept.step("cache", _cache_scales, job, chosen)
        chosen = replace(chosen, cache={name: found.scale for name, found in cache.items()})
    with progress.step("Choose the insertion"):
        chosen, insertions = kept.step("forms", _formed, job, chosen, tail)
    mixed, reference = None, None
    everything = [Site(q.name, q.linears) for q in quantizers.values()]
    if math.isfinite(data.budget) and quantizers:
        with progress.step("Search a mixed plan"):
            reference = Reference.of(job.traced, data.windows, **options)
            mixed = kept.step("mixed", _mixed_plan, job, chosen, everything, reference)
            chosen, quantizers = _left(chosen, quantizers, mixed)
    with progress.step("Quantize"):
        ranges_before = chosen.activations
        chosen, quantizers, recall, after = kept.step(
            "recall", _with_recall, job, chosen, quantizers
        )
        if chosen.sinks and (mixed is not None or chosen.activations != ranges_before):
            chosen = kept.step("restored", _restored, job, chosen, ROUNDED)
        if mixed is not None and reference is not None:
            chosen, quantizers, mixed = kept.step(
                "within", _within, job, chosen, quantizers, mixed, everything, reference
            )
            if not mixed.met:
                warnings.append(mixed.unmet())
                progress.note(f"warning: {warnings[-1]}")
        model, path = job.at(SHIPPED, chosen), work / MODEL
        io.save(model, path)
    with progress.step("Check the quantized graph"):
        check = kept.step("check", _checked, base, chosen, path, tail, data.windows, options)
        if warning := check.warning():
            warnings.append(warning)
            progress.note(f"warning: {warning}")
    first = min(_OBSERVED_WINDOWS, len(data.windows))
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
        sink_nodes=sum(node.domain == DOMAIN for node in model.graph),
        traced=traced,
        quantized=path,
        matching=matching,
        mixed=mixed,
        warnings=[*notes, *warnings],
        check=check,
    )


@dataclass(frozen=True)
class Recalled(_Made):
    """What an earlier compile decided, of which graphs are made again; `absmax` as in Rewrite."""

    chosen: Decisions
    sites: Sites
    traced: Path
    absmax: Mapping[str, float]


def recall(
    traced: Path, decide_for: Callable[[Sites], Decisions], absmax: Mapping[str, float]
) -> Recalled:
    """Decisions for the graph `traced`, with nothing lowered from them yet."""
    base, _ = begin(io.load(traced))
    return Recalled(decide_for(base.sites), base.sites, traced, absmax)


@dataclass(frozen=True)
class Carried(_Made):
    """A file that was lowered from decisions made earlier, as in Rewrite."""

    chosen: Decisions
    sites: Sites
    sink_nodes: int
    traced: Path
    quantized: Path
    check: FinalCheck
    warnings: list[str]


def carry(
    traced: Path,
    work: Path,
    decide_for: Callable[[Sites], Decisions],
    windows: Sequence[Window],
    *,
    providers: tuple[str, ...],
    progress: Progress,
) -> Carried:
    """Lower decisions that another compile made; nothing is calibrated, and the file is compared
    with fp32 on `windows` as always. `decide_for` gives them for the sites of `traced`.

    Raises GraphError as `rewrite` does.
    """
    base, shared = begin(io.load(traced))
    warnings = _shared_note(shared)
    for note in warnings:
        progress.note(note)
    for refusal in base.sites.refused:
        progress.note(f"left as it is: node {refusal.node}: {refusal.reason}")
    with progress.step("Quantize"):
        chosen = decide_for(base.sites)
        lowered = lower(base, chosen)
        for refusal in lowered.refused:
            progress.note(f"not rotated: node {refusal.node}: {refusal.reason}")
        model, path = lowered.model, work / MODEL
        io.save(model, path)
    with progress.step("Check the quantized graph"):
        options = _Run(providers=providers, progress=progress)
        tail = Tail.of_graph(base.model, short_windows(windows), **options)
        check = _checked(base, chosen, path, tail, windows, options)
        if warning := check.warning():
            warnings.append(warning)
            progress.note(f"warning: {warning}")
    sinks = sum(node.domain == DOMAIN for node in model.graph)
    return Carried(chosen, base.sites, sinks, traced, path, check, warnings)


def _checked(
    base: Lowered,
    chosen: Decisions,
    path: Path,
    tail: Tail,
    windows: Sequence[Window],
    options: _Run,
) -> FinalCheck:
    """The finished file against fp32; GraphError if it has lost everything."""
    check = final_check(tail, path, windows, block_parts(base.sites), **options)
    if check.lost >= MOST_LOST:
        inserted = lower(base, chosen, INSERTED).model
        raise GraphError(broken(check, inserted, path, base.sites, windows, **options))
    options["progress"].note(check.sentence())
    return check


def _shared_note(shared: Sequence[str]) -> list[str]:
    if not shared:
        return []
    return [
        f"{len(shared)} products share their weight with another, the first is {shared[0]}: each "
        "gets a copy of its own, since rounding and smoothing depend on what a product reads"
    ]


def _prepared(
    job: _Job, chosen: Decisions, fits: list[Decision]
) -> tuple[Decisions, list[Decision], dict[str, np.ndarray]]:
    """Scale, rotate and smooth; fit templates and thresholds on what comes of it.

    A lifecycle that smoothing hides from detection stays, and smoothing is chosen again with its
    tokens. The last value is the power of each product's input, by name (see `_smoothed`).
    """
    progress, recipe = job.options["progress"], chosen.recipe
    said = False
    while True:
        taken = [d.lifecycle for d in fits if d.replaced and _wanted(d, chosen)]
        exponent = stream_exponent(job.stats, taken) if chosen.half else 0
        chosen = replace(chosen, exponent=exponent, smoothing=Smoothing({}, {}), side={})
        # Tokens of a lifecycle that stays must be rounded well like all others.
        left_out = taken if recipe.sinks == "always" else []
        with progress.step("Observe ranges"):
            turned = lower(job.base, chosen, TURNED)
            chosen, power = _smoothed(job, turned.model, chosen, left_out)
        if not said:
            for refusal in turned.refused:
                progress.note(f"not rotated: node {refusal.node}: {refusal.reason}")
            said = True
        with progress.step("Smooth and rotate"):
            prepared = lower(turned, chosen, PREPARED).model
            found = refit(prepared, job.sites, fits, job.stats, job.data.all, **job.options)
        lost = [old for old, new in zip(fits, found, strict=True) if old.replaced > new.replaced]
        fits = found
        if not lost:
            return chosen, fits, power
        progress.note(_lost_note(lost))  # and now smoothing sees its tokens


def _smoothed(
    job: _Job, turned: ir.Model, chosen: Decisions, taken: Sequence[Lifecycle]
) -> tuple[Decisions, dict[str, np.ndarray]]:
    """Smoothing and side channels, decided behind each piece of the graph; and the mean square of
    every channel of a product's input, smoothed, where every token counts the same."""
    recipe, found = chosen.recipe, Smoothing({}, {})
    side: dict[str, np.ndarray] = {}
    power: dict[str, np.ndarray] = {}

    def decide_on(stats: dict[str, TensorStats]) -> None:
        nonlocal found
        if recipe.smoothing:
            more = find_smoothing(
                turned, job.sites, stats,
                rotation=recipe.rotation, rounding=recipe.rounding, side=recipe.side_channels,
            )  # fmt: skip
            found = found.with_more(more)
        loud = find_side_channels(job.sites, stats, found, recipe.side_channels)
        side.update((node, channels) for node, (_, channels) in loud.items())
        for name, its in stats.items() if recipe.activations is None else ():
            mean = (unit_rows(its.rows) ** 2).mean(0)
            power[name] = mean / found.factors(name) ** 2

    _ranges(job, turned, taken, decide_on)
    return replace(chosen, smoothing=found, side=side), power


def _calibrated(job: _Job, chosen: Decisions, fits: Sequence[Decision]) -> list[SinkTemplates]:
    """The templates of what is replaced, in the form that blocks are calibrated in."""
    int8_cache = chosen.recipe.cache is not None
    return [
        replace(
            fit.templates,
            form=calibrated_form(fit.templates, job.data.insertion, int8_cache=int8_cache),
        )
        for fit in fits
        if fit.templates and fit.replaced and _wanted(fit, chosen)
    ]


def _rounded(
    job: _Job,
    chosen: Decisions,
    before: Mapping[str, TensorStats],
    power: Mapping[str, np.ndarray],
    store: CodeStore,
) -> tuple[Decisions, dict[str, Quantizer]]:
    """Ranges of activations and codes of weights."""
    recipe, options = chosen.recipe, job.options
    if recipe.weights is None:
        return chosen, {}
    if recipe.activations is None and not recipe.gptq:
        nodes = {node.name: node for node in job.at(PREPARED, chosen).graph}
        for linear in job.sites.linears:
            weight = nodes[linear.node].inputs[1].const_value.numpy()
            store.add(linear.weight, *recipe.weights.round(weight, power[linear.input]))
        return replace(chosen, codes=store), {}
    with options["progress"].step("Calibrate quantizers"):
        quantizers = calibrate_blocks(
            job.at(INSERTED, chosen), job.sites, before, chosen.sinks, recipe,
            job.data.windows, store, seed=job.data.seed, kept=job.kept, **options,
        )  # fmt: skip
    activations = {name: q.scale for name, q in quantizers.items()}
    return replace(chosen, activations=activations, codes=store), quantizers


def _formed(job: _Job, chosen: Decisions, reference: Tail) -> tuple[Decisions, list[Insertion]]:
    """Every lifecycle in the form of least loss, on the quantized graph, with what it restores
    there: rounding and clipping move the sink rows too, by a constant. Ranges hold in every form,
    since semantic rows are the same."""
    windows = job.data.windows[:_FORM_WINDOWS]
    restored: dict[tuple[str, ...], Decisions] = {}
    with reference.stored_logits(windows, job.work / "logits") as exact:

        def loss(candidates: Sequence[SinkTemplates]) -> Divergence:
            tried = _restored(job, replace(chosen, sinks=tuple(candidates)), ROUNDED)
            restored[tuple(each.form for each in candidates)] = tried
            names = [index_name(number) for number in range(len(candidates))]
            return divergence(exact(), job.at(ROUNDED, tried), windows, names, **job.options)

        sinks, insertions = choose_forms(
            chosen.sinks, job.data.insertion, loss, int8_cache=chosen.recipe.cache is not None
        )
    found = restored.get(tuple(each.form for each in sinks))
    if found is None:
        found = _restored(job, replace(chosen, sinks=tuple(sinks)), ROUNDED)
    return found, insertions


def _with_recall(
    job: _Job, chosen: Decisions, quantizers: dict[str, Quantizer]
) -> tuple[Decisions, dict[str, Quantizer], float | None, TokenStats]:
    """Ranges that do not hide the sinks, the share of the sinks that is still found, and what the
    tokens of the first windows are like once sinks are inserted."""
    if not chosen.sinks:
        return chosen, quantizers, None, job.stats
    windows, probes = job.data.windows[:_OBSERVED_WINDOWS], job.data.probes[:_CHECKED_PROBES]
    sample = [*windows, *probes]
    inserted, tokens = job.at(INSERTED, chosen), TokenObserver(job.sites, windows)
    exact = FoundSinks(len(chosen.sinks), len(sample))
    observe(inserted, [exact, tokens], sample, **job.options)
    recall = recall_of(job.at(ROUNDED, chosen), exact, sample, **job.options)
    if recall is not None and recall < LEAST_RECALL:
        job.options["progress"].note(
            f"the clipped ranges hide {1 - recall:.0%} of the sinks: their clipping factors "
            "up to the birth are rejected"
        )
        quantizers = unclipped(quantizers, job.sites, chosen.sinks)
        scales = {name: q.scale for name, q in quantizers.items()}
        chosen = replace(chosen, activations={**chosen.activations, **scales})
        recall = recall_of(job.at(ROUNDED, chosen), exact, sample, **job.options)
    if recall is not None and recall < LEAST_RECALL:
        hiding = hiding_quantizer(inserted, job.sites, quantizers, exact, sample, **job.options)
        raise GraphError(hidden(recall, hiding, job.sites))
    return chosen, quantizers, recall, tokens.stats


def _within(
    job: _Job,
    chosen: Decisions,
    quantizers: dict[str, Quantizer],
    mixed: MixedPlan,
    everything: Sequence[Site],
    reference: Reference,
) -> tuple[Decisions, dict[str, Quantizer], MixedPlan]:
    """What ships measured against the budget. The search measures in float32 and with what was
    restored before: some sites more may have to be left."""
    mixed = mixed.shipped(*reference.ratio(job.at(SHIPPED, chosen), **job.options))
    for _ in range(_MORE_SITES):
        more = mixed.one_more(everything) if not mixed.met else None
        if more is None:
            break
        chosen, quantizers = _left(chosen, quantizers, more)
        if quantizers and chosen.sinks:
            chosen = _restored(job, chosen, ROUNDED)
        mixed = more.shipped(*reference.ratio(job.at(SHIPPED, chosen), **job.options))
    return chosen, quantizers, mixed


def _left(
    chosen: Decisions, quantizers: dict[str, Quantizer], mixed: MixedPlan
) -> tuple[Decisions, dict[str, Quantizer]]:
    """With the products of `mixed` in half precision, and the quantizers that are left."""
    left = frozenset(mixed.linears)
    kept = {name: q for name, q in quantizers.items() if not left & set(q.linears)}
    return replace(chosen, left=left), kept


@dataclass(frozen=True)
class _Seen:
    """What one walk over the traced graph tells: `stats` of the calibration's tokens and of those
    that were `heldout` (None: there are none), magnitudes of the products' inputs `before`
    anything is changed, a warning about the text, the largest q.k by `Attention` node (none unless
    half precision must hold them), and rows of the graph's `tail` on the first windows."""

    stats: TokenStats
    heldout: TokenStats | None
    before: dict[str, TensorStats]
    surprise: str | None
    peaks: dict[str, float]
    tail: list[Values]


def _observed(base: Lowered, data: Calibration, dtype: str, options: _Run) -> _Seen:
    first = min(_FORM_WINDOWS, len(data.windows))
    tokens = TokenObserver(base.sites, data.all)
    widths = {linear.input: linear.in_features for linear in base.sites.linears}
    magnitudes = MagnitudeObserver(widths, len(data.windows))
    surprise = SurpriseObserver(data.windows)
    tail = Tail(base.model, [{} for _ in range(first)], options["providers"])
    observers: list[Observer] = [tokens, magnitudes, surprise, tail]
    heldout = TokenObserver(base.sites, data.heldout, len(data.all)) if data.heldout else None
    observers += [] if heldout is None else [heldout]
    peaks = PeakObserver(base.model, first if dtype == "fp16" else 0, HALF_MAX / 2)
    observers.append(peaks)
    observe(base.model, observers, [*data.all, *data.heldout], **options)
    return _Seen(
        tokens.stats,
        heldout.stats if heldout is not None else None,
        magnitudes.stats,
        surprise.warning(),
        peaks.peaks,
        tail.rows,
    )


def _loud_attentions(job: _Job, peaks: Mapping[str, float]) -> dict[str, float]:
    """`Attention` nodes whose q.k, at most `peaks`, half precision may not hold before its scale
    -> the largest.

    Raises GraphError for one whose scores it cannot hold either.
    """
    nodes = {attended.node: attended for attended in attentions(job.traced)}
    for node, peak in peaks.items():
        if peak * nodes[node].scale > HALF_MAX:
            raise GraphError(scores_overflow(node, peak, nodes[node].scale, block_parts(job.sites)))
    return {node: peak for node, peak in peaks.items() if 2 * peak > HALF_MAX}


def _loud_note(loud: Mapping[str, float]) -> str:
    node = max(loud, key=lambda name: loud[name])
    return (
        f"half precision cannot hold the products of queries and keys in {len(loud)} attentions "
        f"before their scale (up to {loud[node]:.4g} in {node}): the power of two in the scale is "
        "applied to the query, exactly"
    )


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


def overflows_half(lifecycle: Lifecycle) -> bool:
    """Whether half precision may not hold the spike: within a factor 2 of its largest number."""
    return 2 * max(lifecycle.residual_peak, lifecycle.down_peak) > HALF_MAX


def quantized_graph(
    source: Graph,
    sites: Sites,
    scales: Mapping[str, float],
    rounding: Rounding = W8A8,
) -> ir.Model:
    """The float32 graph `source` with its weights rounded to nearest when it is saved; `scales` are
    those of activations."""
    model = copied(source) if isinstance(source, ir.Model) else io.load(source)
    quantize(model, QuantizePlan(tuple(sites.linears), rounding, scales))
    return model


def plain_half(rewrite: Rewrite | Recalled) -> ir.Model:
    """The baseline: the traced graph in half precision, whatever becomes of it."""
    model = io.load(rewrite.traced)
    to_half(model)
    return model


def round_to_nearest(rewrite: Rewrite | Recalled) -> ir.Model:
    """The baseline: the traced graph, absmax of all calibration tokens, nothing else."""
    scales = {name: INT8.scale(absmax) for name, absmax in rewrite.absmax.items() if absmax}
    base, _ = begin(io.load(rewrite.traced))
    model = quantized_graph(base.model, base.sites, scales)
    if rewrite.chosen.half:
        to_half(model)
    return model


def _matching(job: _Job, chosen: Decisions, stats: TokenStats | None) -> list[MatchQuality]:
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


def _everyone(stats: TokenStats) -> list[str]:
    blocks = everyone_spikes(stats)
    if not blocks:
        return []
    return [
        f"every token spikes at the down-projection of block {', '.join(map(str, blocks))}: none "
        "can be told from the others, so there is no lifecycle and nothing is replaced there; "
        "calibrate on running text, if this is not the model's nature"
    ]


def _ranges(
    job: _Job,
    graph: Graph,
    taken: Sequence[Lifecycle],
    reduce: Callable[[dict[str, TensorStats]], object],
) -> None:
    """Hand statistics of every product's input to `reduce`, piece by piece.

    Tokens of the lifecycles `taken` are not semantic where these live; those of others stay and
    must be rounded well like all else.
    """
    linears, stats = job.sites.linears, job.stats
    spiking = {linear.input: np.zeros(stats.token.size, bool) for linear in linears}
    for lifecycle in taken:
        for scope, members in lifecycle.scopes(job.sites):
            for linear in linears:
                if linear.node in scope:
                    spiking[linear.input][members] = True
    widths = {linear.input: linear.in_features for linear in linears}
    observe_ranges(
        graph, widths, job.data.windows, lambda name, n, _: spiking[name][stats.window == n],
        seed=job.data.seed, reduce=reduce, **job.options,
    )  # fmt: skip


def _wanted(decision: Decision, chosen: Decisions) -> bool:
    """Whether the recipe replaces this spike, if it can be."""
    always = chosen.recipe.sinks == "always"
    return always or (chosen.half and overflows_half(decision.lifecycle))


def _lost_note(lost: Sequence[Decision]) -> str:
    births = ", ".join(str(decision.lifecycle.birth) for decision in lost)
    return (
        f"the spike born at block {births} stays, since smoothing hides its tokens from detection: "
        "smoothing is chosen again"
    )


def _cache_scales(job: _Job, chosen: Decisions) -> dict[str, CacheScale]:
    """Of every layer's keys and values; rows of replaced sinks are read from templates instead."""
    widths: dict[str, int] = {}
    indices: dict[str, list[str]] = {}
    sinks, windows = chosen.sinks, job.data.windows
    for block in job.sites.blocks:
        site = block.attention.attention
        if site is not None:  # else the pass says so
            passing = [n for n, s in enumerate(sinks) if block.index in s.lifecycle.insert_blocks]
            widths |= {site.key: site.key_features, site.value: site.value_features}
            indices |= {x: [index_name(n) for n in passing] for x in (site.key, site.value)}

    def rows(name: str, number: int, values: Mapping[str, np.ndarray]) -> np.ndarray:
        found = np.zeros(len(windows[number].ids), bool)
        for index in indices[name]:
            found |= values[index] > 0
        return found

    format_ = chosen.recipe.cache
    assert format_ is not None
    scales: dict[str, CacheScale] = {}

    def scale(stats: dict[str, TensorStats]) -> None:
        for name, its in stats.items():
            scales[name] = format_.scale(its.rows, its.absmax_semantic)

    observe_ranges(
        job.at(INSERTED, chosen), widths, windows, rows,
        always=[index_name(n) for n in range(len(sinks))], seed=job.data.seed, reduce=scale,
        **job.options,
    )  # fmt: skip
    return scales


def _weight_blocks(sites: Sites, recipe: Recipe) -> dict[str, int]:
    """Weight name -> channels that share a scale, where the format has blocks.

    Raises UsageError naming a weight whose width has none.
    """
    found: dict[str, int] = {}
    for linear in sites.linears:
        if recipe.weights is not None:
            recipe.weights.check(linear.weight, linear.in_features)
            block = recipe.weights.block(linear.in_features)
            found |= {} if block is None else {linear.weight: block}
    return found


def _restored(job: _Job, chosen: Decisions, stage: str) -> Decisions:
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


def _mixed_plan(
    job: _Job, chosen: Decisions, sites: Sequence[Site], reference: Reference
) -> MixedPlan:
    """The fewest products to leave out for the budget, measured with every weight rounded, in
    float32."""
    model = job.at(ROUNDED, chosen)
    names = [site.name for site in sites]
    add_switches(model, names)
    trial = Trial(model, names, reference, providers=job.options["providers"])

    def harm() -> dict[str, float]:
        found = {}
        for number, name in enumerate(names):
            found[name] = trial.harm(name)
            job.options["progress"].update(number + 1, len(names))
        return found

    return mixed_plan(
        sites, harm, job.data.budget, lambda skipped: trial.ratio({site.name for site in skipped})
    )


def _observed_after(
    stats: TokenStats, windows: int, quantizers: dict[str, Quantizer], sites: Sites
) -> dict[str, list[float]]:
    """As `_per_block`, with the down-projections' inputs as their quantizers see them."""
    observed = _per_block(stats, windows)
    after = {q.linears: q.after.absmax for q in quantizers.values()}
    downs = [after.get((block.mlp.output.node,)) for block in sites.blocks]
    if None not in downs:
        observed["down_proj_max_per_block"] = downs
    return observed


def _per_block(stats: TokenStats, windows: int) -> dict[str, list[float]]:
    """The largest magnitudes in the first windows."""
    columns = stats.window < windows
    return {
        "residual_max_per_block": stats.residual_max[:, columns].max(1).tolist(),
        "down_proj_max_per_block": stats.down_max[:, columns].max(1).tolist(),
    }
