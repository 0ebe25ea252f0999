"""A Hugging Face causal LM as one torch module with flat inputs and outputs, ready for export.

The module computes its own boolean mask and hands attention to `torch.onnx.ops.attention`, so that
the exported graph has one ONNX `Attention` per layer that takes K/V with their own head count (no
repeated heads), and one mask per kind of attention.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from iq_export.errors import ModelError
from iq_export.model.part import text_config
from iq_export.model.positions import positions_of

if TYPE_CHECKING:
    import torch

ATTENTION = "iq_export_onnx"
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
TRACED = (FULL, SLIDING, CHUNKED)


def named(kinds: Sequence[str]) -> str:
    """Kinds of layers in a sentence."""
    return ", ".join(f"'{kind}'" for kind in kinds[:-1]) + f" and '{kinds[-1]}'"


@dataclass(frozen=True)
class CacheShape:
    """What the KV cache looks like: `(heads, features)` of the key and of the value of each layer,
    in the order of `past_key_values.N.*`; `layers` are the model's own numbers of these layers.

    `of_attention`: it holds what attention is given, and not what the model's own cache does. Of a
    latent these are the keys and values made of it, which each step would make again of all tokens;
    and where keys and values differ in size, the narrower ones are filled up with zeros, since
    TensorRT takes heads of one size only.
    """

    sizes: tuple[tuple[int, int], ...]
    layers: tuple[int, ...]
    of_attention: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def of_layers(self, layers: Sequence[int]) -> CacheShape:
        """That of a model which has only these of all its layers, numbered anew."""
        sizes = [size for layer in layers for size in self.sizes[2 * layer : 2 * layer + 2]]
        return replace(self, sizes=tuple(sizes), layers=tuple(range(len(layers))))


@dataclass(frozen=True)
class MaskPlan:
    """Which kinds of attention the layers use, the window of the sliding one, and the length of
    the chunks (tokens)."""

    kinds: tuple[str, ...]
    window: int | None
    chunk: int | None = None


def mask_plan(model: Any) -> MaskPlan:
    """Read the kinds of attention from the text config of a transformers model.

    Raises ModelError for kinds that the traced mask does not express (linear, indexed, ...).
    """
    config = text_config(model)
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False or _is_full(type(model)):
        window = None
    declared = getattr(config, "layer_types", None)
    kinds = tuple(sorted(set(declared))) if declared else ((SLIDING,) if window else (FULL,))
    unknown = [kind for kind in kinds if kind not in TRACED]
    if unknown:
        raise ModelError(
            f"Model type '{config.model_type}' has layers of type '{unknown[0]}', which cannot be "
            f"traced yet; supported are {named(TRACED)}."
        )
    if SLIDING in kinds and not window:
        kinds = tuple(kind for kind in kinds if kind != SLIDING) or (FULL,)
    chunk = getattr(config, "attention_chunk_size", None)
    return MaskPlan(
        kinds,
        int(window) if window and SLIDING in kinds else None,
        int(chunk) if chunk and CHUNKED in kinds else None,
    )


def _is_full(kind: type) -> bool:
    """Whether a model's code makes full masks alone, whatever window its configuration states."""
    names = vars(sys.modules[kind.__module__])
    makers = [name for name in names if name.startswith("create_") and "mask" in name]
    return makers == ["create_causal_mask"]


def build_masks(
    attention_mask: torch.Tensor, past: int, seq: int, plan: MaskPlan
) -> dict[str, torch.Tensor]:
    """Boolean masks `[batch, 1, seq, past + seq]` by kind of attention; True means: attend.

    The diagonal is always True: a row of padding would otherwise attend to nothing, and its
    softmax would be NaN, which attention spreads to no one else but every later check trips over.
    `past` and `seq` are symbolic integers while tracing.
    """
    import torch

    device = attention_mask.device
    rows = torch.arange(seq, device=device)[:, None] + past
    cols = torch.arange(past + seq, device=device)[None, :]
    allowed = (attention_mask != 0)[:, None, None, :] | (cols == rows)[None, None]
    causal = cols <= rows
    masks = {}
    for kind in plan.kinds:
        reach = causal & (cols > rows - plan.window) if kind == SLIDING else causal
        masks[kind] = reach[None, None] & allowed
        if kind == CHUNKED:
            # Chunks are counted from the first token of a row: padding moves all after it.
            pads = attention_mask.shape[1] - (attention_mask != 0).sum(-1)[:, None, None, None]
            first = (cols[None, None] - pads) // plan.chunk
            same = first == (rows[None, None] - pads) // plan.chunk
            masks[kind] = masks[kind] & same
    return masks


