"""Choose the form of insertion of each lifecycle by its calibration loss."""

from __future__ import annotations

from iq_export.errors import GraphError
from iq_export.sinks.templates import KV, NORM, NORM_AND_KV, SinkTemplates


def possible_forms(
    templates: SinkTemplates, wanted: str, *, int8_cache: bool = False
) -> tuple[str, ...]:
    """The forms that `wanted` (see `--insertion`) leaves open, those that change least first.

    A sink's keys and values do not fit an int8 cache, so with `int8_cache` they are always
    templates. A spike that passes no block has none: it is taken out in its own. Raises GraphError
    if a form needs them and the attention is no single op.
    """
    if not templates.lifecycle.insert_blocks:
        return (NORM,)
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
