"""What a model's config.json tells about its compile, before anything is downloaded or loaded.

Sizes and structure are read from the configuration as transformers completes it; what no
configuration tells stands in a table of model types of families that were tried. A type that is
not in it passes: tracing and the graph have the last word.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from iq_export.cost import Shape, memory_need, require_memory
from iq_export.errors import ModelError, UsageError
from iq_export.model.capture import TRACED, named
from iq_export.model.part import model_class, text_part
from iq_export.model.positions import ARGUMENT, counts_positions
from iq_export.model.quiet import quiet
from iq_export.recipe import Recipe

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Where a configuration of several parts has that of its text decoder.
_TEXT_KEYS = ("text_config", "decoder", "generator")
_OPTIONAL = ("intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings")

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_STATE_SPACES = (
    "mamba_d_state", "mamba_n_heads", "mamba_num_heads", "ssm_state_size", "linear_num_value_heads",
    "conv_L_cache", "n_mamba_heads", "state_size",
)  # fmt: skip
# Rotations that models compute themselves.
_OWN_ROTATIONS = ("default", "mrope", "su")
# Features of the latents that queries, keys and values are made of.
_RANKS = ("q_lora_rank", "kv_lora_rank")

_ALIBI = "its attention adds position biases (ALiBi)"
_ENCODER = "it is an encoder"
_UNRECOGNISED = "its norms or branches are not recognised in the traced graph"
_SINKS = "its attention has sinks of its own (s_aux)"
_COUNTS = "its code counts positions by itself and takes no 'position_ids'"


@dataclass(frozen=True)
class _Kind:
    """Why models of a type cannot be compiled; `unless` tells the configurations that can."""

    reason: str
    unless: Callable[[Any], bool] = lambda config: False


_TYPES: dict[str, _Kind] = {
    **dict.fromkeys(
        ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie",
         "megatron-bert", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert",
         "xlm-roberta", "xlm-roberta-xl", "xmod"),
        _Kind(_ENCODER, unless=lambda config: config.is_decoder),
    ),
    **dict.fromkeys(("git", "xlm"), _Kind(_ENCODER)),
    **dict.fromkeys(("beam", "doge", "hrm_text"), _Kind(_UNRECOGNISED)),
    "bloom": _Kind(_ALIBI),
    **dict.fromkeys(("prophetnet", "roformer"), _Kind(_COUNTS)),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        _Kind("it reads the keys and values of another model"),
    ),
    "gemma3n_text": _Kind("its residual stream is several ones, which each layer mixes"),
    **dict.fromkeys(
        ("flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"), _Kind(_SINKS)
    ),
    "llama4_text": _Kind(
        "its experts read tokens that the router has weighed",
        unless=lambda config: not config.moe_layers,
    ),
    "longcat_flash": _Kind("its layers have two attentions each"),
    "dbrx": _Kind("its code takes its experts apart in a way of its own"),
    "jetmoe": _Kind("its attention is a mixture of experts"),
}  # fmt: skip


@dataclass(frozen=True)
class Support:
    """A configuration that may be compiled, completed with its defaults, and what follows from it.

    `shape` has its sizes, with a gated MLP: no entry tells.
    """

    completed: Mapping[str, Any]
    layers: int
    head_dim: int
    softcap: bool
    shape: Shape


def check_support(
    raw: Mapping[str, Any],
    name: str,
    recipe: Recipe,
    *,
    part: str | None = None,
    remote_code: bool = False,
) -> Support:
    """Check the content of a config.json against what the compiler and `recipe` can do.

    `part`: of a checkpoint of several parts, the one to compile, which the answer is about.
    `remote_code`: the model brings classes of its own, so that only `raw` itself is looked at.
    Raises ModelError for a model that cannot be compiled, UsageError for one that `recipe` or
    `part` does not fit; one sentence each.
    """
    kind = str(raw.get("model_type"))
    written = next((raw[key] for key in _TEXT_KEYS if isinstance(raw.get(key), Mapping)), raw)
    names = _attribute_names(str(written.get("model_type")), remote_code)
    _check_numbers(written, names, name)
    # Of a size that nothing holds: before a list of so many layers is made.
    require_memory(memory_need(_shape(SimpleNamespace(**written)), recipe, calibrates=False), name)
    config = _completed(raw, kind, name, remote_code)
    config = check_config(config, name, part=part, remote_code=remote_code)
    _check_widths(config, name, recipe)
    shape = _shape(config, whole=remote_code or bool(raw.get("quantization_config")))
    require_memory(memory_need(shape, recipe, calibrates=False), name)
    return Support(
        completed=written if remote_code else config.to_dict(),
        layers=int(config.num_hidden_layers),
        head_dim=_head_dim(config),
        softcap=bool(_get(config, "attn_logit_softcapping")),
        shape=shape,
    )


def check_config(
    config: Any, name: str, *, part: str | None = None, remote_code: bool = False
) -> Any:
    """Refuse what transformers' configuration object shows to be no decoder that can be compiled.

    Returns the decoder's own configuration, which is that of `part` if there are several. Raises
    ModelError or, for a `part` that there is not, UsageError, in one sentence.
    """
    kind = config.model_type
    if _get(config, "is_encoder_decoder"):
        raise ModelError(
            f"{name} ('{kind}') is an encoder-decoder model; only decoder-only causal LMs can be "
            "compiled."
        )
    text = text_part(config)
    if not remote_code and kind not in _causal_lms(several=text is not None):
        raise ModelError(
            f"{name} has architecture '{kind}', which is not a causal LM in this version of "
            "transformers."
        )
    if text is not None and part is None:
        raise ModelError(
            f"{name} has architecture '{kind}', which has several parts "
            f"({', '.join(sorted(config.sub_configs))}): its text decoder compiles alone with "
            "--part text."
        )
    if text is None and part is not None:
        raise UsageError(
            f"{name} has architecture '{kind}', which is a text decoder as a whole: leave out "
            f"--part {part}."
        )
    decoder = config if text is None else text
    reason = _known(config) or _structure(decoder)
    if reason is None and remote_code and (experts := _experts(decoder)):
        reason = f"it is a mixture of experts ('{experts[0]}') with code of its own"
    if reason is not None:
        raise ModelError(f"{name} has architecture '{kind}', which is not supported: {reason}.")
    _check_sizes(decoder, name)
    if not remote_code:
        _check_functions(decoder, name)
        _check_class(config, name)
    return decoder


def _known(config: Any) -> str | None:
    """Why models of the type cannot be compiled, as the table has it."""
    known = _TYPES.get(config.model_type)
    return None if known is None or known.unless(config) else known.reason


def _structure(config: Any) -> str | None:
    """Why the decoder cannot be compiled; None if nothing speaks against it."""
    known = _known(config)
    if known is not None:
        return known
    for name in _STATE_SPACES:
        if _get(config, name):
            return f"it has state-space, linear or convolution layers ('{name}')"
    for name in ("layer_types", "layers_block_type", "block_types"):
        kinds = _get(config, name)
        listed = kinds if isinstance(kinds, (list, tuple)) else ()
        # `attention` is not among them: it is full attention, of models that mix it with others.
        other = [kind for kind in listed if kind not in TRACED]
        if other:
            return f"it has layers of type '{other[0]}', and only {named(TRACED)} can be traced"
    if _get(config, "alibi") or _nested(config, "attn_config", "alibi"):
        return _ALIBI
    if _get(config, "position_embedding_type") == "alibi":
        return _ALIBI
    return None


def _experts(config: Any) -> tuple[str, int] | None:
    """The entry that makes it a mixture of experts, and how many there are; None if it is dense."""
    if False in (_get(config, "is_moe"), _get(config, "enable_moe_block")):
        return None
    kinds = _get(config, "mlp_layer_types")
    if isinstance(kinds, (list, tuple)) and kinds and "sparse" not in kinds:
        return None
    dense, layers = _get(config, "first_k_dense_replace"), _get(config, "num_hidden_layers")
    if _is_size(dense) and _is_size(layers) and dense >= layers:
        return None
    found = {name: _get(config, name) for name in _EXPERTS}
    return next(((name, value) for name, value in found.items() if _is_size(value)), None)


def _nested(config: Any, part: str, name: str) -> Any:
    inner = _get(config, part)
    return inner.get(name) if isinstance(inner, Mapping) else getattr(inner, name, None)


def _check_sizes(config: Any, name: str) -> None:
    lacking = [key for key in _NEEDED if not _is_size(_get(config, key))]
    if lacking:
        raise ModelError(
            f"{name} has architecture '{config.model_type}', whose configuration has no single "
            f"'{lacking[0]}' (no attention, or of several kinds); it is not supported."
        )
    hidden, heads = config.hidden_size, config.num_attention_heads
    if not _get(config, "head_dim") and hidden % heads:
        raise ModelError(
            f"config.json of {name} is impossible: a hidden size of {hidden} is not divisible by "
            f"{heads} attention heads."
        )
    kv_heads = _get(config, "num_key_value_heads")
    if _is_size(kv_heads) and heads % kv_heads:
        raise ModelError(
            f"config.json of {name} is impossible: {heads} attention heads are not divisible by "
            f"{kv_heads} heads of keys and values."
        )


def _check_functions(config: Any, name: str) -> None:
    """The rotation and the activation are looked up by name only when the model is built."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rotations = {*ROPE_INIT_FUNCTIONS, *_OWN_ROTATIONS}
    found = _get(config, "rope_parameters")
    parameters = found if isinstance(found, Mapping) else {}
    nested = [inner for inner in parameters.values() if isinstance(inner, Mapping)]
    asked = [
        *(("rope_type", one.get("rope_type"), rotations) for one in (parameters, *nested)),
        *((key, _get(config, key), ACT2FN) for key in ("hidden_act", "hidden_activation")),
    ]
    for key, value, known in asked:
        if isinstance(value, str) and value not in known:
            raise ModelError(
                f"config.json of {name} is impossible: '{key}' is {value!r}, which this version "
                "of transformers does not know."
            )


