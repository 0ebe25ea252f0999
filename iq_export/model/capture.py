"""A Hugging Face causal LM as one torch module with flat inputs and outputs, ready for export.

The module computes its own boolean mask and hands attention to `torch.onnx.ops.attention`, so that
the exported graph has one ONNX `Attention` per layer that takes K/V with their own head count (no
repeated heads), and one mask per kind of attention.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from iq_export.errors import ModelError
from iq_export.model.positions import positions_of

if TYPE_CHECKING:
    import torch

ATTENTION = "iq_export_onnx"
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class CacheShape:
    """What the KV cache looks like: one entry per layer in `past_key_values.N.*`."""

    num_layers: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class MaskPlan:
    """Which kinds of attention the layers use, and the window of the sliding one (tokens)."""

    kinds: tuple[str, ...]
    window: int | None


def mask_plan(model: Any) -> MaskPlan:
    """Read the kinds of attention from the text config of a transformers model.

    Raises ModelError for kinds that the traced mask does not express (chunked, linear, ...).
    """
    config = model.config
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False or _is_full(type(model)):
        window = None
    declared = getattr(config, "layer_types", None)
    kinds = tuple(sorted(set(declared))) if declared else ((SLIDING,) if window else (FULL,))
    unknown = [kind for kind in kinds if kind not in (FULL, SLIDING)]
    if unknown:
        raise ModelError(
            f"Model type '{config.model_type}' has layers of type '{unknown[0]}', which cannot be "
            f"traced yet; supported are '{FULL}' and '{SLIDING}'."
        )
    if SLIDING in kinds and not window:
        kinds = tuple(kind for kind in kinds if kind != SLIDING) or (FULL,)
    return MaskPlan(kinds, int(window) if window and SLIDING in kinds else None)


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
        reach = causal if kind == FULL else causal & (cols > rows - plan.window)
        masks[kind] = reach[None, None] & allowed
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

    query `[batch, heads, seq, head_dim]`, key and value `[batch, kv_heads, total, head_dim]` ->
    `[batch, seq, heads, head_dim]`.
    """
    import torch

    for name in ("s_aux", "position_bias", "head_mask"):
        if others.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} passes '{name}' to attention, which ONNX's Attention "
                "does not express; this architecture is not supported."
            )
    if value.shape[-1] != query.shape[-1]:
        raise ModelError(
            f"{type(module).__name__} has values of another head size than its queries "
            f"({value.shape[-1]} and {query.shape[-1]}); this architecture is not supported."
        )
    out = torch.onnx.ops.attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, softcap=softcap or 0.0
    )[0]
    return out.transpose(1, 2).contiguous(), None


def flat_module(model: Any) -> torch.nn.Module:
    """Wrap a transformers causal LM: `(input_ids, attention_mask, position_ids, past)` -> tuple.

    `past` is `(key_0, value_0, key_1, ...)`, each `[batch, kv_heads, past, head_dim]`; the result
    is `(logits, key_0, value_0, ...)` with the keys and values of past and present together.
    """
    import torch
    from transformers import AttentionInterface, DynamicCache

    AttentionInterface.register(ATTENTION, onnx_attention)
    model.set_attn_implementation(ATTENTION)
    plan = mask_plan(model)
    added = not model.is_backend_compatible() and not _hands_over(model)
    positions = positions_of(model)

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
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            masks = build_masks(attention_mask, past[0].shape[2], input_ids.shape[1], plan)
            if added:
                lowest = torch.finfo(past[0].dtype).min
                masks = {kind: torch.where(mask, 0.0, lowest) for kind, mask in masks.items()}
            mask = next(iter(masks.values())) if len(masks) == 1 else masks
            with positions.given(position_ids) as told:
                out = self.model(
                    input_ids=input_ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    use_cache=True,
                    **told,
                )
            flat = [t for layer in cache.layers for t in _cached(layer)]
            return (out.logits, *flat)

    return FlatCausalLM().eval()


def _hands_over(model: Any) -> bool:
    """Whether attention is left to the implementation that is set. What models write out themselves
    adds its mask to the scores."""
    import torch
    from transformers import AttentionInterface

    called = []

    def seen(*args: Any, **others: Any) -> tuple[torch.Tensor, None]:
        called.append(True)
        return onnx_attention(*args, **others)

    AttentionInterface.register(ATTENTION, seen)
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    finally:
        AttentionInterface.register(ATTENTION, onnx_attention)
    return bool(called)


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
    """Layer count, K/V heads and head size, as one token through the model leaves them.

    Configurations of different families disagree on how they call these. Raises ModelError if
    the layers' caches are not all of one shape `[1, kv_heads, 1, head_dim]`, or the model does not
    run with a plain cache.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    ids = torch.zeros(1, 1, dtype=torch.long)
    try:
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
    except Exception as error:  # a model's own code, which expects a cache of its own
        said = " ".join((str(error).splitlines() or [type(error).__name__])[0].split())
        raise ModelError(
            f"A '{model.config.model_type}' does not run with a plain cache of keys and values "
            f"({said.rstrip('.')[:200]}); this architecture is not supported."
        ) from error
    tensors = [tensor for layer in cache.layers for tensor in _cached(layer)]
    shapes = {None if tensor is None else tuple(tensor.shape) for tensor in tensors}
    shape = next(iter(shapes), None)
    if len(shapes) != 1 or shape is None or len(shape) != 4:
        raise ModelError(
            f"The layers of a '{model.config.model_type}' do not keep keys and values of one "
            f"shape ({', '.join(sorted(map(str, shapes)))}); this architecture is not supported."
        )
    return CacheShape(num_layers=len(cache.layers), kv_heads=shape[1], head_dim=shape[3])


def _cached(layer: Any) -> tuple[Any, Any]:
    """Key and value of a cache layer; None where a layer keeps something else (a state space)."""
    return getattr(layer, "keys", None), getattr(layer, "values", None)
