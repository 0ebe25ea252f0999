"""What config.json tells: which models are refused before they are loaded, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iq_export import cost
from iq_export.cost import Shape
from iq_export.errors import IqError, ModelError, UsageError
from iq_export.model.layout import check_layout
from iq_export.model.support import check_support
from iq_export.recipe import load_recipe

W8A8, W4A16 = load_recipe("w8a8"), load_recipe("w4a16")
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip


def config(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, **SIZES, **changes}


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ModelError) as error:
        check_support(raw, "m", W8A8)
    text = str(error.value)
    assert text.count("\n") == 0 and text.endswith(".") and len(text) < 300, text
    return text


def test_a_plain_decoder_passes() -> None:
    found = check_support(config(attn_logit_softcapping=None), "m", W8A8)
    assert (found.layers, found.head_dim, found.softcap) == (2, 16, False)
    assert found.completed["rms_norm_eps"] == 1e-6
    # Embedding and head of 96 x 64, and 2 x (q, o 64 x 64; k, v 64 x 32; three of the MLP 64 x 128)
    block = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    assert found.shape == Shape(64, 2, 96, 2, block, (64, 64, 64, 128))
    assert found.shape.weights == 2 * 96 * 64 + 2 * block


def test_sizes_of_latents_are_read() -> None:
    sizes = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
    found = check_support(config("youtu", **sizes, v_head_dim=16, num_key_value_heads=4), "m", W8A8)
    assert found.head_dim == 12
    # 64 x 24, 24 x 4 x 12; 64 x 36, 32 x 4 x 24; 64 x 64; three of the MLP 64 x 128
    block = 64 * 24 + 24 * 48 + 64 * 36 + 32 * 96 + 64 * 64 + 3 * 64 * 128
    assert found.shape == Shape(64, 2, 96, 1, block, (64, 24, 32, 64, 64, 128))
    with pytest.raises(UsageError, match=r"24 inputs \(q_lora_rank\)"):
        check_support(config("youtu", **sizes), "m", W4A16)


def test_softcap_and_head_size_are_read() -> None:
    found = check_support(config("gemma2", head_dim=24), "m", W8A8)
    assert (found.head_dim, found.softcap) == (24, True)
    assert not check_support(config("gemma2", attn_logit_softcapping=None), "m", W8A8).softcap


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (config("gpt_oss", num_local_experts=4), "sinks of its own"),
        (config("jetmoe", num_local_experts=4), "attention is a mixture of experts"),
        ({"model_type": "dbrx"}, "takes its experts apart"),
        (config("bert", is_decoder=False), "it is an encoder"),
        ({"model_type": "openai-gpt", "n_embd": 64, "n_head": 4, "n_layer": 2}, "no cache"),
        ({"model_type": "bloom", "hidden_size": 64, "n_head": 4, "n_layer": 2}, "ALiBi"),
        ({"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2}, "ALiBi"),
        (config("falcon", alibi=True, multi_query=False), "ALiBi"),
        (config("bert"), "encoder"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "vit"}, "not a causal LM"),
        ({"model_type": "llama9000"}, "llama9000"),
        ({"model_type": "mamba"}, "state-space"),
        (config("roformer", is_decoder=True), "takes no 'position_ids'"),
        ({"model_type": "xlnet"}, "no cache of keys and values"),
        (config("doge"), "norms"),
        (config("qwen3_next"), "layers"),
        (config("qwen3_5_text"), "layers"),
        (config("lfm2", layer_types=["conv", "full_attention"]), "layers"),
        (config("granitemoehybrid", layer_types=["mamba", "attention"]), "layers"),
        (config("falcon_h1", mamba_d_ssm=128), "layers"),
        (config("bamba", attn_layer_indices=[1]), "layers"),
        (config("jamba"), "layers"),
        (config("falcon_h1", time_step_limit=[0.0, {"__float__": "Infinity"}]), "state-space"),
        (config("nemotron_h", hybrid_override_pattern="M*"), "layers"),
        (config("minimax"), "layers"),
        (config("recurrent_gemma"), "layers"),
        ({"model_type": "deepseek_v32"}, "'indexed_attention'"),
    ],
)
def test_architectures_that_cannot_be_compiled(raw: dict[str, Any], says: str) -> None:
    text = refusal(raw)
    assert says in text and "m " in text


@pytest.mark.parametrize(
    "raw",
    [
        config("gpt_neox"),
        config("gpt_neox", use_parallel_residual=False),
        config("stablelm"),
        config("stablelm", use_parallel_residual=True),
        config("phi", num_key_value_heads=4),
        config("cohere"),
        config("falcon", multi_query=True, new_decoder_architecture=False),
        config("olmo2"),
        config("opt", ffn_dim=128),
        config("opt", ffn_dim=128, do_layer_norm_before=False),
        config("bert", is_decoder=True),
        {"model_type": "bart", "is_encoder_decoder": False},
        {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 96},
        {"model_type": "gptj", "n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 96},
        config("qwen2", use_sliding_window=False),
        config("gemma3_text", layer_types=["sliding_attention", "full_attention"]),
        config("gpt_bigcode"),
        config("biogpt"),
        # Its outer class does not name the positions, and hands them down.
        {
            "model_type": "whisper",
            "is_encoder_decoder": False,
            "d_model": 64,
            "encoder_attention_heads": 4,
            "encoder_layers": 2,
            "vocab_size": 96,
        },
        config("phi3", pad_token_id=0),
        config("gemma4_text", head_dim=16, global_head_dim=32),
        config("deepseek_v3", first_k_dense_replace=2),
        config("llama4_text", moe_layers=[]),
        config("llama", rope_scaling={"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_what_compiles_is_not_refused(raw: dict[str, Any]) -> None:
    check_support(raw, "m", W8A8)


@pytest.mark.parametrize("name", [k for k in SIZES if k != "num_key_value_heads"])
@pytest.mark.parametrize("value", [0, -1, "64", 64.5, True, {"a": 1}])
def test_impossible_sizes(name: str, value: Any) -> None:
    assert f"'{name}' is {value!r}" in refusal(config(**{name: value}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_attention_heads": 5}, "heads (5)"),
        ({"num_attention_heads": 5, "model_type": "qwen2"}, "not divisible by 5 attention heads"),
        ({"num_key_value_heads": 3}, "4 attention heads are not divisible by 3"),
        ({"num_key_value_heads": 0}, "'num_key_value_heads' is 0"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' is None"),
        ({"head_dim": -16}, "'head_dim' is -16"),
        ({"hidden_act": 3}, "impossible"),
        ({"rms_norm_eps": "small"}, "impossible"),
        ({"rope_parameters": [1]}, "'rope_parameters' with value [1]"),
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "'rope_type' is 'foo'"),
        ({"hidden_act": "nope"}, "'hidden_act' is 'nope'"),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "full_attention": {"rope_type": "foo", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
            "'rope_type' is 'foo'",
        ),
    ],
)
def test_impossible_configurations(changes: dict[str, Any], says: str) -> None:
    assert says in refusal(config(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 10**12},
        {"hidden_size": 2**40},
        {"num_hidden_layers": 10**12},  # a list of so many kinds of layers is never made
        {"intermediate_size": 10**15},
    ],
)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_absurd_sizes_are_a_matter_of_memory(kind: str, changes: dict[str, Any]) -> None:
    text = refusal(config(kind, **changes))
    assert "GB of memory to be compiled, and this machine has" in text
    assert "compile on a larger one" in text


ODD: list[Any] = [None, 0, -1, 1.5, "x", True, [], {}, [1, "x"], {"a": {}}, 10**400, float("nan")]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "gpt_bigcode", "deepseek_v3"])
def test_odd_values_give_a_sentence_or_pass(kind: str) -> None:
    """Every entry that such a configuration has, by one odd value after the other."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from iq_export.model.limits import position_limit

    raw = {**CONFIG_MAPPING[kind](**SIZES).to_dict(), "model_type": kind}
    for name in raw.keys() - {"model_type"}:
        for value in ODD:
            for remote_code in (False, True):
                try:
                    found = check_support({**raw, name: value}, "m", W4A16, remote_code=remote_code)
                except IqError as error:
                    assert str(error).count("\n") == 0
                else:
                    position_limit(found.completed)


