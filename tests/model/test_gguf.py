"""Every key and tensor of a GGUF file is applied, harmless, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iq_export.errors import ModelError
from iq_export.model.gguf import apply_keys
from iq_export.model.gguf_file import read_header, without_tokens
from iq_export.model.load import resolve
from tests.model.gguf_files import HEAD, SIZES, byte_tokens, random_model, write_gguf
from tests.model.whole import load_model

IDS = list(range(70, 200))
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LLAMA32 = LLAMA3 | {
    "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
Keys = Callable[[Any], None]


def rope_freqs(parameters: dict[str, Any]) -> np.ndarray:
    """`rope_freqs.weight` as the converter computes it, one frequency at a time."""
    factor, low, high = (parameters[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    length, out = parameters["original_max_position_embeddings"], []
    for frequency in 1 / parameters["rope_theta"] ** (np.arange(0, HEAD, 2) / HEAD):
        wave = 2 * math.pi / frequency
        smooth = (length / wave - low) / (high - low)
        middle = 1 / ((1 - smooth) / factor + smooth)
        out.append(1 if wave < length / high else factor if wave > length / low else middle)
    return np.asarray(out, np.float32)


def rope_keys(theta: float = 10000.0, **scaling: Any) -> Keys:
    def add(writer: Any) -> None:
        import gguf

        writer.add_rope_freq_base(theta)
        writer.add_rope_dimension_count(HEAD)
        if "type" in scaling:
            writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["type"]))
        for key, value in scaling.items():
            if key != "type":
                put = writer.add_uint32 if isinstance(value, int) else writer.add_float32
                put(f"{writer.arch}.rope.scaling.{key}", value)

    return add


def both(*adders: Keys) -> Keys:
    return lambda writer: [add(writer) for add in adders] and None


def make(name: str, **options: Any) -> Any:
    import transformers as hf

    sizes = SIZES | {"vocab_size": len(byte_tokens())} | options
    if name in ("StableLm", "Nemotron", "Starcoder2"):
        del sizes["rms_norm_eps"]
    if name not in ("Phi3", "StableLm", "Starcoder2"):
        sizes |= {"head_dim": HEAD}
    return random_model(
        getattr(hf, f"{name}Config" if "Gemma3" not in name else "Gemma3TextConfig")(**sizes)
    )


def difference(path: Path, reference: Any) -> float:
    """Largest logit error of the loaded file, as a fraction of the reference's range."""
    import torch

    ids = torch.tensor([IDS])
    with torch.no_grad():
        expected = reference(ids, use_cache=False).logits
        found = load_model(resolve(str(path))).model(ids, use_cache=False).logits
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


LONG = np.linspace(2, 9, 24).astype(np.float32)
SHORT = np.linspace(1, 1.5, 24).astype(np.float32)
PHI3_ROPE = ROPE | {
    "rope_type": "longrope", "short_factor": SHORT.tolist(), "long_factor": LONG.tolist(),
    "partial_rotary_factor": 0.75,
}  # fmt: skip


def phi3_keys(writer: Any) -> None:
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(48)
    writer.add_rope_scaling_orig_ctx_len(64)
    writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(4) / math.log(64)))
    writer.add_sliding_window(100)


def gemma_keys(writer: Any) -> None:
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_sliding_window(8)


