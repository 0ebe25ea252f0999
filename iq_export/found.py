"""What was found in a model before anything was changed, as JSON values: `analyze` shows it, and a
bundle's plan.json keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from iq_export.decide.matching import order_of_appearance
from iq_export.decide.sinks import Decision
from iq_export.graph.interface import Role, name_of
from iq_export.graph.sites import Sites
from iq_export.observe.token_stats import TokenStats
from iq_export.sinks.lifecycle import Lifecycle, everyone_spikes
from iq_export.sinks.templates import SinkTemplates

# Tokens of the window that is drawn, and channels that are named.
_SHOWN_TOKENS, _SHOWN_CHANNELS = 64, 8
# Of a token's text as a label.
_LABEL = 12


class Names(Protocol):
    """A tokenizer: the text of tokens, and how a special one is called."""

    def decode(self, ids: list[int]) -> str: ...
    def token(self, token: int) -> str | None: ...


class Unnamed:
    """Names for rows that are no tokens: patches and frames."""

    def decode(self, ids: list[int]) -> str:
        return ""

    def token(self, token: int) -> str:
        return "\N{MIDDLE DOT}"


def token_record(
    stats: TokenStats, lives: Sequence[Lifecycle], sites: Sites, tokenizer: Names
) -> dict[str, Any]:
    """Where tokens spike: magnitudes are absolute, blocks and positions count from 0, lifecycles
    from 1 (0: none)."""
    return {
        "tokens": int(stats.token.size),
        "blocks": len(sites.blocks),
        "hidden": sites.hidden,
        "sample": _sample(stats, lives, tokenizer),
        "channels": _channels(stats, lives, sites.hidden),
        "per_block": _per_block(stats, lives),
        "everyone": everyone_spikes(stats),
    }


def found_record(decision: Decision, stats: TokenStats, tokenizer: Names) -> dict[str, Any]:
    """A lifecycle as it was found and fitted on the traced graph; `replaced`: whether it can be."""
    life, fitted = decision.lifecycle, decision.templates
    record: dict[str, Any] = {
        "birth": life.birth,
        "death": life.death,
        "end": life.end,
        "channel": life.channel,
        "replaced": decision.replaced,
        "reason": decision.reason,
        "tokens": len(life.members),
        "at_position_0": float((stats.position[life.members] == 0).mean()),
        "common_tokens": [
            {"token": tokenizer.decode([token]), "first": first, "later": later}
            for token, first, later in life.common_tokens(stats)
        ],
        "down_proj_peak": life.down_peak,
        "down_proj_median": life.down_median,
        "residual_peak": life.residual_peak,
        "clamped_blocks": list(life.clamp_blocks),
        "threshold": fitted.threshold if fitted else life.threshold,
        "position_0_forced": life.force_first,
        "sites": _detections(decision),
    }
    if fitted is not None:
        record |= {
            "templates": fitted.count,
            "deviation": fitted.mean_deviation,
            "template_tokens": np.bincount(fitted.assignment, minlength=fitted.count).tolist(),
            "template_spread": fitted.template_spread,
            "thin_templates": [k + 1 for k in fitted.thin],
            "match_agreement": fitted.agreement,
            "order_of_appearance": _order(fitted, stats),
            "deviation_per_norm": fitted.deviation,
            "deviation_max_per_norm": fitted.deviation_max,
        }
        if fitted.key_values is not None:
            record |= {
                "deviation_per_key_value": fitted.key_values.deviation,
                "deviation_max_per_key_value": fitted.key_values.deviation_max,
            }
    return record


def _order(fitted: SinkTemplates, stats: TokenStats) -> dict[str, int]:
    """How often, in calibration, the paper's rule would give another template than the nearest."""
    index = np.zeros(stats.token.size, np.int64)
    index[fitted.lifecycle.members] = fitted.assignment + 1
    windows, differs = order_of_appearance(fitted.count, index, stats)
    return {"windows": windows, "differs": differs}


def _detections(decision: Decision) -> list[dict[str, Any]]:
    """Where the lifecycle's sinks are detected, in order; what a site found stays found."""
    life, fitted = decision.lifecycle, decision.templates
    sites = fitted.early if fitted else life.early
    thresholds = [site.threshold for site in sites]
    thresholds.append(fitted.threshold if fitted else life.threshold)
    forced = [*(site.force_first for site in life.early), life.force_first]
    return [
        {
            "block": block,
            "threshold": threshold,
            "tokens": len(members),
            "position_0_forced": force,
        }
        for (block, members), threshold, force in zip(
            life.detections, thresholds, forced, strict=True
        )
    ]


