"""What the names of a model's files tell, in a folder or on the hub, before any is read."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from typing import Any

from iq_export.errors import ModelError

INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_TOKENIZERS = (
    "tokenizer.json", "*.model", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json", "*vocab.txt",
)  # fmt: skip


def check_layout(
    names: Collection[str],
    where: str,
    config: Mapping[str, Any] | None,
    index: Mapping[str, Any] | None = None,
    *,
    tokenizer: bool = True,
    encoder: bool = False,
) -> None:
    """Refuse a set of files that is no causal LM's, or `encoder`'s, or from which weights or
    tokenizer are missing.

    `names` are the files at `where`, `config` and `index` the contents of config.json and of
    model.safetensors.index.json if there are such; `tokenizer` whether one must be among them.
    Raises ModelError, in one sentence that says what to do.
    """
    if config is None:
        raise ModelError(_no_config(names, where))
    if (
        "modules.json" in names
        and not encoder
        and "CausalLM" not in str(config.get("architectures"))
    ):
        raise ModelError(
            f"{where} is a sentence-transformers model (modules.json), which embeds text: compile "
            "it with --task feature-extraction."
        )
    _check_weights(names, where, index)
    if tokenizer and not _matching(names, _TOKENIZERS):
        raise ModelError(
            f"{where} has no tokenizer (tokenizer.json): give a folder that has one with "
            "--tokenizer DIR."
        )


def _no_config(names: Collection[str], where: str) -> str:
    if "model_index.json" in names:
        return (
            f"{where} is a diffusers pipeline (model_index.json); only causal LMs can be compiled."
        )
    inside = _matching(names, ("*.gguf", "*.onnx"))
    hint = f" Give the file: {where}/{inside[0]}." if inside else ""
    return f"{where} is not a Hugging Face model: it has no config.json.{hint}"


def _check_weights(names: Collection[str], where: str, index: Mapping[str, Any] | None) -> None:
    weights = _matching(names, ("*.safetensors",))
    if not weights and index is None:
        pickles = _matching(names, _PICKLES)
        if pickles:
            raise ModelError(
                f"{where} has its weights as {pickles[0]} only, which is not read because a pickle "
                "can run code: convert it to model.safetensors with transformers' save_pretrained."
            )
        raise ModelError(f"{where} has no weights: there is no model.safetensors in it.")
    shards = index.get("weight_map") if isinstance(index, Mapping) else None
    named = {str(shard) for shard in shards.values()} if isinstance(shards, Mapping) else set()
    absent = sorted(named - set(names))
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise ModelError(
            f"{where} is incomplete: {INDEX} names {absent[0]}{more}, which is not there; download "
            "it again."
        )


def _matching(names: Collection[str], patterns: Collection[str]) -> list[str]:
    return sorted(name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns))
