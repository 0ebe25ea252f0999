"""What a GGUF file says about its network, and that the loaded model does it.

transformers reads a few keys of a GGUF file and drops the others without a word: RoPE scaling,
partial rotation, soft caps, biases. Every key of the architecture's own namespace is therefore
applied to the configuration here, known to be harmless, or refused by name; and afterwards every
tensor of the file must be used and the rotary frequencies must be those that the file asks for.
The meaning of keys is llama.cpp's (src/llama-arch.cpp, src/llama-model.cpp and its converter).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iq_export.errors import ModelError
from iq_export.model.gguf_file import GgufHeader
from iq_export.model.gguf_tokenizer import special_ids

Array = NDArray[np.float64]

_FREQUENCIES = "rope_freqs.weight"
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"
_CLOSE = 1e-5

# Key -> the configuration's name for it, whichever it has.
_NAMES = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": (
        "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps",
    ),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "residual_scale": ("residual_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
}  # fmt: skip
# Keys that change nothing at these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
_HARMLESS = frozenset(("tensor_data_layout", "rope.scaling.finetuned"))
# Read by `_rope`, `_head_size` and `_windows`.
_ELSEWHERE = frozenset((
    "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "attention.key_length", "attention.value_length", "attention.scale",
    "attention.sliding_window", "attention.sliding_window_pattern",
))  # fmt: skip
# Families whose windows transformers applies as the key says.
_WINDOWED = ("gemma2", "gemma3_text", "gpt_oss", "mistral", "phi3", "starcoder2")
# Gemma models of so many layers scale attention by the width of a head of the residual stream.
_WIDE_GEMMA = {"gemma2": 46, "gemma3_text": 62}


def check_kind(header: GgufHeader) -> None:
    """Raise ModelError if a file is no whole model, or has a key that nothing here applies."""
    name, keys = header.path.name, header.keys
    kind = keys.get("general.type", "model")
    if kind != "model" or any(key.startswith("adapter.") for key in keys):
        kind = kind if kind != "model" else "adapter"
        raise ModelError(f"{name} is not a model but of type '{kind}': give the model itself.")
    parts = keys.get("split.count", 0)
    if parts > 1:
        raise ModelError(
            f"{name} is one of {parts} parts of a model: join them with llama-gguf-split --merge."
        )
    for key, value in _own_keys(header).items():
        if key not in _NAMES and not _is_known(key, value):
            raise _refused(header, key, value)


def apply_keys(header: GgufHeader, config: Any) -> None:
    """Make `config`, as transformers reads it, say what the file says.

    Raises ModelError for a key that cannot be applied, by name.
    """
    own = _own_keys(header)
    for key, value in own.items():
        if not _is_known(key, value):
            _set(header, config, key, value)
    tokens = header.keys.get("tokenizer.ggml.tokens")
    if "vocab_size" not in own and isinstance(tokens, list):
        config.vocab_size = len(tokens)
    if "attention.head_count_kv" not in own and hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = config.num_attention_heads
    if config.model_type == "falcon":
        config.multi_query = own.get("attention.head_count_kv") == 1
        config.new_decoder_architecture = own.get("attention.head_count_kv", 1) not in (
            1,
            config.num_attention_heads,
        )
    if hasattr(config, "attention_bias"):
        config.attention_bias = "blk.0.attn_q.bias" in header.tensors
    if hasattr(config, "mlp_bias"):
        config.mlp_bias = "blk.0.ffn_up.bias" in header.tensors
    special = special_ids(header)
    for name in ("bos", "eos", "pad"):
        # Otherwise they would be those of the family's first model.
        setattr(config, f"{name}_token_id", special.get(name))
    size = _head_size(header, config, own)
    _windows(header, config, own)
    _rope(header, config, own, size)


def check_loaded(header: GgufHeader, config: Any, model: Any) -> None:
    """Raise ModelError if a tensor of the file is not in the model, or a frequency is another."""
    unused = sorted(header.tensors.keys() - _used(header, model))
    if unused:
        raise ModelError(
            f"{header.path.name} holds {len(unused)} tensors that this version of transformers "
            f"does not use for '{config.model_type}', the first is '{unused[0]}': the model would "
            "be another one."
        )
    expected = _expected_rope(header, config)
    for name, buffer in model.named_buffers():
        if not name.endswith("inv_freq") or name.endswith("original_inv_freq"):
            continue
        layer_type = name.rsplit(".", 1)[-1].removesuffix("inv_freq").rstrip("_")
        frequencies, scaling = expected["sliding" if "sliding" in layer_type else "full"]
        owner = model.get_submodule(name.rsplit(".", 1)[0])
        found = buffer.double().numpy()
        found_scaling = getattr(owner, f"{layer_type}_attention_scaling".lstrip("_"), 1.0)
        same = found.shape == frequencies.shape and np.allclose(found, frequencies, _CLOSE, 0)
        if not same or not math.isclose(found_scaling, scaling, rel_tol=_CLOSE):
            raise ModelError(
                f"The rotary embedding of {header.path.name} does not come out as its keys "
                f"'{header.architecture}.rope.*' ask for; this file is not supported."
            )


def read_weights(
    header: GgufHeader, model: Any
) -> Iterator[tuple[str, NDArray[np.float32]]] | None:
    """Names in the transformers `model`, which may be on the meta device, and values of the file's
    tensors, one after the other. None if transformers has a reader of its own for such files.
    """
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.integrations.gguf.utils import is_gguf_arch_supported

    if is_gguf_arch_supported(header.architecture):
        return None
    try:
        names, processor = _names(header, model)
    except NotImplementedError:
        return None
    assert isinstance(processor, reader.TensorProcessor)

    def read() -> Iterator[tuple[str, NDArray[np.float32]]]:
        apart: dict[str, Any] = {}  # what a processor makes of several tensors, or names itself
        for name in header.tensors:
            made = processor.process(
                weights=header.read(name), name=name, tensor_key_mapping=names,
                parsed_parameters={"tensors": apart},
            )  # fmt: skip
            if made.name in names:
                yield names[made.name], made.weights
        for name, tensor in apart.items():
            yield name, tensor.numpy()

    return read()


def _names(header: GgufHeader, model: Any) -> tuple[dict[str, str], Any]:
    """The file's names of tensors -> those in `model`, and what makes the latter of the former.

    Raises NotImplementedError for an architecture whose names transformers does not know.
    """
    from transformers import modeling_gguf_pytorch_utils as reader

    kind = reader.TENSOR_PROCESSORS.get(header.architecture, reader.TensorProcessor)
    processor = kind(config=model.config.to_dict())
    # For a whole model it makes its table of names anew in every module, which takes half a minute.
    # Names are those of the model or of its body: that is tried first.
    names: dict[str, str] = {}
    body = model.base_model_prefix
    for prefix in ("", f"{body}."):
        module = SimpleNamespace(
            state_dict=lambda prefix=prefix: [
                name.removeprefix(prefix) for name in model.state_dict() if name.startswith(prefix)
            ],
            named_children=list,
            config=model.config,
        )
        found = reader.get_gguf_hf_weights_map(module, processor, qual_name=prefix)
        names = found | names
    if header.tensors.keys() - names.keys() - set(_factor_tensors(header)):
        names = reader.get_gguf_hf_weights_map(model, processor)
    return names, processor


def _own_keys(header: GgufHeader) -> dict[str, Any]:
    """The keys of the architecture's namespace, without it."""
    prefix = f"{header.architecture}."
    own = {k.removeprefix(prefix): v for k, v in header.keys.items() if k.startswith(prefix)}
    return {key: _single(header, key, value) for key, value in own.items()}