def onnx_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface on ONNX's `Attention`.

    query `[batch, heads, seq, head_dim]`, key `[batch, kv_heads, total, head_dim]`, value
    `[batch, kv_heads, total, value_dim]` -> `[batch, seq, heads, value_dim]`.
    """
    import torch

    for name in ("s_aux", "position_bias", "head_mask"):
        if others.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} passes '{name}' to attention, which ONNX's Attention "
                "does not express; this architecture is not supported."
            )
    out = torch.onnx.ops.attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, softcap=softcap or 0.0
    )[0]
    return out.transpose(1, 2).contiguous(), None


def flat_module(model: Any, shape: CacheShape) -> torch.nn.Module:
    """Wrap a transformers causal LM: `(input_ids, attention_mask, position_ids, past)` -> tuple.

    `past` is `(key_0, value_0, key_1, ...)`, each `[batch, heads, past, features]` as `shape` says;
    the result is `(logits, key_0, value_0, ...)` with the keys and values of past and present
    together.
    """
    import torch
    from transformers import AttentionInterface, DynamicCache

    class Passing(DynamicCache):
        """Keeps nothing of what a model hands over: its latents."""

        def update(
            self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Any, Any]:
            return key_states, value_states

        def get_seq_length(self, *args: Any) -> Any:
            return running[-1].get_seq_length()

    added = not model.is_backend_compatible() and not _handed(model)
    plan = mask_plan(model)
    running: list[DynamicCache] = []  # the cache of the call that is traced

    def attention(
        module: Any, query: Any, key: Any, value: Any, *args: Any, **others: Any
    ) -> tuple[torch.Tensor, None]:
        if not shape.of_attention:
            return onnx_attention(module, query, key, value, *args, **others)
        width, size = max(key.shape[-1], value.shape[-1]), value.shape[-1]
        others["scaling"] = others.get("scaling") or query.shape[-1] ** -0.5
        query, key, value = (_filled(one, width) for one in (query, key, value))
        key, value = running[-1].update(key, value, module.layer_idx)
        out, _ = onnx_attention(module, query, key, value, *args, **others)
        return (out if size == width else out[..., :size]), None

    AttentionInterface.register(ATTENTION, onnx_attention)
    model.set_attn_implementation(ATTENTION)
    positions = positions_of(model)
    AttentionInterface.register(ATTENTION, attention)

    class FlatCausalLM(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            position_ids: torch.Tensor,
            past: tuple[torch.Tensor, ...],
        ) -> tuple[torch.Tensor, ...]:
            # Without a config the cache keeps all tokens in every layer: sliding windows are the
            # mask's business, so that all layers share one `past` length.
            cache = DynamicCache()
            layers = shape.layers[: len(past) // 2]
            for number, layer in enumerate(layers):
                cache.update(past[2 * number], past[2 * number + 1], layer)
            running.append(cache)
            masks = build_masks(attention_mask, past[0].shape[2], input_ids.shape[1], plan)
            if added:
                lowest = torch.finfo(past[0].dtype).min
                masks = {kind: torch.where(mask, 0.0, lowest) for kind, mask in masks.items()}
            mask = next(iter(masks.values())) if len(masks) == 1 else masks
            with _other_forms(), positions.given(position_ids) as told:
                out = self.model(
                    input_ids=input_ids,
                    attention_mask=mask,
                    past_key_values=Passing() if shape.of_attention else cache,
                    use_cache=True,
                    **told,
                )
            running.clear()
            flat = [t for layer in layers for t in _cached(cache.layers[layer])]
            return (out.logits, *flat)

    return FlatCausalLM().eval()


@contextmanager
def _other_forms() -> Iterator[None]:
    """In the block some functions are computed in equal forms that can be exported.

    Complex tensors get new axes as the pairs of numbers that they are, since the exporter only
    multiplies them. A number written where a mask says so is chosen element by element: else its
    places are looked for, and TensorRT for RTX has no NonZero.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    adds_axes = (torch.Tensor.unsqueeze, torch.unsqueeze, torch.Tensor.__getitem__)

    class Other(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if func in adds_axes and args[0].is_complex():
                place = args[1] if len(args) > 1 else kwargs["dim"]
                if func is not torch.Tensor.__getitem__ and place < 0:
                    place -= 1
                return torch.view_as_complex(func(torch.view_as_real(args[0]), place))
            if func is torch.Tensor.__setitem__:
                whole, mask, value = args
                is_mask = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool
                if is_mask and mask.dim() == whole.dim() and isinstance(value, (int, float)):
                    return whole.masked_fill_(mask, value)
            return func(*args, **kwargs)

    with Other():
        yield


def _filled(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """`[..., features]` with zeros up to `width` features."""
    import torch

    lacking = width - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, lacking)) if lacking else tensor


