"""Calibrate and rewrite: from the traced graph to the graph that ships, one file per stage.

Every stage reads and writes files of one work folder, so that each can be looked at, measured and
reused: traced -> rotated (weights only) -> prepared (scaled, rotated, smoothed, side paths) ->
inserted (sink ops) -> quantized.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import onnx_ir as ir

from iq_export.calibrate.attention import attentions, product_peaks
from iq_export.calibrate.data import Window
from iq_export.calibrate.divergence import Divergence, divergence
from iq_export.calibrate.ranges import (
    TensorStats,
    observe_ranges,
)
from iq_export.calibrate.text_check import surprise_warning
from iq_export.calibrate.token_stats import TokenStats, observe_tokens
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
from iq_export.formats.base import CacheFormat, CacheScale
from iq_export.formats.int8_activations import INT8
from iq_export.formats.rounding import W8A8, Rounding
from iq_export.graph import io
from iq_export.graph.half import HALF_MAX
from iq_export.graph.sites import Linear, Refusal, Sites, find_sites
from iq_export.passes.fold_rotation import rotate_attention_values, rotate_stream
from iq_export.passes.fold_smoothing import fold_smoothing
from iq_export.passes.insert_sinks import index_name, insert_sinks, set_restore
from iq_export.passes.level_rows import level_rows
from iq_export.passes.own_weights import own_weights
from iq_export.passes.quantize import QuantizePlan, quantize
from iq_export.passes.quantize_cache import quantize_cache
from iq_export.passes.rotate import rotate
from iq_export.passes.scale_query import scale_queries
from iq_export.passes.scale_residual import scale_residual
from iq_export.passes.side_channels import side_channels
from iq_export.passes.switches import add_switches
from iq_export.passes.to_half import to_half
from iq_export.progress import Progress
from iq_export.quant.blockwise import Codes, Quantizer, calibrate_blocks
from iq_export.quant.budget import MixedPlan, Site, mixed_plan
from iq_export.quant.recall import LEAST_RECALL, hidden, hiding_quantizer, recall_of, unclipped
from iq_export.quant.search import unit_rows
from iq_export.quant.smoothing import Smoothing, find_side_channels, find_smoothing
from iq_export.quant.trial import Reference, Trial
from iq_export.recipe import Recipe
from iq_export.sinks.calibrate import Decision, decide, refit, with_restore
from iq_export.sinks.form import Insertion, calibrated_form, choose_forms
from iq_export.sinks.lifecycle import Lifecycle, discover, everyone_spikes
from iq_export.sinks.ops import DOMAIN
from iq_export.sinks.quality import MatchQuality, measure, sink_warnings
from iq_export.sinks.templates import SinkTemplates

_UNSHARED = "unshared.onnx"
ROTATED, PREPARED = "rotated.onnx", "prepared.onnx"
INSERTED, QUANTIZED = "inserted.onnx", "quantized.onnx"
_PARTIAL = "partial.onnx"
_OBSERVED_WINDOWS = 4
# Windows on which the forms of insertion are compared; the loss is paired, so few suffice.
_FORM_WINDOWS = 4
# Sites more than the search found that a file over the budget may leave in half precision.
_MORE_SITES = 6
# ONNX Runtime on a CPU dequantizes all half weights in every run, however short: few runs.
_CHECKED_PROBES, _CHECKED_SINKS = 16, 8


class _Run(TypedDict):
    """How every observation runs."""

    providers: tuple[str, ...]
    progress: Progress


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on. `windows` measure ranges; `probes` are short ones that only add first
    tokens, since most sinks stand at position 0. `heldout` only tells how well sinks are found and
    matched on text that nothing was made from. `insertion` is one of form.INSERTIONS. With a finite
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


@dataclass(frozen=True)
class Rewrite:
    """Everything that was decided and measured on the way, and where the graphs lie.

    `matching`: one for each of `sinks`, empty without held-out text. `mixed`: what stays in half
    precision, None without a budget. `linears`: what is quantized. `warnings`: for people. The
    residual stream of all graphs but the traced one is divided by `2^scale_exponent`. `check`: the
    finished file against fp32.
    """

    sites: Sites
    stats: TokenStats
    decisions: list[Decision]
    sinks: list[SinkTemplates]
    insertions: list[Insertion]  # of `sinks`, in order
    scale_exponent: int
    recipe: Recipe
    smoothing: Smoothing
    quantizers: dict[str, Quantizer]
    cache: dict[str, CacheScale]  # by the name of a step's keys or values
    linears: tuple[Linear, ...]
    blocks: dict[str, int]
    before: dict[str, TensorStats]
    observed_before: dict[str, list[float]]
    observed_after: dict[str, list[float]]
    recall: float | None
    sink_nodes: int
    traced: Path
    inserted: Path
    quantized: Path
    matching: list[MatchQuality] = field(default_factory=list)
    mixed: MixedPlan | None = None
    warnings: list[str] = field(default_factory=list)
    check: FinalCheck | None = None


def rewrite(
    traced: Path, work: Path, recipe: Recipe, dtype: str, data: Calibration, progress: Progress
) -> Rewrite:
    """Run all stages. `traced` must lie in a folder of its own; `work` receives the graphs.

    Raises GraphError if the graph is not understood, not finite, or loses its sinks.
    """
    traced, notes = _unshared(traced)
    model = io.load(traced)
    sites = find_sites(model)
    for note in notes:
        progress.note(note)
    for refusal in sites.refused:
        progress.note(f"left as it is: node {refusal.node}: {refusal.reason}")
    options = _Run(providers=data.providers, progress=progress)

    blocks = _weight_blocks(sites, recipe)

    with progress.step("Observe tokens"):
        stats = observe_tokens(traced, sites, data.all, **options)
        surprise = surprise_warning(traced, data.windows, **options)
    half = dtype == "fp16"
    loud = _loud_attentions(traced, sites, data, options) if half else {}
    if loud:
        notes.append(_loud_note(loud))
        progress.note(notes[-1])
    with progress.step("Fit sinks"):
        decisions = decide(
            traced, sites, discover(stats), stats, data.all,
            limit=data.max_relative_deviation, seed=data.seed, **options,
        )  # fmt: skip
    turned = traced
    if recipe.folded_rotation:
        with progress.step("Fold rotations"):
            turned = work / ROTATED
            for refusal in _rotate(model, sites):
                progress.note(f"not rotated: node {refusal.node}: {refusal.reason}")
            io.save(model, turned)
    while True:
        taken = [d.lifecycle for d in decisions if d.replaced and _wanted(d, recipe, half)]
        exponent = stream_exponent(stats, taken) if half else 0
        # Tokens of a lifecycle that stays must be rounded well like all others.
        left_out = taken if recipe.sinks == "always" else []
        with progress.step("Observe ranges"):
            before = _ranges(traced, sites, left_out, stats, data, progress)
            ranges = before
            if turned != traced:
                ranges = _ranges(turned, sites, left_out, stats, data, progress)
        with progress.step("Smooth and rotate"):
            smoothing = _prepare(traced, work / PREPARED, sites, ranges, recipe, exponent, loud)
            found = refit(work / PREPARED, sites, decisions, stats, data.all, **options)
        lost = [
            new
            for old, new in zip(decisions, found, strict=True)
            if old.replaced and not new.replaced
        ]
        decisions = found
        if not lost:
            break
        progress.note(_lost_note(lost))  # and now smoothing sees its tokens
    with progress.step("Insert sinks"):
        int8_cache = recipe.cache is not None
        sinks = [
            replace(
                d.templates,
                form=calibrated_form(d.templates, data.insertion, int8_cache=int8_cache),
            )
            for d in decisions
            if d.templates and d.replaced and _wanted(d, recipe, half)
        ]
        _insert(work, sites, sinks)
        sinks = _restored(work, INSERTED, sites, sinks, stats, data, options)
        matching = _matching(traced, work, sites, sinks, data, options)
    warnings = [surprise] if surprise else []
    warnings += _everyone(stats)
    warnings += sink_warnings(sinks, matching)
    for warning in warnings:
        progress.note(f"warning: {warning}")
    quantizers: dict[str, Quantizer] = {}
    codes: Codes = {}
    if recipe.activations is not None or recipe.gptq:
        with progress.step("Calibrate quantizers"):
            quantizers, codes = calibrate_blocks(
                work / INSERTED, sites, before, sinks, recipe, data.windows,
                seed=data.seed, **options,
            )  # fmt: skip
    cache: dict[str, CacheScale] = {}
    if recipe.cache is not None:
        with progress.step("Calibrate the KV cache"):
            cache = _cache_scales(work / INSERTED, sites, sinks, recipe.cache, data, progress)
    importance = _importance(sites, ranges, smoothing, quantizers)

    def rounded(quantizers: Mapping[str, Quantizer], left: Collection[str] = ()) -> ir.Model:
        """The inserted graph with all that the recipe quantizes but the products `left`."""
        scales = {name: q.scale for name, q in quantizers.items()}
        model = quantized_graph(
            work / INSERTED, sites, scales, recipe.rounding, importance, left, codes
        )
        if recipe.cache is not None:
            found = {name: each.scale for name, each in cache.items()}
            quantize_cache(model, sites, found, recipe.cache)
        return model

    def write(quantizers: dict[str, Quantizer], left: Collection[str] = ()) -> None:
        model = rounded(quantizers, left)
        if half:
            to_half(model)
        io.save(model, work / QUANTIZED)

    def loss(candidates: Sequence[SinkTemplates]) -> Divergence:
        """Of the quantized graph: ranges hold in every form, since semantic rows are the same."""
        _insert(work, sites, candidates)
        write(quantizers)
        _restored(work, QUANTIZED, sites, candidates, stats, data, options)
        names = [index_name(number) for number in range(len(candidates))]
        windows = data.windows[:_FORM_WINDOWS]
        return divergence(traced, work / QUANTIZED, windows, names, **options)

    with progress.step("Choose the insertion"):
        first = [s.form for s in sinks]
        sinks, insertions = choose_forms(sinks, data.insertion, loss, int8_cache=int8_cache)
        _insert(work, sites, sinks)
        if [s.form for s in sinks] != first:  # what is restored was measured in the first form
            sinks = _restored(work, INSERTED, sites, sinks, stats, data, options)
    mixed: MixedPlan | None = None
    everything = [Site(q.name, q.linears) for q in quantizers.values()]
    if math.isfinite(data.budget) and quantizers:
        with progress.step("Search a mixed plan"):
            reference = Reference.of(traced, data.windows, **options)
            mixed = _mixed_plan(
                rounded(quantizers), work, everything, data.budget, reference, options
            )
        quantizers = _without(quantizers, mixed)
    in_half = frozenset(mixed.linears if mixed else ())
    graphs = work / QUANTIZED, work / INSERTED
    sample = [*data.probes[:_CHECKED_PROBES], *data.windows[:_OBSERVED_WINDOWS]]
    with progress.step("Quantize"):
        write(quantizers, in_half)
    with progress.step("Check the quantized graph"):
        recall = recall_of(*graphs, len(sinks), sample, **options)
        if recall is not None and recall < LEAST_RECALL:
            progress.note(
                f"the clipped ranges hide {1 - recall:.0%} of the sinks: their clipping factors "
                "up to the birth are rejected"
            )
            quantizers = unclipped(quantizers, sites, sinks)
            write(quantizers, in_half)
            recall = recall_of(*graphs, len(sinks), sample, **options)
        if recall is not None and recall < LEAST_RECALL:
            hiding = hiding_quantizer(
                work / INSERTED, sites, quantizers, len(sinks), sample, **options
            )
            raise GraphError(hidden(recall, hiding, sites))
        if quantizers and sinks:
            # Rounding and clipping move the sink rows too, by a constant: restore that as well.
            sinks = _restored(work, QUANTIZED, sites, sinks, stats, data, options)
        if mixed is not None:
            mixed = mixed.shipped(*reference.ratio(work / QUANTIZED, **options))
            # The search measures in float32 and with what was restored before: go on from there.
            for _ in range(_MORE_SITES):
                more = mixed.one_more(everything) if not mixed.met else None
                if more is None:
                    break
                in_half, quantizers = frozenset(more.linears), _without(quantizers, more)
                write(quantizers, in_half)
                if quantizers and sinks:
                    sinks = _restored(work, QUANTIZED, sites, sinks, stats, data, options)
                mixed = more.shipped(*reference.ratio(work / QUANTIZED, **options))
            if not mixed.met:
                warnings.append(mixed.unmet())
                progress.note(f"warning: {warnings[-1]}")
        shipped = work / QUANTIZED
        check = final_check(traced, shipped, data.windows, block_parts(sites), **options)
        if check.lost >= MOST_LOST:
            inserted = work / INSERTED
            raise GraphError(broken(check, inserted, shipped, sites, data.windows, **options))
        progress.note(check.sentence())
        if warning := check.warning():
            warnings.append(warning)
            progress.note(f"warning: {warning}")
    observed = data.windows[:_OBSERVED_WINDOWS]
    after = observe_tokens(work / INSERTED, sites, observed, **options) if sinks else stats
    columns = stats.window < len(observed)
    return Rewrite(
        sites=sites,
        stats=stats,
        decisions=decisions,
        sinks=sinks,
        insertions=insertions,
        scale_exponent=exponent,
        recipe=recipe,
        smoothing=smoothing,
        quantizers=quantizers,
        cache=cache,
        linears=tuple(linear for linear in sites.linears if linear.node not in in_half),
        blocks=blocks,
        before=before,
        observed_before=_per_block(stats, columns),
        observed_after=_observed_after(after, quantizers, sites),
        recall=recall,
        sink_nodes=sum(node.domain == DOMAIN for node in io.load(work / QUANTIZED).graph),
        traced=traced,
        inserted=work / INSERTED,
        quantized=work / QUANTIZED,
        matching=matching,
        mixed=mixed,
        warnings=[*notes, *warnings],
        check=check,
    )


def _unshared(traced: Path) -> tuple[Path, list[str]]:
    """A graph whose products share no weight, beside `traced` if that has some, and a note."""
    model = io.load(traced)
    changed = own_weights(model, find_sites(model))
    if not changed:
        return traced, []
    path = traced.with_name(_UNSHARED)
    io.save_skeleton(model, path)
    return path, [
        f"{len(changed)} products share their weight with another, the first is {changed[0]}: each "
        "gets a copy of its own, since rounding and smoothing depend on what a product reads"
    ]


def _loud_attentions(
    traced: Path, sites: Sites, data: Calibration, options: _Run
) -> dict[str, float]:
    """`Attention` nodes whose q.k half precision may not hold before its scale -> the largest.

    Raises GraphError for one whose scores it cannot hold either.
    """
    nodes = {attended.node: attended for attended in attentions(io.load(traced))}
    windows = short_windows(data.windows)
    peaks = product_peaks(traced, windows, HALF_MAX / 2, **options)
    for node, peak in peaks.items():
        if peak * nodes[node].scale > HALF_MAX:
            raise GraphError(scores_overflow(node, peak, nodes[node].scale, block_parts(sites)))
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
    source: Path,
    sites: Sites,
    scales: dict[str, float],
    rounding: Rounding = W8A8,
    importance: dict[str, np.ndarray] | None = None,
    left: Collection[str] = (),
    codes: Codes | None = None,
) -> ir.Model:
    """The float32 graph `source` with Q/DQ; weights are rounded when it is saved.

    `scales` are those of activations, `importance` of input channels, by weight. Products (node
    names) in `left` stay as they are.
    """
    model = io.load(source)
    linears = tuple(linear for linear in sites.linears if linear.node not in left)
    quantize(model, QuantizePlan(linears, rounding, scales, importance or {}, codes or {}))
    return model


def plain_half(rewrite: Rewrite, path: Path) -> None:
    """Write the baseline: the traced graph in half precision, whatever becomes of it."""
    model = io.load(rewrite.traced)
    to_half(model)
    io.save(model, path)


def round_to_nearest(rewrite: Rewrite, path: Path, dtype: str) -> None:
    """Write the baseline: the traced graph, absmax of all calibration tokens, nothing else."""
    scales = {
        name: INT8.scale(stats.absmax) for name, stats in rewrite.before.items() if stats.absmax
    }
    model = quantized_graph(rewrite.traced, rewrite.sites, scales)
    if dtype == "fp16":
        to_half(model)
    io.save(model, path)


def _matching(
    traced: Path,
    work: Path,
    sites: Sites,
    sinks: Sequence[SinkTemplates],
    data: Calibration,
    options: _Run,
) -> list[MatchQuality]:
    """How well the inserted graph finds and matches the sinks of held-out text, if there is any."""
    if not sinks or not data.heldout:
        return []
    stats = observe_tokens(traced, sites, data.heldout, **options)
    indices = [index_name(number) for number in range(len(sinks))]
    return measure(
        work / PREPARED, work / INSERTED, indices, sites, sinks, stats, data.heldout, **options
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
    graph: Path,
    sites: Sites,
    taken: Sequence[Lifecycle],
    stats: TokenStats,
    data: Calibration,
    progress: Progress,
) -> dict[str, TensorStats]:
    """Statistics of every product's input.

    Tokens of the lifecycles `taken` are not semantic where these live; those of others stay and
    must be rounded well like all else.
    """
    spiking = {linear.input: np.zeros(stats.token.size, bool) for linear in sites.linears}
    for lifecycle in taken:
        for scope, members in lifecycle.scopes(sites):
            for linear in sites.linears:
                if linear.node in scope:
                    spiking[linear.input][members] = True
    widths = {linear.input: linear.in_features for linear in sites.linears}
    return observe_ranges(
        graph, widths, data.windows, lambda name, n, _: spiking[name][stats.window == n],
        providers=data.providers, progress=progress, seed=data.seed,
    )  # fmt: skip


def _wanted(decision: Decision, recipe: Recipe, half: bool) -> bool:
    """Whether the recipe replaces this spike, if it can be."""
    return recipe.sinks == "always" or (half and overflows_half(decision.lifecycle))


def _lost_note(lost: Sequence[Decision]) -> str:
    births = ", ".join(str(decision.lifecycle.birth) for decision in lost)
    return (
        f"the spike born at block {births} stays, since smoothing hides its tokens from detection: "
        "smoothing is chosen again"
    )


def _rotate(model: ir.Model, sites: Sites) -> list[Refusal]:
    refused = rotate_stream(model, sites)
    return [*([refused] if refused else []), *rotate_attention_values(model, sites)]


def _prepare(
    traced: Path,
    path: Path,
    sites: Sites,
    stats: dict[str, TensorStats],
    recipe: Recipe,
    exponent: int,
    loud: Collection[str] = (),
) -> Smoothing:
    """Everything that keeps the function: scale, level rows, rotate, smooth, side paths."""
    model = io.load(traced)
    scale_residual(model, sites, exponent)
    scale_queries(model, loud)
    if recipe.folded_rotation:
        _rotate(model, sites)
    if recipe.activations is not None:
        level_rows(model, sites)
    smoothing = Smoothing({}, {})
    if recipe.smoothing:
        smoothing = find_smoothing(
            model, sites, stats,
            rotation=recipe.rotation, rounding=recipe.rounding, side=recipe.side_channels,
        )  # fmt: skip
        fold_smoothing(model, sites, smoothing)
    side_channels(model, find_side_channels(sites, stats, smoothing, recipe.side_channels))
    downs = {block.mlp.output.node: block.mlp.output for block in sites.blocks}
    size = recipe.rotation
    if size:
        rotate(model, {n: (d, size) for n, d in downs.items() if d.in_features % size == 0})
    io.save(model, path)
    return smoothing


def _insert(work: Path, sites: Sites, sinks: Sequence[SinkTemplates]) -> None:
    model = io.load(work / PREPARED)
    insert_sinks(model, sites, sinks)
    io.save_skeleton(model, work / INSERTED)


def _cache_scales(
    inserted: Path,
    sites: Sites,
    sinks: Sequence[SinkTemplates],
    cache: CacheFormat,
    data: Calibration,
    progress: Progress,
) -> dict[str, CacheScale]:
    """Of every layer's keys and values; rows of replaced sinks are read from templates instead."""
    widths: dict[str, int] = {}
    indices: dict[str, list[str]] = {}
    for block in sites.blocks:
        site = block.attention.attention
        if site is not None:  # else the pass says so
            passing = [n for n, s in enumerate(sinks) if block.index in s.lifecycle.insert_blocks]
            widths |= {site.key: site.key_features, site.value: site.value_features}
            indices |= {x: [index_name(n) for n in passing] for x in (site.key, site.value)}

    def rows(name: str, number: int, values: Mapping[str, np.ndarray]) -> np.ndarray:
        found = np.zeros(len(data.windows[number].ids), bool)
        for index in indices[name]:
            found |= values[index] > 0
        return found

    stats = observe_ranges(
        inserted, widths, data.windows, rows,
        always=[index_name(n) for n in range(len(sinks))], providers=data.providers,
        progress=progress, seed=data.seed,
    )  # fmt: skip
    return {name: cache.scale(found.rows, found.absmax_semantic) for name, found in stats.items()}


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