def _is_known(key: str, value: Any) -> bool:
    """Whether a key changes nothing, or is seen to by a function of its own."""
    return key in _HARMLESS or key in _ELSEWHERE or value in _NEUTRAL.get(key, ())


def _single(header: GgufHeader, key: str, value: Any) -> Any:
    """One value for all layers; a list that differs between layers is refused."""
    if not isinstance(value, list) or key in ("attention.sliding_window_pattern",):
        return value
    if value and all(item == value[0] for item in value):
        return value[0]
    raise _refused(header, key, value)


def _refused(header: GgufHeader, key: str, value: Any) -> ModelError:
    shown = f"{value[:8]}..." if isinstance(value, list) and len(value) > 8 else repr(value)
    return ModelError(
        f"{header.path.name} says {header.architecture}.{key} = {shown}, which cannot be applied "
        "here: the model would be another one. Give the original Hugging Face folder."
    )


def _set(header: GgufHeader, config: Any, key: str, value: Any) -> None:
    for name in _NAMES[key]:
        if hasattr(config, name):
            setattr(config, name, value)
            return
    implied = {
        "context_length": value,  # no position table and no RoPE: nothing depends on it
        "feed_forward_length": 4 * config.hidden_size,
        "attention.head_count_kv": config.num_attention_heads,
    }
    if implied.get(key) != value:
        raise _refused(header, key, value)


