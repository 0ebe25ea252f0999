"""`plan.json`: what was found, decided and measured, as data that can be read and diffed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from iq_export.decide.forms import Insertion
from iq_export.decide.matching import MatchQuality
from iq_export.decide.quantizers import Quantizer
from iq_export.decide.sinks import Decision
from iq_export.found import Names, found_record, in_float, token_record
from iq_export.graph import io
from iq_export.passes.fuse import fuse
from iq_export.pipeline import Rewrite
from iq_export.saved_decisions import record

_QUANTILE = 0.999


def plan_record(done: Rewrite, tokenizer: Names) -> dict[str, Any]:
    """The content of `plan.json`: JSON values only, magnitudes absolute, ratios as fractions.

    `found` is of the traced graph, before anything was changed."""
    lives = [decision.lifecycle for decision in done.decisions]
    return {
        "found": {
            **token_record(done.stats, lives, done.sites, tokenizer),
            "in_float": in_float(done.base(), done.sites),
        },
        "lifecycles": lifecycle_records(done, tokenizer),
        "sites": [
            {
                "block": block.index,
                "branch": branch.kind,
                "norm": branch.norm,
                "linears": [linear.node for linear in branch.linears],
                "residual": branch.residual,
            }
            for block in done.sites.blocks
            for branch in block.branches
        ],
        "refused": [{"node": r.node, "reason": r.reason} for r in done.sites.refused],
        "residual_scale": 2.0**-done.scale_exponent,
        "smoothing": {
            name: {"choice": c.name, "error": c.error, "error_without": c.error_without}
            for choices in (done.smoothing.norms, done.smoothing.paths)
            for name, c in choices.items()
        },
        "quantizers": [_quantizer_record(q) for q in done.quantizers.values()],
        "convolutions": {
            each.node: done.chosen.activations[each.input]
            for each in done.sites.convolutions
            if each.input in done.chosen.activations
        },
        "kv_cache": {name: asdict(found) for name, found in done.cache.items()},
        "mixed": mixed_record(done),
        "int4_blocks": done.blocks,
        "recall": done.recall,
        "fusion": fusion_record(done.quantized),
        "warnings": done.warnings,
        "decisions": record(done.chosen),
        "absmax": done.absmax,
        "observations": {
            key: {"before": done.observed_before[key], "after": done.observed_after[key]}
            for key in done.observed_before
        },
    }


def fusion_record(model: Path) -> dict[str, Any]:
    """What an engine with the plugin fuses in its copy of the graph; `model.onnx` is as it is."""
    fusion = fuse(io.load(model))
    return {
        "ops": dict(fusion.ops),
        "absorbed_sink_ops": fusion.absorbed,
        "left": [{"node": r.node, "reason": r.reason} for r in fusion.refused],
    }


def lifecycle_records(done: Rewrite, tokenizer: Names) -> list[dict[str, Any]]:
    """One record per lifecycle found, replaced or not."""
    return [_lifecycle_record(d, done, tokenizer) for d in done.decisions]


def mixed_record(done: Rewrite) -> dict[str, Any] | None:
    """What `--budget` left in half precision; ratios are calibration perplexity over the traced's.

    None without a budget.
    """
    mixed = done.mixed
    if mixed is None:
        return None
    total = len(done.linears) + len(mixed.linears)
    return {
        "budget": mixed.budget,
        "met": mixed.met,
        "ratio": mixed.ratio,
        "ratio_standard_error": mixed.error,
        "ratio_all_quantized": mixed.ratio_without,
        "products": total,
        "share_in_half": len(mixed.linears) / total,
        "in_half": [
            {"tensor": site.name, "products": list(site.linears), "harm": mixed.harm[site.name]}
            for site in mixed.skipped
        ],
        "harm": dict(mixed.harm),
    }


def _lifecycle_record(decision: Decision, done: Rewrite, tokenizer: Names) -> dict[str, Any]:
    life = decision.lifecycle
    pairs = enumerate(zip(done.sinks, done.insertions, strict=True))
    number, insertion = next(
        ((n, how) for n, (sinks, how) in pairs if sinks.lifecycle.same(life)), (-1, None)
    )
    record = found_record(decision, done.stats, tokenizer)
    if insertion is None:
        if decision.replaced:
            record["reason"] += "; half precision holds the spike, so this recipe leaves it"
        return record | {"replaced": False}
    record["insertion"] = _insertion_record(insertion)
    if done.matching:
        record["held_out"] = _matching(done.matching[number])
    return record


def _insertion_record(insertion: Insertion) -> dict[str, Any]:
    """Losses in nats: KL to the traced graph of all tokens and of semantic ones, and the NLL."""
    losses = {form: asdict(loss) for form, loss in insertion.loss.items()}
    return {"form": insertion.form, "loss": losses, "reason": insertion.reason}


def _matching(quality: MatchQuality) -> dict[str, Any]:
    return {
        **asdict(quality),
        "template_tokens": list(quality.template_tokens),
        "precision": quality.precision,
        "recall": quality.recall,
    }


def _quantizer_record(quantizer: Quantizer) -> dict[str, Any]:
    before, after = quantizer.before, quantizer.after
    return {
        "name": quantizer.name,
        "linears": list(quantizer.linears),
        "scale": quantizer.scale,
        "clip": quantizer.clip,
        "output_error": quantizer.output_error,
        "absmax_before": before.absmax,
        "absmax_after": after.absmax,
        "absmax_semantic": after.absmax_semantic,
        "p999_before": before.histogram.quantile(_QUANTILE),
        "p999_after": after.histogram.quantile(_QUANTILE),
    }