def _importance(
    sites: Sites,
    stats: dict[str, TensorStats],
    smoothing: Smoothing,
    quantizers: dict[str, Quantizer],
) -> dict[str, np.ndarray]:
    """Mean squared input per channel of every weight, as the prepared graph sees it."""
    seen = {node: q.after.rows for q in quantizers.values() for node in q.linears}
    found = {}
    for linear in sites.linears:
        if linear.node in seen:
            found[linear.weight] = (seen[linear.node] ** 2).mean(0)
        else:
            power = (unit_rows(stats[linear.input].rows) ** 2).mean(0)
            found[linear.weight] = power / smoothing.factors(linear.input) ** 2
    return found


def _restored(
    work: Path,
    graph: str,
    sites: Sites,
    sinks: Sequence[SinkTemplates],
    stats: TokenStats,
    data: Calibration,
    options: _Run,
) -> list[SinkTemplates]:
    """Measure what each lifecycle must restore on the file `graph`, and write it there.

    In order of their ends: a later life of the same tokens must find the earlier one restored.
    """
    measured = list(sinks)
    most = _CHECKED_SINKS if graph == QUANTIZED else None
    for number in sorted(range(len(sinks)), key=lambda n: sinks[n].lifecycle.end):
        (measured[number],) = with_restore(
            work / PREPARED,
            work / graph,
            sites,
            [sinks[number]],
            stats,
            data.all,
            most=most,
            **options,
        )
        model = io.load(work / graph)
        set_restore(model, measured)
        io.save_skeleton(model, work / graph)
    return measured