def _head_size(header: GgufHeader, config: Any, own: dict[str, Any]) -> int:
    """Width of a head; sets what depends on it."""
    heads = int(config.num_attention_heads)
    plain = int(config.hidden_size) // heads
    size = int(own.get("attention.key_length", plain))
    if own.get("attention.value_length", size) != size:
        raise _refused(header, "attention.value_length", own["attention.value_length"])
    if hasattr(config, "head_dim"):
        config.head_dim = size
    elif size != plain:
        raise _refused(header, "attention.key_length", size)
    usual = size**-0.5
    if hasattr(config, "query_pre_attn_scalar"):
        wide = _WIDE_GEMMA.get(config.model_type) == config.num_hidden_layers
        config.query_pre_attn_scalar = plain if wide else size
        usual = config.query_pre_attn_scalar**-0.5
    scale = own.get("attention.scale", 0.0)
    if scale and not math.isclose(scale, usual, rel_tol=_CLOSE):
        if hasattr(config, "query_pre_attn_scalar"):
            config.query_pre_attn_scalar = scale**-2
        elif hasattr(config, "attention_multiplier"):
            config.attention_multiplier = scale
        else:
            raise _refused(header, "attention.scale", scale)
    return size


def _windows(header: GgufHeader, config: Any, own: dict[str, Any]) -> None:
    window = own.get("attention.sliding_window", 0)
    pattern = own.get("attention.sliding_window_pattern")
    if window and config.model_type not in _WINDOWED:
        raise _refused(header, "attention.sliding_window", window)
    if window:
        config.sliding_window = window
    elif config.model_type in ("mistral", "phi3"):
        config.sliding_window = None
    if pattern is None:
        return
    layers = range(config.num_hidden_layers)
    if not isinstance(pattern, list):
        period = int(pattern)
        pattern = [period > 1 and i % period < period - 1 for i in layers]
    if not window and any(pattern):
        raise _refused(header, "attention.sliding_window_pattern", pattern)
    types = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    if getattr(config, "layer_types", None) is not None and len(types) == len(layers):
        config.layer_types = types
    elif window and not all(pattern):
        raise _refused(header, "attention.sliding_window_pattern", pattern)


