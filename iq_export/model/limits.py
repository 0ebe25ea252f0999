"""How many positions a model has, from its `config.json` alone: no weights, no transformers.

A hard limit is one beyond which the graph cannot give what the model gives: a table of positions
ends, or the rotation changes with the length of the call, which a cache of rotated keys cannot
follow. A soft limit is the length a model was made for: beyond it the graph still equals the
model, and both talk nonsense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Model types that look positions up in a table (learned, or sines computed once).
_TABLES = frozenset({
    "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot",
    "blenderbot-small", "clip_text_model", "codegen", "ctrl", "electra", "ernie", "gpt-sw3",
    "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "imagegpt", "marian", "mbart", "megatron-bert",
    "mvp", "openai-gpt", "opt", "pegasus", "plbart", "rembert", "roc_bert", "roformer",
    "siglip_text_model", "trocr", "xglm", "xlm",
})  # fmt: skip
# These call longrope by other names.
_LONGROPE_ALIASES = {"su": (), "yarn": ("phi3", "phi4_multimodal", "phimoe")}


@dataclass(frozen=True)
class PositionLimit:
    """The number of positions (tokens of past and sequence together) a model has, and why.

    `hard`: beyond it the graph is wrong; otherwise it is only longer than the model was made for.
    `reason` completes the sentence "at most N positions: ...".
    """

    positions: int
    hard: bool
    reason: str


def position_limit(config: Mapping[str, Any]) -> PositionLimit | None:
    """The limit that a `config.json` states, the lowest hard one first; None if it states none.

    `config` is as on disk or as transformers saves it: `rope_parameters` or the older
    `rope_scaling`, in one or by type of layer.
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping) and "max_position_embeddings" not in config:
        return position_limit(inner)
    kind = str(config.get("model_type") or "")
    trained = _size(config, "max_position_embeddings") or _size(config, "n_positions")
    if kind in _TABLES and trained:
        return table_limit(trained)
    hard = []
    for rope in _ropes(config):
        name = rope_type(rope, kind)
        if name == "longrope":
            # transformers puts the field of the model before that of the rotation.
            original = _size(config, "original_max_position_embeddings") or _size(
                rope, "original_max_position_embeddings"
            )
            if original:
                reason = "beyond them its rotation (longrope) changes for all tokens at once"
                hard.append(PositionLimit(original, True, reason))
        elif name == "dynamic" and trained:
            reason = "beyond them its rotation (dynamic NTK) changes with the length"
            hard.append(PositionLimit(trained, True, reason))
        elif name == "yarn" and trained:
            original = _size(rope, "original_max_position_embeddings") or trained
            factor = rope.get("factor")
            if isinstance(factor, (int, float)):
                trained = max(trained, int(original * factor))
    if hard:
        return min(hard, key=lambda limit: limit.positions)
    return PositionLimit(trained, False, "it was not made for more") if trained else None


def table_limit(rows: int) -> PositionLimit:
    """The limit of a model whose table of positions has `rows` rows."""
    return PositionLimit(rows, True, "its table of positions ends there")


def rope_type(rope: Mapping[str, Any], model_type: str) -> str:
    """The name of a rotation's scaling, aliases resolved; 'default' if it has none."""
    name = str(rope.get("rope_type") or rope.get("type") or "default")
    alias = _LONGROPE_ALIASES.get(name)
    return "longrope" if alias is not None and (not alias or model_type in alias) else name


def _ropes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every rotation's parameters: one, or one for each type of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        found = config.get(key)
        if not isinstance(found, Mapping):
            continue
        nested = [value for value in found.values() if isinstance(value, Mapping)]
        yield from nested or [found]


def _size(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return int(value) if whole and value is not None else None
