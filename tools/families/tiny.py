"""Tiny random models of any causal-LM type of transformers, made from its configuration class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iq_export.model.part import model_class
from iq_export.model.quiet import quiet

LAYERS = 2
# Sizes by the names that configurations give them, where `attribute_map` does not tell.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "word_embed_proj_dim",
         "hidden_dim", "dim_model", "lru_width", "attention_hidden_size", "embedding_dim"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner",
         "ffn_hidden_size", "moe_intermediate_size", "feed_forward_size", "dff", "dim_ff"), 128),
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers",
         "encoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(
        ("num_attention_heads", "num_heads", "n_head", "n_heads", "decoder_attention_heads",
         "encoder_attention_heads", "attention_heads", "num_decoder_attention_heads",
         "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads", "num_kv_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "dim_head", "v_head_dim", "kv_channels", "query_pre_attn_scalar",
         "global_head_dim", "d_kv", "attention_head_dim", "swa_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "index_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length",
         "model_max_length", "max_target_positions", "seq_length"), 256),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), 32),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    "n_shared_experts": 1,
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    "vocab_size": 512, "type_vocab_size": 2, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2, "image_size": 32, "patch_size": 16, "is_decoder": True,
    "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8,
}  # fmt: skip


# What the rules below do not give.
_MORE: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text", "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "vocab_size": 512, "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "dots3_note": {"text_config": None},  # the parts' sizes depend on each other: its defaults
    "dots3_note_text": {
        "num_key_value_heads": 4, "head_dim": 24, "qk_nope_head_dim": 16, "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
    },
    "emu3": {"vocabulary_map": {"<|extra_200|>": 3, "<image>": 4}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    # One product makes inputs of all layers, and counts as one of the blocks.
    "gemma4_text": {"num_hidden_layers": LAYERS + 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mllama_text_model": {"num_hidden_layers": LAYERS + 1, "cross_attention_layers": [1]},
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [32, 32],
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


class NotMade(Exception):
    """No tiny configuration or model of a type could be made, and why."""


def causal_lms() -> list[str]:
    """The model types of transformers' own mapping of causal LMs."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: str) -> Any:
    """A small configuration of the type, as its class saves it (no encoder's, where it has one).

    Raises NotMade.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with quiet():
        try:
            config = _of_class(CONFIG_MAPPING[kind], _MORE.get(kind, {}))
        except Exception as error:  # configurations raise what they like, and so do models
            raise NotMade(first_line(error)) from error
        try:
            with torch.device("meta"):
                saved = AutoModelForCausalLM.from_config(config).config
        except Exception:  # `write_model` says why, if the configuration is not refused
            return config
    return saved if saved.model_type == config.model_type else config


def write_model(config: Any, folder: Path) -> None:
    """Random weights for `config` in safetensors, and a tokenizer of 512 tokens, in `folder`."""
    import torch
    from transformers import PreTrainedTokenizerFast

    from tools.cost import small_tokenizer

    torch.manual_seed(7)
    try:
        with quiet(), torch.no_grad():
            model = model_class(config)._from_config(config).eval()
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            model.save_pretrained(folder)
    except Exception as error:  # as above
        raise NotMade(first_line(error)) from error
    PreTrainedTokenizerFast(
        tokenizer_object=small_tokenizer(), bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def first_line(error: BaseException) -> str:
    """What an exception says first, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {said or 'no message'}"


def _of_class(made: Any, more: Mapping[str, Any]) -> Any:
    """An instance of a configuration class with small sizes, in its parts too."""
    parts = getattr(made, "sub_configs", None) or {}
    default = made() if parts and not more.keys() & parts.keys() else None
    values: dict[str, Any] = {}
    called = {own: general for general, own in getattr(made, "attribute_map", {}).items()}
    for field in dataclasses.fields(made):
        value = _SIZES.get(field.name, _SIZES.get(called.get(field.name, "")))
        absent = field.default is None and "window" in field.name
        if value is not None and not absent:
            values[field.name] = value
    if "kv_lora_rank" in values:  # keys and values are made for every head of queries
        values["num_key_value_heads"] = values["num_attention_heads"]
    for part in parts:
        inner = getattr(default, part, None)
        if inner is not None:
            values[part] = _of_class(type(inner), _MORE.get(inner.model_type, {}))
    return made(**{**values, **more})
