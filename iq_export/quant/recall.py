"""Whether the quantized graph still finds its sinks, and which range hides those it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from iq_export.calibrate.data import Window
from iq_export.graph.edit import copied
from iq_export.graph.sites import Sites
from iq_export.observe.walk import Graph, loaded, walk
from iq_export.passes.insert_sinks import index_name
from iq_export.passes.quantize import FLOAT_BITS, QuantizePlan, quantize
from iq_export.progress import Progress
from iq_export.quant.blockwise import Quantizer
from iq_export.quant.budget import smallest_prefix
from iq_export.sinks.templates import SinkTemplates

# Least share of the sinks that the quantized graph must still find.
LEAST_RECALL = 0.8


def unclipped(
    quantizers: Mapping[str, Quantizer], sites: Sites, sinks: Sequence[SinkTemplates]
) -> dict[str, Quantizer]:
    """The absmax of all tokens for the quantizers that a detection lies behind."""
    last = max(templates.lifecycle.birth for templates in sinks)
    early = {
        linear.node
        for block in sites.blocks[: last + 1]
        for branch in (block.attention, block.mlp)
        for linear in branch.linears
    }
    return {
        name: replace(q, scale=q.after.absmax / q.most, clip=1.0) if early & set(q.linears) else q
        for name, q in quantizers.items()
    }


def hiding_quantizer(
    inserted: Graph,
    sites: Sites,
    quantizers: Mapping[str, Quantizer],
    lifecycles: int,
    sample: Sequence[Window],
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
        plan = QuantizePlan(
            tuple(sites.linears), FLOAT_BITS, scales, activation_max=ordered[0].most
        )
        quantize(model, plan)
        recall = recall_of(
            model, inserted, lifecycles, sample, providers=providers, progress=progress
        )
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
            for branch in (block.attention, block.mlp)
            if {linear.node for linear in branch.linears} & set(hiding.linears)
        )
        text += (
            f"the range of tensor {hiding.name!r} (block {block}, {kind}) hides them from "
            f"detection: it ends at {hiding.scale * hiding.most:.4g}, the tensor at "
            f"{hiding.after.absmax:.4g}."
        )
    return f"{text} Calibrate on text nearer to the model's use, or with more samples."


def recall_of(
    graph: Graph,
    inserted: Graph,
    lifecycles: int,
    sample: Sequence[Window],
    *,
    providers: Sequence[str],
    progress: Progress,
) -> float | None:
    """R = |S_quant and S_fp| / |S_fp| of `graph` and `inserted`; None if `sample` has no sinks."""
    if not lifecycles:
        return None
    names = [index_name(number) for number in range(lifecycles)]
    exact, rounded = (
        {
            (name, number): value > 0
            for number, values in walk(each, names, sample, providers=providers, progress=progress)
            for name, value in values.items()
        }
        for each in (inserted, graph)
    )
    found = sum(int(sinks.sum()) for sinks in exact.values())
    both = sum(int((sinks & rounded[key]).sum()) for key, sinks in exact.items())
    return both / found if found else None