def _sample(stats: TokenStats, lives: Sequence[Lifecycle], tokenizer: Names) -> dict[str, Any]:
    """The beginning of the window that shows most lifecycles, then most of their tokens."""
    of = np.zeros(stats.token.size, int)  # the lifecycle of each token, from 1
    for number, life in reversed(list(enumerate(lives, start=1))):
        of[life.members] = number
    best, most = 0, (-1, -1)
    for window in range(int(stats.window[-1]) + 1):
        there = of[(stats.window == window) & (stats.position < _SHOWN_TOKENS)]
        score = (np.unique(there[there > 0]).size, int((there > 0).sum()))
        if score > most and (there.size == _SHOWN_TOKENS or not window):
            best, most = window, score
    shown = np.flatnonzero((stats.window == best) & (stats.position < _SHOWN_TOKENS))
    return {
        "window": best,
        "token_ids": stats.token[shown].tolist(),
        "tokens": [_label(int(token), tokenizer) for token in stats.token[shown]],
        "lifecycle": of[shown].tolist(),
        "residual_max": _rounded(stats.residual_max[:, shown]),
        "down_max": _rounded(stats.down_max[:, shown]),
    }


def _label(token: int, names: Names) -> str:
    """A token's text, what cannot be seen written out."""
    text = names.decode([token]) or names.token(token) or str(token)
    shown = text.strip() or repr(text)[1:-1].replace(" ", "\N{OPEN BOX}")
    return shown if len(shown) <= _LABEL else f"{shown[: _LABEL - 1]}…"


def _rounded(values: np.ndarray) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in values.tolist()]


def _channels(stats: TokenStats, lives: Sequence[Lifecycle], hidden: int) -> list[dict[str, Any]]:
    """The residual channels that reach the largest values: where, at how many tokens."""
    peak = np.zeros(hidden, np.float32)
    np.maximum.at(peak, stats.residual_channel, stats.residual_max)
    found = []
    for channel in np.argsort(-peak, kind="stable")[:_SHOWN_CHANNELS].tolist():
        largest = stats.residual_channel == channel
        block, token = divmod(int(np.where(largest, stats.residual_max, 0).argmax()),
                              stats.token.size)  # fmt: skip
        found.append({
            "channel": channel,
            "peak": float(peak[channel]),
            "block": block,
            "position": int(stats.position[token]),
            "tokens": int(largest.any(0).sum()),
            "lifecycles": [n for n, life in enumerate(lives, 1) if life.channel == channel],
        })  # fmt: skip
    return found


def _per_block(stats: TokenStats, lives: Sequence[Lifecycle]) -> dict[str, list[float]]:
    """The largest values of all tokens, of those that carry no spike there, and of the median
    token."""
    others = np.ones(stats.residual_max.shape, bool)
    for life in lives:
        first = life.detections[0][0]
        others[first : life.end + 1, life.members] = False
    found = {}
    for name, values in (("residual", stats.residual_max), ("down", stats.down_max)):
        found[f"{name}_max"] = values.max(1).tolist()
        found[f"{name}_max_without"] = np.where(others, values, 0).max(1).tolist()
        found[f"{name}_median"] = np.median(values, axis=1).tolist()
    return found


def in_float(model: ir.Model, sites: Sites) -> list[dict[str, str]]:
    """Products that no recipe quantizes, and why."""
    found = [asdict(refusal) for refusal in sites.refused]
    known = {linear.node for linear in sites.linears}
    routers = {linear.node for branch in sites.branches for linear in branch.routers}
    known |= {each.node for each in sites.convolutions}
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm", "Conv") and node.name not in known:
            if any(value.name == name_of(Role.LOGITS) for value in node.outputs):
                reason = "gives the logits: the head stays in half precision"
            elif node.name in routers:
                reason = "weighs experts: routers stay in float"
            elif _is_weighted(node):
                reason = "stands outside of the blocks that were understood"
            else:
                reason = "multiplies two activations"
            found.append({"node": str(node.name), "reason": reason})
    return found


def _is_weighted(node: ir.Node) -> bool:
    value = node.inputs[1]
    while value is not None and not value.is_initializer():
        made = value.producer()
        if made is None or made.op_type not in ("Transpose", "Cast"):
            return False
        value = made.inputs[0]
    return value is not None
