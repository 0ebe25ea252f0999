"""Tiny random models of the decoder families that transformers has and `trace` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

VOCAB, WINDOW, ORIGINAL = 264, 9, 64
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
_ONE_KIND = {name: size for name, size in _SIZES.items() if name != "num_key_value_heads"}
_GPT = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}  # fmt: skip
# Keys of 24 features and values of 16.
_LATENT = {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
           "qk_rope_head_dim": 8, "v_head_dim": 16}  # fmt: skip
_DENSE = {"first_k_dense_replace": 3}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# Rotations that are stretched: beyond the original length, up to it, by a fixed factor.
ROTATIONS: dict[str, dict[str, Any]] = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": ORIGINAL},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "longrope": {"short_factor": [1 + 0.1 * i for i in range(8)],
                 "long_factor": [1 + 0.7 * i for i in range(8)],
                 "original_max_position_embeddings": ORIGINAL},
}  # fmt: skip


def config(name: str) -> Any:
    """The transformers config of a family, or of a Llama (Phi-3) with a stretched rotation."""
    import transformers as hf

    kind, _, rotation = name.partition("+")
    if rotation:
        rope = {"rope_type": rotation, "rope_theta": 10000.0, **ROTATIONS[rotation]}
        if kind == "phi3":
            original = rope["original_max_position_embeddings"]
            return hf.Phi3Config(
                **_SIZES, rope_parameters=rope, original_max_position_embeddings=original
            )
        return hf.LlamaConfig(**_SIZES, rope_parameters=rope)
    makers: dict[str, Callable[[], Any]] = {
        "apertus": lambda: hf.ApertusConfig(**_SIZES),
        "arcee": lambda: hf.ArceeConfig(**_SIZES),
        "biogpt": lambda: hf.BioGptConfig(**_ONE_KIND),
        "bart": lambda: hf.BartConfig(
            **{k: v for k, v in _ONE_KIND.items() if k not in ("hidden_size", "intermediate_size")},
            d_model=64, decoder_layers=3, decoder_attention_heads=4, decoder_ffn_dim=96,
        ),
        "bert": lambda: hf.BertConfig(**_ONE_KIND, is_decoder=True),
        "bitnet": lambda: hf.BitNetConfig(**_SIZES),
        "cohere": lambda: hf.CohereConfig(**_SIZES),
        "cohere2": lambda: hf.Cohere2Config(**_SIZES, sliding_window=WINDOW),
        "codegen": lambda: hf.CodeGenConfig(**_GPT, rotary_dim=8),
        "deepseek_v2-dense": lambda: hf.DeepseekV2Config(**_ONE_KIND, **_LATENT, **_DENSE),
        "deepseek_v3-dense": lambda: hf.DeepseekV3Config(**_ONE_KIND, **_LATENT, **_DENSE),
        "diffllama": lambda: hf.DiffLlamaConfig(**_SIZES),
        "ernie4_5": lambda: hf.Ernie4_5Config(**_SIZES, head_dim=16),
        "exaone4": lambda: hf.Exaone4Config(
            **_SIZES, sliding_window=WINDOW, sliding_window_pattern=2
        ),
        "falcon": lambda: hf.FalconConfig(**_ONE_KIND, multi_query=True, alibi=False),
        "falcon-grouped": lambda: hf.FalconConfig(
            **_ONE_KIND, num_kv_heads=2, alibi=False, new_decoder_architecture=True
        ),
        "gemma": lambda: hf.GemmaConfig(**_SIZES, head_dim=16),
        "gemma2": lambda: hf.Gemma2Config(
            **_SIZES, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16
        ),
        "gemma3": lambda: hf.Gemma3TextConfig(
            **_SIZES, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16,
            layer_types=_MIXED,
        ),
        "gemma4": lambda: hf.Gemma4TextConfig(
            **_SIZES, head_dim=16, global_head_dim=32, sliding_window=WINDOW, layer_types=_MIXED,
            hidden_size_per_layer_input=0,
        ),
        "glm": lambda: hf.GlmConfig(**_SIZES, head_dim=16),
        "glm4": lambda: hf.Glm4Config(**_SIZES, head_dim=16),
        "gpt2": lambda: hf.GPT2Config(**_GPT),
        "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**_GPT),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**_ONE_KIND, use_parallel_residual=False),
        "gpt_neox-parallel": lambda: hf.GPTNeoXConfig(**_ONE_KIND),
        "gptj": lambda: hf.GPTJConfig(**_GPT, rotary_dim=8),
        "granite": lambda: hf.GraniteConfig(
            **_SIZES, embedding_multiplier=12.0, residual_multiplier=0.22,
            attention_multiplier=0.02, logits_scaling=8.0,
        ),
        "helium": lambda: hf.HeliumConfig(**_SIZES, head_dim=16),
        "hunyuan": lambda: hf.HunYuanDenseV1Config(**_SIZES, head_dim=16),
        "llama": lambda: hf.LlamaConfig(**_SIZES),
        "llama4-dense": lambda: hf.Llama4TextConfig(
            **_SIZES, head_dim=16, intermediate_size_mlp=96, moe_layers=[], num_local_experts=1,
            attention_chunk_size=WINDOW, no_rope_layers=[1, 0, 1],
        ),
        "llama-bias": lambda: hf.LlamaConfig(
            **_SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
        ),
        "minicpm3": lambda: hf.MiniCPM3Config(**_ONE_KIND, **_LATENT),
        "ministral": lambda: hf.MinistralConfig(
            **_SIZES, head_dim=16, sliding_window=WINDOW, layer_types=_MIXED
        ),
        "mistral": lambda: hf.MistralConfig(**_SIZES, sliding_window=WINDOW),
        "mistral-wide": lambda: hf.MistralConfig(**_SIZES, sliding_window=200),
        "mixtral": lambda: hf.MixtralConfig(**_SIZES, num_local_experts=4),
        "modernbert-decoder": lambda: hf.ModernBertDecoderConfig(
            **_ONE_KIND, local_attention=2 * WINDOW
        ),
        "nemotron": lambda: hf.NemotronConfig(**_SIZES),
        "olmo": lambda: hf.OlmoConfig(**_SIZES),
        "olmo2": lambda: hf.Olmo2Config(**_SIZES),
        "olmo3": lambda: hf.Olmo3Config(**_SIZES, sliding_window=WINDOW),
        "opt": lambda: hf.OPTConfig(
            **{k: v for k, v in _ONE_KIND.items() if k != "intermediate_size"},
            ffn_dim=96, word_embed_proj_dim=64,
        ),
        "opt-behind": lambda: hf.OPTConfig(
            **{k: v for k, v in _ONE_KIND.items() if k != "intermediate_size"},
            ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=False,
        ),
        "persimmon": lambda: hf.PersimmonConfig(**_ONE_KIND),
        "phi": lambda: hf.PhiConfig(**_SIZES),
        "phi3": lambda: hf.Phi3Config(**_SIZES),
        "qwen2": lambda: hf.Qwen2Config(**_SIZES),
        "qwen2_moe": lambda: hf.Qwen2MoeConfig(
            **_SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
            shared_expert_intermediate_size=96,
        ),
        "qwen3": lambda: hf.Qwen3Config(**(_SIZES | {"num_key_value_heads": 1}), head_dim=32),
        "roberta": lambda: hf.RobertaConfig(**_ONE_KIND, is_decoder=True),
        "seed_oss": lambda: hf.SeedOssConfig(**_SIZES, head_dim=16),
        "smollm3": lambda: hf.SmolLM3Config(**_SIZES, no_rope_layer_interval=2),
        "stablelm": lambda: hf.StableLmConfig(**_SIZES),
        "stablelm-parallel": lambda: hf.StableLmConfig(**_SIZES, use_parallel_residual=True),
        "starcoder2": lambda: hf.Starcoder2Config(**_SIZES, sliding_window=WINDOW),
        "youtu": lambda: hf.YoutuConfig(**_ONE_KIND, **_LATENT),
        # Not traced, each for a reason of its own, which one block has.
        "bloom": lambda: hf.BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4),
        "gpt_neo": lambda: hf.GPTNeoConfig(
            vocab_size=VOCAB, hidden_size=64, num_layers=1, num_heads=4,
            max_position_embeddings=256, attention_types=[[["local"], 1]],
        ),
        "mpt": lambda: hf.MptConfig(vocab_size=VOCAB, d_model=64, n_layers=2, n_heads=4),
    }  # fmt: skip
    return makers[kind]()


# All that `trace` takes.
TRACED = (
    "apertus", "arcee", "biogpt", "bitnet", "cohere", "cohere2", "diffllama", "ernie4_5",
    "exaone4", "gemma", "gemma2", "gemma3", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox",
    "granite", "helium", "hunyuan", "llama", "llama+dynamic", "llama+linear", "llama+llama3",
    "llama+yarn", "llama-bias", "ministral", "mistral", "mistral-wide", "mixtral",
    "modernbert-decoder", "nemotron", "olmo", "olmo2", "olmo3", "opt", "persimmon", "phi", "phi3",
    "phi3+longrope", "qwen2", "qwen2_moe", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip

# Those whose blocks are not serial with a norm in front of each branch, or whose products, norms
# or attention the exporter leaves in pieces.
STRUCTURES = (
    "bart", "bert", "codegen", "cohere", "cohere2", "deepseek_v2-dense", "deepseek_v3-dense",
    "exaone4", "falcon", "falcon-grouped", "gemma4", "gpt2", "gpt_neox-parallel", "gptj",
    "llama4-dense", "minicpm3", "olmo2", "olmo3", "opt", "opt-behind", "phi", "stablelm-parallel",
    "youtu",
)  # fmt: skip


def model(name: str, *, noise: float = 0.1, seed: int = 7) -> Any:
    """A random model of a family; `noise` is added to every weight, and large weights make
    float32's own error large."""
    import torch
    import transformers as hf

    torch.manual_seed(seed)
    made = hf.AutoModelForCausalLM.from_config(config(name)).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return made
