"""Choose the form of insertion of each lifecycle by its calibration loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from iq_export.errors import GraphError
from iq_export.observe.divergence import Divergence
from iq_export.sinks.templates import KV, NORM, NORM_AND_KV, SinkTemplates

# Losses within 0.02 % of perplexity are equal: the form with the fewest changes is taken.
TIE_NATS = 2e-4


@dataclass(frozen=True)
class Insertion:
    """The form of one lifecycle, the loss of each form that was measured, and why it was chosen."""

    form: str
    loss: dict[str, Divergence]
    reason: str


def possible_forms(
    templates: SinkTemplates, wanted: str, *, int8_cache: bool = False
) -> tuple[str, ...]:
    """The forms that `wanted` (see `--insertion`) leaves open, those that change least first.

    A sink's keys and values do not fit an int8 cache, so with `int8_cache` they are always
    templates. Raises GraphError if a form needs them and the attention is no single op.
    """
    if wanted == "norm" or templates.key_values is None:
        forms: tuple[str, ...] = (NORM_AND_KV,) if int8_cache else (NORM,)
    elif wanted == "kv":
        forms = (KV,)
    else:
        forms = (NORM_AND_KV, KV) if int8_cache else (NORM, NORM_AND_KV, KV)
    if templates.key_values is None and (wanted == "kv" or forms != (NORM,)):
        life = templates.lifecycle
        what = "--insertion kv" if wanted == "kv" else "an int8 KV cache"
        raise GraphError(
            f"{what} writes keys and values of the sinks, but in blocks {life.birth + 1} to "
            f"{life.end} an attention is no single Attention op."
        )
    return forms


def calibrated_form(templates: SinkTemplates, wanted: str, *, int8_cache: bool = False) -> str:
    """The form that blocks are calibrated in before one is chosen: exact keys and values if they
    are possible, since behind an int8 quantizer others would be calibrated on clipped ones."""
    forms = possible_forms(templates, wanted, int8_cache=int8_cache)
    return NORM_AND_KV if NORM_AND_KV in forms else forms[0]


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
            reason = "asked for" if wanted != "auto" else "an attention is no single Attention op"
            chosen.append(Insertion(open_[0], {}, reason))
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


def _reason(losses: dict[str, Divergence], form: str) -> str:
    others = ", ".join(f"{name} {x.kl:.3g}" for name, x in losses.items() if name != form)
    text = f"KL to the traced graph {losses[form].kl:.3g} nats, {others}"
    if losses[form].kl > min(found.kl for found in losses.values()):
        text += f"; equal within {TIE_NATS:g}, and this form changes least"
    return text
