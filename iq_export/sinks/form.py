"""Choose the form of insertion of each lifecycle by its calibration loss (method.md step 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from iq_export.calibrate.divergence import Divergence
from iq_export.errors import GraphError
from iq_export.sinks.templates import KV, NORM, NORM_AND_KV, SinkTemplates

INSERTIONS = ("norm", "kv", "auto")
# Losses within 0.02 % of perplexity are equal: the norm form keeps what a sink still carries.
TIE_NATS = 2e-4

# Inserts the sinks, measures what they must restore, and the loss of the graph.
Measure = Callable[[Sequence[SinkTemplates]], tuple[list[SinkTemplates], Divergence]]


@dataclass(frozen=True)
class Insertion:
    """The form of one lifecycle, the loss of each form that was measured, and why it was chosen."""

    form: str
    loss: dict[str, Divergence]
    reason: str


def choose_forms(
    sinks: Sequence[SinkTemplates], wanted: str, measure: Measure, *, int8_cache: bool = False
) -> tuple[list[SinkTemplates], list[Insertion]]:
    """The sinks in their forms, measured, and one Insertion for each.

    `wanted` is one of INSERTIONS. With `int8_cache` the norm form writes keys and values as well,
    which the cache cannot hold. Each lifecycle is tried in both forms, the others as they are.

    Raises GraphError if a form needs keys and values and the attention is no single op.
    """
    norm = NORM_AND_KV if int8_cache else NORM
    if wanted == "kv" or (sinks and int8_cache):
        _require_key_values(sinks, "--insertion kv" if wanted == "kv" else "an int8 KV cache")
    current = [replace(templates, form=KV if wanted == "kv" else norm) for templates in sinks]
    if wanted != "auto":
        chosen = [Insertion(templates.form, {}, "asked for") for templates in current]
        return current, chosen
    if not any(templates.key_values for templates in sinks):
        reason = "the attention of its blocks is no single op, so only this form is possible"
        return current, [Insertion(norm, {}, reason) for _ in current]
    chosen = []
    current, loss = measure(current)
    for number, templates in enumerate(sinks):
        if templates.key_values is None:
            reason = "the attention of its blocks is no single op, so only this form is possible"
            chosen.append(Insertion(norm, {norm: loss}, reason))
            continue
        tried = list(current)
        tried[number] = replace(current[number], form=KV)
        tried, other = measure(tried)
        losses = {norm: loss, KV: other}
        if other.kl < loss.kl - TIE_NATS:
            current, loss = tried, other
            chosen.append(Insertion(KV, losses, _reason(losses, KV)))
        else:
            chosen.append(Insertion(norm, losses, _reason(losses, norm)))
    return current, chosen


def _reason(losses: dict[str, Divergence], form: str) -> str:
    (other,) = (name for name in losses if name != form)
    ours, theirs = losses[form].kl, losses[other].kl
    if abs(ours - theirs) <= TIE_NATS:
        return (
            f"KL to the traced graph {ours:.2g} nats, {other} {theirs:.2g}: equal within "
            f"{TIE_NATS:g}, and this form keeps what a sink still carries"
        )
    return f"KL to the traced graph {ours:.2g} nats, less than the {theirs:.2g} of {other}"


def _require_key_values(sinks: Sequence[SinkTemplates], what: str) -> None:
    for templates in sinks:
        if templates.key_values is None:
            life = templates.lifecycle
            raise GraphError(
                f"{what} writes keys and values of the sinks, but in blocks {life.birth + 1} to "
                f"{life.end} an attention is no single Attention op: export at opset 23."
            )