def _handed(model: Any, cache: Any = None) -> list[tuple[Any, Any]]:
    """The keys and values that a model hands to the attention that is set, of one token with
    `cache`; none of what models write out themselves, which adds its mask to the scores."""
    import torch
    from transformers import AttentionInterface

    handed = []

    def seen(
        module: Any, query: Any, key: Any, value: Any, *args: Any, **others: Any
    ) -> tuple[torch.Tensor, None]:
        handed.append((key, value))
        return query.new_zeros(1, 1, query.shape[1], value.shape[3]), None

    AttentionInterface.register(ATTENTION, seen)
    model.set_attn_implementation(ATTENTION)
    with torch.no_grad():
        ids = torch.zeros(1, 1, dtype=torch.long)
        model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
    return handed


@contextmanager
def settled_rotations(model: Any) -> Iterator[None]:
    """Rotations that change with the length of a call stay, in the block, as they are up to the
    limit of `position_limit`: a graph has one rotation, as the keys in its cache have."""
    settled = {}
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            plain: Any = {layer: _settled(name) for layer, name in kind.items()}
        else:
            plain = _settled(kind)
        if plain != kind:
            settled[module] = kind
            module.rope_type = plain
    try:
        yield
    finally:
        for module, kind in settled.items():
            module.rope_type = kind


def _settled(kind: Any) -> Any:
    """transformers looks for these names at each call, and takes frequencies made before if not."""
    changes = isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind)
    return "default" if changes else kind


def cache_shape(model: Any) -> CacheShape:
    """Heads and features of keys and values, as one token through the model leaves them.

    Configurations of different families disagree on how they call these. Raises ModelError if
    what a layer keeps is no `[1, heads, 1, features]`, or the model does not run with a plain
    cache.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    try:
        handed = _handed(model, cache)
    except Exception as error:  # a model's own code, which expects a cache of its own
        said = " ".join((str(error).splitlines() or [type(error).__name__])[0].split())
        raise ModelError(
            f"A '{model.config.model_type}' does not run with a plain cache of keys and values "
            f"({said.rstrip('.')[:200]}); this architecture is not supported."
        ) from error
    # One that text alone does not pass keeps nothing: a layer that attends to pictures.
    layers = [n for n, layer in enumerate(cache.layers) if getattr(layer, "is_initialized", True)]
    kept = [_shapes(_cached(cache.layers[layer])) for layer in layers]
    given = [_shapes(pair) for pair in handed]
    of_attention = len(kept) == len(given) and any(
        None not in own and len({shape[-1] for shape in (*own, *pair)}) > 1
        for own, pair in zip(kept, given, strict=True)
    )
    if of_attention:
        kept = [[(*s[:-1], max(key[-1], value[-1])) for s in (key, value)] for key, value in given]
    shapes = [shape for layer in kept for shape in layer]
    strange = [shape for shape in shapes if shape is None or shape[::2] != (1, 1)]
    if strange or not shapes:
        raise ModelError(
            f"The layers of a '{model.config.model_type}' do not all keep keys and values "
            f"({strange[0] if strange else 'nothing'} of one token); this architecture is not "
            "supported."
        )
    sizes = tuple((shape[1], shape[3]) for shape in shapes if shape)
    return CacheShape(sizes, tuple(layers), of_attention)


def _shapes(tensors: Iterable[Any]) -> list[Any]:
    return [None if tensor is None else tuple(tensor.shape) for tensor in tensors]


def _cached(layer: Any) -> tuple[Any, Any]:
    """Key and value of a cache layer; None where a layer keeps something else (a state space)."""
    return getattr(layer, "keys", None), getattr(layer, "values", None)