def test_int4_blocks_must_divide_every_width() -> None:
    check_support(config(), "m", W4A16)
    for changes in ({"intermediate_size": 96}, {"hidden_size": 96}, {"head_dim": 8}):
        raw = config(**changes)
        check_support(raw, "m", W8A8)
        with pytest.raises(UsageError, match="divisible by neither 128 nor 64"):
            check_support(raw, "m", W4A16)


def test_every_configuration_of_transformers_gets_a_sentence_or_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each with its own defaults, as a config.json holds them; some are larger than a machine."""
    monkeypatch.setattr(cost, "memory_and_swap_bytes", lambda: None)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    passed = set()
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if kind not in CONFIG_MAPPING:
            continue
        try:
            raw = CONFIG_MAPPING[kind]().to_dict()
        except Exception:
            raw = {}
        try:
            check_support({**raw, "model_type": kind}, kind, W8A8)
        except IqError as error:
            assert str(error).count("\n") == 0
        else:
            passed.add(kind)
    assert {"llama", "qwen2", "qwen3", "gemma3_text", "mistral", "phi3", "granite"} <= passed


def test_a_model_with_code_of_its_own_is_read_as_it_is() -> None:
    raw = config("their-own", auto_map={"AutoModelForCausalLM": "modeling.Theirs"})
    assert check_support(raw, "m", W8A8, remote_code=True).head_dim == 16
    with pytest.raises(ModelError, match="mixture of experts"):
        check_support({**raw, "num_experts": 8}, "m", W8A8, remote_code=True)


@pytest.mark.parametrize(
    ("names", "config", "index", "says"),
    [
        (["model_index.json"], None, None, "diffusers"),
        (["m.gguf"], None, None, "Give the file: F/m.gguf"),
        (["pytorch_model.bin"], {}, None, "convert it to model.safetensors"),
        (["tokenizer.json"], {}, None, "no weights"),
        (["modules.json", "model.safetensors"], {"architectures": ["BertModel"]}, None, "sentence"),
        (["model.safetensors"], {}, None, "no tokenizer"),
        (
            ["model-00001-of-00003.safetensors", "tokenizer.json"],
            {},
            {"weight_map": {f"w{i}": f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}},
            "names model-00002-of-00003.safetensors and 1 more",
        ),
    ],
)
def test_files_of_other_kinds(names: list[str], config: Any, index: Any, says: str) -> None:
    with pytest.raises(ModelError) as error:
        check_layout(names, "F", config, index)
    assert says in str(error.value) and str(error.value).count("\n") == 0


def test_files_of_a_causal_lm(tmp_path: Path) -> None:
    check_layout(["model.safetensors", "tokenizer.json"], "F", {})
    check_layout(["model.safetensors"], "F", {}, tokenizer=False)
    embedder = ["modules.json", "model.safetensors", "tokenizer.json"]
    check_layout(embedder, "F", {"architectures": ["Qwen3ForCausalLM"]})