def _rope(header: GgufHeader, config: Any, own: dict[str, Any], head_size: int) -> None:
    """Set `config.rope_parameters` from the file's keys and factor tensors."""
    current = getattr(config, "rope_parameters", None)
    asked = [key for key in own if key.startswith("rope.")]
    if current is None:
        scaled = _scaling(header, own) or _factor_tensors(header)
        if scaled or (asked and not hasattr(config, "rope_parameters")):
            raise _refused(header, asked[0] if asked else "rope", "of a model without RoPE")
        return
    nested = all(isinstance(value, dict) for value in current.values())
    sample = next(iter(current.values())) if nested else current
    parameters = {"rope_theta": float(own.get("rope.freq_base", 10000.0))}
    rotated = int(own.get("rope.dimension_count", head_size))
    if "partial_rotary_factor" in sample:
        parameters["partial_rotary_factor"] = rotated / head_size
        if hasattr(config, "partial_rotary_factor"):
            config.partial_rotary_factor = rotated / head_size
    elif rotated != head_size:
        raise _refused(header, "rope.dimension_count", rotated)
    base = parameters["rope_theta"] ** -(np.arange(0, rotated, 2) / rotated)
    parameters |= _scaling(header, own) or {"rope_type": "default"}
    tensors = _factor_tensors(header)
    if tensors and parameters["rope_type"] not in ("default", "longrope"):
        raise _refused(header, "rope.scaling.type", f"{parameters['rope_type']} with {tensors[0]}")
    if _FREQUENCIES in tensors:
        parameters |= _llama3(header, base)
    elif tensors:
        parameters |= _longrope(header, config, own)
    elif parameters["rope_type"] == "longrope":
        raise _refused(header, "rope.scaling.type", "longrope without its factors")
    if parameters["rope_type"] != "longrope" and parameters["rope_type"] != "yarn":
        factor = own.get("rope.scaling.attn_factor", 1.0)
        if factor not in (0.0, 1.0):
            raise _refused(header, "rope.scaling.attn_factor", factor)
    local_theta = own.get("rope.freq_base_swa", parameters["rope_theta"])
    if not nested and local_theta != parameters["rope_theta"]:
        raise _refused(header, "rope.freq_base_swa", local_theta)
    if nested:
        local = {"rope_type": "default", "rope_theta": own.get("rope.freq_base_swa", 10000.0)}
        parts = {"sliding_attention": local, "full_attention": parameters}
        if set(current) - set(parts):
            raise _refused(header, "rope", f"of layers {sorted(current)}")
        config.rope_parameters = {name: dict(parts[name]) for name in current}
    else:
        config.rope_parameters = parameters
    if hasattr(config, "rope_theta"):
        config.rope_theta = parameters["rope_theta"]


def _factor_tensors(header: GgufHeader) -> list[str]:
    return [name for name in (_FREQUENCIES, _SHORT, _LONG) if name in header.tensors]


