"""Tiny random models of several families, made and traced once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

VOCAB = 96
WINDOW = 5
LAYERS = 4

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def tiny_config(family: str) -> Any:
    """A transformers config of a few thousand parameters; `gemma3` mixes two kinds of layers."""
    import transformers as hf

    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: hf.LlamaConfig(**_SIZES, tie_word_embeddings=True),
        "llama-bias": lambda: hf.LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
        "qwen2": lambda: hf.Qwen2Config(**_SIZES),
        "qwen3": lambda: hf.Qwen3Config(**_SIZES, head_dim=8),
        "mistral": lambda: hf.MistralConfig(**_SIZES, sliding_window=WINDOW),
        "starcoder2": lambda: hf.Starcoder2Config(**_SIZES),
        "phi3": lambda: hf.Phi3Config(**_SIZES),
        "gemma3": lambda: hf.Gemma3TextConfig(
            **_SIZES,
            head_dim=8,
            sliding_window=WINDOW,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
        ),
        "mamba": lambda: hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
        "t5": lambda: hf.T5Config(vocab_size=VOCAB, d_model=32, num_layers=1, num_heads=2, d_kv=16),
    }
    return makers[family]()


def tiny_tokenizer(folder: Path) -> None:
    """A word tokenizer with the words w0..w94, BOS w1, EOS w2."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"<unk>": VOCAB - 1}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="w1", eos_token="w2"
    ).save_pretrained(folder)


def make_folder(family: str, folder: Path) -> Path:
    """Save a random model of `family` with its tokenizer, as the hub would have it."""
    import torch
    import transformers as hf

    torch.manual_seed(7)
    config = tiny_config(family)
    kind = hf.AutoModelForSeq2SeqLM if family == "t5" else hf.AutoModelForCausalLM
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm weights away from 1 and logits away from ties.
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Hugging Face folder of a tiny model by family; tests must not write in it."""
    root, made = tmp_path_factory.mktemp("hf"), {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_folder(family, root / family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def traces(
    folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    """`TracedModel` of a tiny model by family; tests must not write in it."""
    from iq_export.model.load import resolve
    from iq_export.model.trace import trace

    root, made = tmp_path_factory.mktemp("traced"), {}

    def get(family: str) -> Any:
        if family not in made:
            made[family] = trace(resolve(str(folders(family))), root / family)
        return made[family]

    return get