def _without(quantizers: dict[str, Quantizer], mixed: MixedPlan) -> dict[str, Quantizer]:
    """Those whose products `mixed` does not leave in half precision."""
    left = set(mixed.linears)
    return {name: q for name, q in quantizers.items() if not left & set(q.linears)}


def _mixed_plan(
    model: ir.Model,
    work: Path,
    sites: Sequence[Site],
    budget: float,
    reference: Reference,
    options: _Run,
) -> MixedPlan:
    """The fewest products to leave out for the budget, measured with every weight rounded.

    `model` is the fully quantized graph in float32, before it is halved.
    """
    names = [site.name for site in sites]
    add_switches(model, names)
    path = work / _PARTIAL
    io.save(model, path)
    trial = Trial(path, names, reference, providers=options["providers"])

    def harm() -> dict[str, float]:
        found = {}
        for number, name in enumerate(names):
            found[name] = trial.harm(name)
            options["progress"].update(number + 1, len(names))
        return found

    found = mixed_plan(
        sites, harm, budget, lambda skipped: trial.ratio({site.name for site in skipped})
    )
    path.unlink()
    path.with_name(path.name + ".data").unlink(missing_ok=True)
    return found


def _observed_after(
    stats: TokenStats, quantizers: dict[str, Quantizer], sites: Sites
) -> dict[str, list[float]]:
    """As `_per_block`, with the down-projections' inputs as their quantizers see them."""
    observed = _per_block(stats, stats.window < _OBSERVED_WINDOWS)
    after = {q.linears: q.after.absmax for q in quantizers.values()}
    downs = [after.get((block.mlp.output.node,)) for block in sites.blocks]
    if None not in downs:
        observed["down_proj_max_per_block"] = downs
    return observed


def _per_block(stats: TokenStats, columns: np.ndarray) -> dict[str, list[float]]:
    return {
        "residual_max_per_block": stats.residual_max[:, columns].max(1).tolist(),
        "down_proj_max_per_block": stats.down_max[:, columns].max(1).tolist(),
    }