def _check_class(config: Any, name: str) -> None:
    """What the traced graph is given must have a place in the model's code."""
    taken = _arguments(config)
    lacks = None
    if taken and "past_key_values" not in taken:
        lacks = "its code takes no cache of keys and values"
    elif taken and ARGUMENT not in taken and not _has_table(config):
        lacks = _COUNTS
    if lacks is not None:
        raise ModelError(
            f"{name} has architecture '{config.model_type}', which is not supported: {lacks}."
        )


def _arguments(config: Any) -> set[str]:
    """What the forward methods of the models beside a configuration's causal LM take, or beside its
    text part, which hand down what they do not name; none if their code cannot be imported here."""
    from transformers import PreTrainedModel

    return {
        argument
        for other in _classes(config)
        if issubclass(other, PreTrainedModel)
        for argument in inspect.signature(other.forward).parameters
    }


def _has_table(config: Any) -> bool:
    """Whether the code of a configuration's causal LM has a table that counts positions."""
    return any(counts_positions(other) for other in _classes(config))


def _classes(config: Any) -> list[type]:
    """The classes of the files in which a configuration's causal LM and its text part stand; none
    if their code cannot be imported here."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    text = text_part(config)
    try:
        with quiet():
            found = [model_class(config)]
            if text is not None and type(text) in MODEL_MAPPING:
                found.append(MODEL_MAPPING[type(text)])
    except (KeyError, ImportError):  # a library that only this model's code needs
        return []
    return [
        one
        for module in {one.__module__ for one in found}
        for one in vars(sys.modules[module]).values()
        if isinstance(one, type) and one.__module__ == module
    ]


def _check_numbers(raw: Mapping[str, Any], keys: Mapping[str, str], name: str) -> None:
    """Sizes that are written must be whole numbers above 0 (or, where one may be, null)."""
    for meaning in (*_NEEDED, *_OPTIONAL):
        for key in dict.fromkeys((meaning, keys.get(meaning, meaning))):
            value = raw.get(key, 1)
            per_layer = meaning in _OPTIONAL and isinstance(value, list)
            absent = meaning in _OPTIONAL and value is None
            if not (_is_size(value) or per_layer or absent):
                raise ModelError(
                    f"config.json of {name} is impossible: '{key}' is {value!r}, and not a whole "
                    "number above 0."
                )


def _get(config: Any, name: str) -> Any:
    """An attribute; None if it is absent, or if asking raises (one value for differing layers)."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers' configurations raise errors of their own kinds
        return None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_widths(config: Any, name: str, recipe: Recipe) -> None:
    """UsageError if the weights' format does not take a width of the blocks' products."""
    if recipe.weights is None:
        return
    widths = {
        "hidden_size": config.hidden_size,
        "heads x head_dim": config.num_attention_heads * _value_dim(config),
        "intermediate_size": _get(config, "intermediate_size"),
        **{rank: _get(config, rank) for rank in _RANKS},
    }
    for what, width in widths.items():
        reason = recipe.weights.misfit(width) if _is_size(width) else None
        if reason is not None:
            raise UsageError(f"{name} has products with {width} inputs ({what}), {reason}.")