def partial_keys(writer: Any) -> None:
    writer.add_rope_freq_base(3e4)
    writer.add_rope_dimension_count(HEAD // 2)
    writer.add_layer_norm_eps(1e-3)


CASES: dict[str, tuple[str, str, dict[str, Any], Keys, dict[str, np.ndarray]]] = {
    "plain": ("llama", "Llama", {"rope_parameters": ROPE}, rope_keys(), {}),
    "tied": ("llama", "Llama", {"rope_parameters": ROPE, "tie_word_embeddings": True},
             rope_keys(), {}),
    "theta": ("llama", "Llama", {"rope_parameters": ROPE | {"rope_theta": 5e5}},
              rope_keys(5e5, type="none"), {}),
    "linear": ("llama", "Llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}},
               rope_keys(type="linear", factor=4.0), {}),
    "yarn": ("llama", "Llama", {"rope_parameters": YARN},
             rope_keys(type="yarn", factor=4.0, original_context_length=16), {}),
    "yarn, its own magnitude": (
        "llama", "Llama",
        {"rope_parameters": YARN | {"attention_factor": 1.5 * (1 + 0.1 * math.log(4)),
                                    "beta_fast": 16.0}},
        rope_keys(type="yarn", factor=4.0, original_context_length=16, attn_factor=1.5,
                  yarn_beta_fast=16.0), {}),
    "llama3": ("llama", "Llama", {"rope_parameters": LLAMA3}, rope_keys(),
               {"rope_freqs.weight": rope_freqs(LLAMA3)}),
    "llama3, real sizes": ("llama", "Llama", {"rope_parameters": LLAMA32}, rope_keys(5e5),
                           {"rope_freqs.weight": rope_freqs(LLAMA32)}),
    "biases": ("llama", "Llama", {"rope_parameters": ROPE, "attention_bias": True,
                                  "mlp_bias": True}, rope_keys(), {}),
    "qwen2": ("qwen2", "Qwen2", {"rope_parameters": YARN},
              rope_keys(type="yarn", factor=4.0, original_context_length=16), {}),
    "qwen3": ("qwen3", "Qwen3", {"rope_parameters": ROPE | {"rope_theta": 1e6}},
              both(rope_keys(1e6), lambda w: w.add_key_length(HEAD)), {}),
    "phi3, longrope": (
        "phi3", "Phi3",
        {"rope_parameters": PHI3_ROPE, "original_max_position_embeddings": 64,
         "sliding_window": 100}, phi3_keys,
        {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG}),
    "gemma2": ("gemma2", "Gemma2",
               {"sliding_window": 8, "query_pre_attn_scalar": HEAD, "attn_logit_softcapping": 20.0,
                "final_logit_softcapping": 10.0, "rope_parameters": ROPE},
               both(gemma_keys, lambda w: w.add_attn_logit_softcapping(20.0),
                    lambda w: w.add_final_logit_softcapping(10.0)), {}),
    "gemma3": ("gemma3", "Gemma3Text",
               {"sliding_window": 8, "query_pre_attn_scalar": HEAD,
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {"sliding_attention": ROPE, "full_attention": {
                    "rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}},
               both(gemma_keys, rope_keys(1e6, type="linear", factor=8.0),
                    lambda w: w.add_array("gemma3.attention.sliding_window_pattern",
                                          [True, False])), {}),
    "stablelm": ("stablelm", "StableLm",
                 {"layer_norm_eps": 1e-3, "use_parallel_residual": False, "use_qkv_bias": True,
                  "rope_parameters": ROPE | {"rope_theta": 3e4, "partial_rotary_factor": 0.5}},
                 both(partial_keys, lambda w: w.add_parallel_residual(False)), {}),
    "nemotron": ("nemotron", "Nemotron",
                 {"norm_eps": 1e-3, "rope_parameters": ROPE | {
                     "rope_theta": 3e4, "partial_rotary_factor": 0.5}}, partial_keys, {}),
    "starcoder2": ("starcoder2", "Starcoder2",
                   {"norm_epsilon": 1e-3, "rope_parameters": ROPE | {"rope_theta": 3e4}},
                   both(rope_keys(3e4), lambda w: w.add_layer_norm_eps(1e-3)), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_file_computes_what_it_says(case: str, tmp_path: Path) -> None:
    architecture, name, options, keys, tensors = CASES[case]
    reference = make(name, **options)
    path = write_gguf(tmp_path / "m.gguf", architecture, reference, keys, tensors)
    assert difference(path, reference) < 1e-4


@pytest.mark.parametrize("case", ["llama3", "gemma3", "stablelm"])
def test_transformers_needs_no_token_to_read_the_keys(case: str, tmp_path: Path) -> None:
    """It takes 16 s for those of Qwen2.5."""
    from transformers import AutoConfig

    architecture, name, options, keys, tensors = CASES[case]
    path = write_gguf(tmp_path / "m.gguf", architecture, make(name, **options), keys, tensors)
    header = read_header(path)
    whole = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    with without_tokens(header, tmp_path) as outline:
        left = read_header(outline)
        config = AutoConfig.from_pretrained(outline.parent, gguf_file=outline.name)
    assert not outline.exists()
    assert left.tensors.keys() == header.tensors.keys()
    assert "tokenizer.ggml.tokens" in header.keys.keys() - left.keys.keys()
    apply_keys(header, whole)
    apply_keys(header, config)
    config._name_or_path = whole._name_or_path
    assert config.to_dict() == whole.to_dict()


@pytest.mark.parametrize("what", ["key", "tensor"])
def test_what_stands_in_a_file_twice_is_refused(what: str, tmp_path: Path) -> None:
    """transformers reads a copy of the keys: it would not notice."""
    reference = make("Llama", rope_parameters=ROPE)
    path = write_gguf(tmp_path / "m.gguf", "llama", reference, rope_keys())
    header, data = read_header(path), bytearray(path.read_bytes())
    begin, end = header.spans["llama.rope.freq_base"]
    if what == "tensor":
        begin, _ = header.listed
        end = begin + 8 + len(next(iter(header.tensors))) + 4 + 2 * 8 + 12  # of two axes
    data[end:end] = data[begin:end]
    count = slice(8, 16) if what == "tensor" else slice(16, 24)
    data[count] = (int.from_bytes(data[count], "little") + 1).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ModelError, match=f"the {what} .* stands in it twice"):
        read_header(path)


def test_a_file_that_stands_in_is_not_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", make("Llama", rope_parameters=ROPE))
    path.write_bytes(
        path.read_bytes().replace(b"\x04\0\0\0\0\0\0\0tiny", b"\x04\0\0\0\0\0\0\0t\xffny")
    )
    with pytest.raises(ModelError) as caught:
        load_model(resolve(str(path)))
    assert str(path) in str(caught.value) and str(caught.value).count(".gguf") == 2
    assert "tmp" not in str(caught.value).replace(str(tmp_path), "")


def test_scaling_matters_at_these_sizes(tmp_path: Path) -> None:
    """What the test above would see if a file's scaling were dropped."""
    reference = make("Llama", rope_parameters=LLAMA3)
    path = write_gguf(tmp_path / "m.gguf", "llama", reference, rope_keys())
    assert difference(path, reference) > 0.01


def key(name: str, value: Any) -> Keys:
    def add(writer: Any) -> None:
        rope_keys()(writer)
        full = name if name.startswith(("general.", "split.", "adapter.")) else f"llama.{name}"
        put = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string,
               list: writer.add_array}.get(type(value), writer.add_float32)  # fmt: skip
        put(full, value)

    return add


REFUSED: dict[str, tuple[str, Any]] = {
    "key of a later version": ("attention.wondrous", 3),
    "residual scale": ("residual_scale", 0.5),
    "embedding scale": ("embedding_scale", 12.0),
    "logit scale": ("logit_scale", 0.25),
    "attention scale": ("attention.scale", 0.5),
    "clamp": ("attention.clamp_kqv", 8.0),
    "ALiBi": ("attention.max_alibi_bias", 8.0),
    "not causal": ("attention.causal", False),
    "pooling": ("pooling_type", 1),
    "window": ("attention.sliding_window", 16),
    "softcap": ("final_logit_softcapping", 30.0),
    "experts": ("expert_count", 8),
    "prediction layers": ("nextn_predict_layers", 1),
    "another value width": ("attention.value_length", 32),
    "theta of windows": ("rope.freq_base_swa", 5000.0),
    "magnitude without yarn": ("rope.scaling.attn_factor", 1.2),
    "yarn's log multiplier": ("rope.scaling.yarn_log_multiplier", 0.1),
    "heads that differ": ("attention.head_count_per_layer", [2, 1]),
    "adapter": ("adapter.type", "lora"),
    "split": ("split.count", 2),
    "type": ("general.type", "mmproj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_applied_is_refused_by_name(case: str, tmp_path: Path) -> None:
    name, value = REFUSED[case]
    reference = make("Llama", rope_parameters=ROPE)
    path = write_gguf(tmp_path / "m.gguf", "llama", reference, key(name, value))
    named = {"adapter.type": "adapter", "split.count": "2 parts", "general.type": "mmproj"}
    with pytest.raises(ModelError, match=named.get(name, name)) as error:
        load_model(resolve(str(path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    (
        ("residual_scale", 1.0), ("attention.scale", HEAD**-0.5), ("expert_count", 0),
        ("general.something", 4.0), ("tensor_data_layout", "Meta AI original pth"),
        ("attention.key_length", HEAD), ("rope.scaling.finetuned", True), ("pooling_type", 0),
    ),
)  # fmt: skip
def test_what_changes_nothing_is_accepted(name: str, value: Any, tmp_path: Path) -> None:
    reference = make("Llama", rope_parameters=ROPE)
    path = write_gguf(tmp_path / "m.gguf", "llama", reference, key(name, value))
    assert difference(path, reference) < 1e-4


@pytest.mark.parametrize(
    ("name", "shape"),
    (
        ("blk.0.attn_output.scale", (128,)), ("blk.2.attn_norm.weight", (128,)),
        ("blk.0.ffn_gate.bias", (96,)), ("cls.weight", (4, 128)),
        ("rope_factors_short.weight", (32,)),
    ),
)  # fmt: skip
def test_a_tensor_that_is_not_used_is_refused(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    reference = make("Llama", rope_parameters=ROPE)
    extra = {name: np.ones(shape, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", "llama", reference, rope_keys(), extra)
    with pytest.raises(ModelError, match=name.removesuffix(".weight")):
        load_model(resolve(str(path)))


def test_frequencies_that_are_not_llama3_are_refused(tmp_path: Path) -> None:
    factors = np.linspace(1, 7, HEAD // 2).astype(np.float32) ** 2
    reference = make("Llama", rope_parameters=ROPE)
    path = write_gguf(
        tmp_path / "m.gguf", "llama", reference, rope_keys(), {"rope_freqs.weight": factors}
    )
    with pytest.raises(ModelError, match=r"rope_freqs\.weight"):
        load_model(resolve(str(path)))


def test_what_ends_a_text_goes_into_the_generation_config(tmp_path: Path) -> None:
    def end_of_turn(writer: Any) -> None:
        rope_keys()(writer)
        writer.add_eot_token_id(byte_tokens().index("<x2>"))

    reference = make("Llama", rope_parameters=ROPE)
    path = write_gguf(tmp_path / "m.gguf", "llama", reference, end_of_turn)
    model = load_model(resolve(str(path))).model
    assert model.generation_config.eos_token_id == [2, byte_tokens().index("<x2>")]