def _scaling(header: GgufHeader, own: dict[str, Any]) -> dict[str, Any]:
    """`rope.scaling.*` in transformers' words; empty if there is none."""
    legacy = own.get("rope.scale_linear", 1.0)
    factor = own.get("rope.scaling.factor", legacy) or 1.0
    kind = own.get("rope.scaling.type", "none" if factor == 1.0 else "linear")
    trained = own.get("rope.scaling.original_context_length", own.get("context_length"))
    if kind == "longrope":
        return {"rope_type": "longrope"}
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    if kind != "yarn" or not trained:
        raise _refused(header, "rope.scaling.type", kind)
    return {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": int(trained),
        "attention_factor": float(_yarn_magnitude(own, factor)),
        "beta_fast": float(own.get("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": float(own.get("rope.scaling.yarn_beta_slow", 1.0)),
    }


def _yarn_magnitude(own: dict[str, Any], factor: float) -> float:
    asked = own.get("rope.scaling.attn_factor", 1.0) or 1.0
    return asked * (1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0)


def _llama3(header: GgufHeader, base: Array) -> dict[str, Any]:
    """The parameters of Llama 3's scaling whose factors a file carries instead of them.

    A factor is 1 for short wavelengths and `factor` for long ones. Between them 1 / factor is
    linear in 1 / wavelength, which gives the two borders; only their ratios to the original
    length count, so `low_freq_factor` is 1.
    """
    given = header.read_f32(_FREQUENCIES).reshape(-1).astype(np.float64)
    if given.shape != base.shape:
        raise ModelError(
            f"The tensor '{_FREQUENCIES}' of {header.path.name} has {given.size} values for "
            f"{base.size} rotary frequencies."
        )
    if np.all(given == 1):
        return {}
    factor = float(given.max())
    turns = base / (2 * np.pi)
    between = (given > 1 + 1e-6) & (given < factor * (1 - 1e-6))
    candidates = [(4.0, 8192)]
    if between.any() and factor > 1:
        share = (1 / given[between] - 1 / factor) / (1 - 1 / factor)
        if between.sum() > 1:
            slope, offset = np.polyfit(turns[between], share, 1)
            high, length = (1 - 1 / offset, -slope / offset) if offset < 0 else (0.0, 0.0)
        else:
            high, length = 4.0, float((share[0] * 3 + 1) / turns[between][0])
        candidates.append((round(high, 3), round(length)))
    for high, length in candidates:
        found = {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": float(high), "original_max_position_embeddings": int(length),
        }  # fmt: skip
        if high > 1 and length > 0 and np.allclose(_llama3_factors(base, found), given, 1e-4, 0):
            return found
    raise ModelError(
        f"The tensor '{_FREQUENCIES}' of {header.path.name} scales rotary frequencies in a way "
        "that is not Llama 3's; give the original Hugging Face folder."
    )


def _llama3_factors(base: Array, parameters: dict[str, Any]) -> Array:
    length = parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    share = np.clip((length * base / (2 * np.pi) - low) / (high - low), 0, 1)
    return 1 / ((1 - share) / parameters["factor"] + share)


def _longrope(header: GgufHeader, config: Any, own: dict[str, Any]) -> dict[str, Any]:
    if _SHORT not in header.tensors or _LONG not in header.tensors:
        raise _refused(header, "rope.scaling", f"{_factor_tensors(header)} alone")
    trained = own.get("rope.scaling.original_context_length")
    if not trained:
        raise _refused(header, "rope.scaling.original_context_length", trained)
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = int(trained)
    ratio = own["context_length"] / trained
    usual = math.sqrt(1 + math.log(ratio) / math.log(trained)) if ratio > 1 else 1.0
    return {
        "rope_type": "longrope",
        "short_factor": header.read_f32(_SHORT).reshape(-1).tolist(),
        "long_factor": header.read_f32(_LONG).reshape(-1).tolist(),
        "factor": float(ratio),
        "original_max_position_embeddings": int(trained),
        "attention_factor": float(own.get("rope.scaling.attn_factor", usual)),
    }


def _expected_rope(header: GgufHeader, config: Any) -> dict[str, tuple[Array, float]]:
    """Frequencies and magnitude as the file's keys give them, by the kind of layer."""
    own = _own_keys(header)
    heads = int(config.num_attention_heads)
    size = own.get("attention.key_length", int(config.hidden_size) // heads)
    rotated = int(own.get("rope.dimension_count", size))
    exponents = np.arange(0, rotated, 2) / rotated
    theta = own.get("rope.freq_base", 10000.0)
    full: Array = theta**-exponents
    magnitude = 1.0
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0)) or 1.0
    kind = own.get("rope.scaling.type", "linear")
    if _FREQUENCIES in header.tensors:
        full = full / header.read_f32(_FREQUENCIES).reshape(-1)
    elif _SHORT in header.tensors:
        full = full / header.read_f32(_SHORT).reshape(-1)
        magnitude = config.rope_parameters["attention_factor"]
    elif kind == "linear":
        full = full / factor
    elif kind == "yarn":
        trained = own.get("rope.scaling.original_context_length", own.get("context_length"))
        borders = [
            rotated * math.log(trained / (own.get(f"rope.scaling.yarn_beta_{n}", usual) * math.tau))
            / (2 * math.log(theta))
            for n, usual in (("fast", 32.0), ("slow", 1.0))
        ]  # fmt: skip
        low, high = max(math.floor(borders[0]), 0), min(math.ceil(borders[1]), rotated - 1)
        ramp = (np.arange(rotated // 2) - low) / max(0.001, high - low)
        kept = 1 - np.clip(ramp, 0, 1)
        full = full * kept + full / factor * (1 - kept)
        magnitude = _yarn_magnitude(own, factor)
    local = own.get("rope.freq_base_swa", 10000.0) ** -exponents
    return {"full": (full, magnitude), "sliding": (local, 1.0)}


def _used(header: GgufHeader, model: Any) -> set[str]:
    """Names of the file's tensors that transformers puts into `model`, and those applied here."""
    own = set(_factor_tensors(header))
    try:
        own |= set(_names(header, model)[0])
    except NotImplementedError:
        return set(header.tensors)  # a reader that names what it does not use while loading
    if header.architecture == "gpt2":
        own.add("output.weight")
    return own
