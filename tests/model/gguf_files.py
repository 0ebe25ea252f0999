"""GGUF files written from tiny transformers models, the way llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, HEAD = 2, 64
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip


def byte_tokens() -> list[str]:
    """Four special tokens, the 256 bytes, one merge and three words."""
    from tokenizers import pre_tokenizers

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    return [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "<x1>", "<x2>", "<x3>"]


def random_model(config: Any) -> Any:
    """A transformers model with weights that tell every projection and norm apart."""
    import torch
    import transformers as hf

    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write_gguf(
    path: Path,
    architecture: str,
    model: Any,
    keys: Callable[[Any], None] = lambda writer: None,
    tensors: Mapping[str, np.ndarray] = {},
    tokens: bool = True,
) -> Path:
    """Write `model`'s weights and sizes, then what `keys` adds to the writer, and `tensors`."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    keys(writer)
    if tokens:
        texts = byte_tokens()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(texts)
        writer.add_token_merges(["t h"])
        writer.add_token_types([3] * 4 + [1] * (len(texts) - 4))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    kinds = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = value.numpy().astype(np.float32)
        short = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert short is not None, name
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            # llama.cpp keeps the two halves of a head's rows interleaved.
            values = values.reshape(-1, 2, HEAD // 2, *values.shape[1:]).swapaxes(1, 2)
            values = values.reshape(value.shape)
        if architecture.startswith(("gemma", "nemotron")) and "norm.weight" in name:
            values = values + 1
        writer.add_tensor(short, np.ascontiguousarray(values))
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_vocabulary(path: Path, keys: dict[str, Any]) -> Path:
    """Write a file of a tokenizer alone; `keys` stand below `tokenizer.ggml.`."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_head_count,
                writer.add_feed_forward_length, writer.add_block_count):  # fmt: skip
        add(8)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, value in keys.items():
        put = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        put.get(type(value), writer.add_array)(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
