"""Choose the form of insertion of each lifecycle by its calibration loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from iq_export.decide.job import FORM_WINDOWS, Job
from iq_export.decide.restore import restored
from iq_export.decisions import Decisions
from iq_export.observe.divergence import Divergence, divergence
from iq_export.observe.tail import Tail
from iq_export.passes.insert_sinks import index_name
from iq_export.passes.order import ROUNDED
from iq_export.sinks.form import possible_forms
from iq_export.sinks.templates import SinkTemplates

# Losses within 0.02 % of perplexity are equal: the form with the fewest changes is taken.
TIE_NATS = 2e-4


@dataclass(frozen=True)
class Insertion:
    """The form of one lifecycle, the loss of each form that was measured, and why it was chosen."""

    form: str
    loss: dict[str, Divergence]
    reason: str


def formed(job: Job, chosen: Decisions, reference: Tail) -> tuple[Decisions, list[Insertion]]:
    """Every lifecycle in the form of least loss, on the quantized graph, with what it restores
    there: rounding and clipping move the sink rows too, by a constant. Ranges hold in every form,
    since semantic rows are the same."""
    windows = job.data.windows[:FORM_WINDOWS]
    known: dict[tuple[str, ...], Decisions] = {}
    with reference.stored_results(windows, job.work / "results") as exact:

        def loss(candidates: Sequence[SinkTemplates]) -> Divergence:
            tried = restored(job, replace(chosen, sinks=tuple(candidates)), ROUNDED)
            known[tuple(each.form for each in candidates)] = tried
            names = [index_name(number) for number in range(len(candidates))]
            return divergence(exact(), job.at(ROUNDED, tried), windows, names, **job.options)

        sinks, insertions = choose_forms(
            chosen.sinks, job.data.insertion, loss, int8_cache=chosen.recipe.cache is not None
        )
    found = known.get(tuple(each.form for each in sinks))
    if found is None:
        found = restored(job, replace(chosen, sinks=tuple(sinks)), ROUNDED)
    return found, insertions


def choose_forms(
    sinks: Sequence[SinkTemplates],
    wanted: str,
    loss: Callable[[Sequence[SinkTemplates]], Divergence],
    *,
    int8_cache: bool = False,
) -> tuple[list[SinkTemplates], list[Insertion]]:
    """The sinks in their forms, and one Insertion for each.

    `loss` measures the graph with the sinks in the forms it is given. Lifecycles are taken in
    order, each in every form that is possible while the others stay as they are.
    """
    forms = [possible_forms(templates, wanted, int8_cache=int8_cache) for templates in sinks]
    current = [replace(s, form=open_[0]) for s, open_ in zip(sinks, forms, strict=True)]
    chosen = []
    known: Divergence | None = None
    for number, open_ in enumerate(forms):
        if len(open_) == 1:
            chosen.append(Insertion(open_[0], {}, _only(sinks[number], wanted)))
            continue
        losses = {open_[0]: known or loss(current)}
        for form in open_[1:]:
            tried = list(current)
            tried[number] = replace(current[number], form=form)
            losses[form] = loss(tried)
        least = min(found.kl for found in losses.values())
        form = next(form for form in open_ if losses[form].kl <= least + TIE_NATS)
        current[number], known = replace(current[number], form=form), losses[form]
        chosen.append(Insertion(form, losses, _reason(losses, form)))
    return current, chosen


def _only(sinks: SinkTemplates, wanted: str) -> str:
    """Why there is one form alone."""
    if not sinks.lifecycle.insert_blocks:
        return "no product reads the spike, which is added back in front of the norm behind it"
    return "asked for" if wanted != "auto" else "an attention is no single Attention op"


def _reason(losses: dict[str, Divergence], form: str) -> str:
    others = ", ".join(f"{name} {x.kl:.3g}" for name, x in losses.items() if name != form)
    text = f"KL to the traced graph {losses[form].kl:.3g} nats, {others}"
    if losses[form].kl > min(found.kl for found in losses.values()):
        text += f"; equal within {TIE_NATS:g}, and this form changes least"
    return text