def _head_dim(config: Any) -> int:
    """The size of a head's queries and keys, of which a latent gives a part; the largest one where
    layers differ."""
    if _get(config, "is_heterogeneous"):
        return max(int(layer.head_dim) for layer in config.per_layer_config)
    parts = [_get(config, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
    if _is_size(_get(config, "kv_lora_rank")) and all(map(_is_size, parts)):
        return int(sum(parts))
    size = _get(config, "head_dim")
    return int(size) if _is_size(size) else config.hidden_size // config.num_attention_heads


def _value_dim(config: Any) -> int:
    size = _get(config, "v_head_dim")
    return int(size) if _is_size(size) else _head_dim(config)


def _shape(config: Any, *, whole: bool = False) -> Shape:
    """Sizes as far as the entries tell; one that is absent counts as little as it can."""

    def size(name: str, otherwise: int) -> int:
        value = _get(config, name)
        return int(value) if _is_size(value) else otherwise

    hidden, heads = size("hidden_size", 1), size("num_attention_heads", 1)
    head = size("head_dim", max(hidden // heads, 1))
    keys, features = head * size("num_key_value_heads", heads), size("intermediate_size", 1)
    widths: tuple[int, ...] = (hidden, heads * head)
    attention = hidden * (2 * heads * head + 2 * keys)
    if latent := size("kv_lora_rank", 0):
        plain, turned, value = (
            size(name, 1) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        narrow = size("q_lora_rank", 0)
        widths = (hidden, narrow or hidden, latent, heads * value)
        attention = hidden * (narrow + latent + turned + heads * value) + heads * (
            (narrow or hidden) * (plain + turned) + latent * (plain + value)
        )
    experts, own = _experts(config), size("moe_intermediate_size", features)
    mlps = [features] if experts is None else [own] * experts[1]
    return Shape(
        hidden=hidden,
        layers=size("num_hidden_layers", 1),
        vocabulary=size("vocab_size", 1),
        tables=2 if _get(config, "tie_word_embeddings") is False else 1,
        block=attention + 3 * hidden * sum(mlps),
        widths=(*widths, *(width for mlp in mlps for width in (hidden, mlp))),
        whole=whole,
    )


def _attribute_names(kind: str, remote_code: bool) -> Mapping[str, str]:
    """How configurations of this type call what transformers calls `hidden_size` and so on."""
    found = None if remote_code else _config_class(kind)
    return getattr(found, "attribute_map", {}) if found is not None else {}


def _completed(raw: Mapping[str, Any], kind: str, name: str, remote_code: bool) -> Any:
    """The configuration with its defaults, as transformers completes it."""
    found = None if remote_code else _config_class(kind)
    if found is None:
        if not remote_code:
            raise ModelError(
                f"{name} has architecture '{kind}', which this version of transformers does not "
                "know."
            )
        return SimpleNamespace(**raw)
    try:
        with quiet():
            return found.from_dict(_plain(raw))
    except Exception as error:  # validators of transformers and of its models raise what they like
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = (lines[-1] if lines else type(error).__name__).partition(". Errors: ")[0].rstrip(".")
        said = said.removeprefix("ValueError: ").removeprefix("TypeError: ")
        raise ModelError(f"config.json of {name} is impossible: {said}.") from error


def _plain(value: Any) -> Any:
    """JSON values as transformers reads them: it writes infinity as `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _config_class(kind: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[kind]
    except KeyError:
        return None


def _causal_lms(*, several: bool) -> Mapping[str, str]:
    """Model type -> class; read by name, so that no model's code is imported. With those of models
    of `several` parts, of which one writes text."""
    from transformers.models.auto import modeling_auto as auto

    alone: Mapping[str, str] = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {**alone, **auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES} if several else alone
