"""Whether the quantized graph still finds its sinks, and which range hides those it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from iq_export.decide.budget import smallest_prefix
from iq_export.decide.job import OBSERVED_WINDOWS, Job
from iq_export.decide.quantizers import Quantizer
from iq_export.decisions import Decisions
from iq_export.errors import GraphError
from iq_export.formats.rounding import Rounding
from iq_export.graph.edit import copied
from iq_export.graph.sites import Sites
from iq_export.observe.samples import Sample
from iq_export.observe.token_stats import TokenObserver, TokenStats
from iq_export.observe.walk import Graph, Observer, Values, loaded, observe
from iq_export.passes.insert_sinks import index_name
from iq_export.passes.order import INSERTED, ROUNDED
from iq_export.passes.quantize import QuantizePlan, quantize
from iq_export.progress import Progress
from iq_export.sinks.templates import SinkTemplates

# Least share of the sinks that the quantized graph must still find.
LEAST_RECALL = 0.8
# Probes that are looked at again in the rounded graph: it differs little from the inserted one.
_CHECKED_PROBES = 16


def unclipped(
    quantizers: Mapping[str, Quantizer], sites: Sites, sinks: Sequence[SinkTemplates]
) -> dict[str, Quantizer]:
    """The absmax of all tokens for the quantizers that a detection lies behind."""
    last = max(templates.lifecycle.birth for templates in sinks)
    early = {
        linear.node
        for block in sites.blocks[: last + 1]
        for branch in block.branches
        for linear in branch.linears
    }
    return {
        name: replace(q, scale=q.format.scale(q.after.absmax), clip=1.0)
        if early & set(q.linears)
        else q
        for name, q in quantizers.items()
    }


def hiding_quantizer(
    inserted: Graph,
    sites: Sites,
    quantizers: Mapping[str, Quantizer],
    exact: FoundSinks,
    sample: Sequence[Sample],
    *,
    providers: Sequence[str],
    progress: Progress,
) -> Quantizer | None:
    """The first activation in graph order whose quantizer, with those before it, loses the sinks.

    None if it is no activation's doing: then weights or half precision hide them.
    """
    ordered = list(quantizers.values())

    def hides(count: int) -> bool:
        scales = {quantizer.name: quantizer.scale for quantizer in ordered[:count]}
        model = copied(loaded(inserted))
        rounding = Rounding(None, ordered[0].format)
        quantize(model, QuantizePlan(tuple(sites.linears), rounding, scales))
        recall = recall_of(model, exact, sample, providers=providers, progress=progress)
        return recall is not None and recall < LEAST_RECALL

    count = smallest_prefix(len(ordered), hides)
    return ordered[count - 1] if count else None


def hidden(recall: float, hiding: Quantizer | None, sites: Sites) -> str:
    """The sentence for a graph that does not find its sinks any more."""
    text = f"The quantized graph finds {recall:.0%} of the sinks, less than {LEAST_RECALL:.0%}: "
    if hiding is None:
        text += "its rounded weights hide them from detection, no single range does."
    else:
        block, kind = next(
            (block.index, branch.kind)
            for block in sites.blocks
            for branch in block.branches
            if {linear.node for linear in branch.linears} & set(hiding.linears)
        )
        text += (
            f"the range of tensor {hiding.name!r} (block {block}, {kind}) hides them from "
            f"detection: it ends at {hiding.scale * hiding.format.largest:.4g}, the tensor at "
            f"{hiding.after.absmax:.4g}."
        )
    return f"{text} Calibrate on text nearer to the model's use, or with more samples."


class FoundSinks(Observer):
    """Which tokens of the first `count` windows of a walk are sinks to a graph with `lifecycles`:
    `sinks` is bool `[seq]` by (index, window number)."""

    def __init__(self, lifecycles: int, count: int) -> None:
        self.names, self.of = [index_name(number) for number in range(lifecycles)], range(count)
        self.sinks: dict[tuple[str, int], np.ndarray] = {}

    def add(self, number: int, values: Values) -> None:
        self.sinks |= {(name, number): value > 0 for name, value in values.items()}


def recall_of(
    graph: Graph,
    exact: FoundSinks,
    sample: Sequence[Sample],
    *,
    providers: Sequence[str],
    progress: Progress,
) -> float | None:
    """R = |S_quant and S_fp| / |S_fp| of `graph` and of the inserted graph, whose sinks in `sample`
    are `exact`; None if there are none."""
    rounded = FoundSinks(len(exact.names), len(sample))
    observe(graph, [rounded], sample, providers=providers, progress=progress)
    found = sum(int(sinks.sum()) for sinks in exact.sinks.values())
    both = sum(int((sinks & rounded.sinks[key]).sum()) for key, sinks in exact.sinks.items())
    return both / found if found else None


def keep_recall(
    job: Job, chosen: Decisions, quantizers: dict[str, Quantizer]
) -> tuple[Decisions, dict[str, Quantizer], float | None, TokenStats]:
    """Ranges that do not hide the sinks, the share of the sinks that is still found, and what the
    tokens of the first windows are like once sinks are inserted."""
    if not chosen.sinks:
        return chosen, quantizers, None, job.stats
    windows, probes = job.data.windows[:OBSERVED_WINDOWS], job.data.probes[:_CHECKED_PROBES]
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
