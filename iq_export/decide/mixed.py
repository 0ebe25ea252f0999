"""Leave products in half precision, as few as keep within the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from iq_export.decide.budget import MixedPlan, Site, mixed_plan
from iq_export.decide.job import Job
from iq_export.decide.quantizers import Quantizer
from iq_export.decide.restore import restored
from iq_export.decide.trial import Reference, Trial
from iq_export.decisions import Decisions
from iq_export.passes.order import ROUNDED, SHIPPED
from iq_export.passes.switches import add_switches

# Sites more than the search found that a file over the budget may leave in half precision.
_MORE_SITES = 6


def search_mixed_plan(
    job: Job, chosen: Decisions, sites: Sequence[Site], reference: Reference
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


def within_budget(
    job: Job,
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
        chosen, quantizers = leave_in_half(chosen, quantizers, more)
        if quantizers and chosen.sinks:
            chosen = restored(job, chosen, ROUNDED)
        mixed = more.shipped(*reference.ratio(job.at(SHIPPED, chosen), **job.options))
    return chosen, quantizers, mixed


def leave_in_half(
    chosen: Decisions, quantizers: dict[str, Quantizer], mixed: MixedPlan
) -> tuple[Decisions, dict[str, Quantizer]]:
    """With the products of `mixed` in half precision, and the quantizers that are left."""
    left = frozenset(mixed.linears)
    kept = {name: q for name, q in quantizers.items() if not left & set(q.linears)}
    return replace(chosen, left=left), kept
