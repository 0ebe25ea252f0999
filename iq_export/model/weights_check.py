"""What a checkpoint holds beside a sound set of weights: NaN, other sizes, unmerged adapters,
layers too many.

transformers loads all of it without a word. What changes the function is refused, the rest is said.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iq_export.errors import GraphError, ModelError
from iq_export.model.part import text_config

if TYPE_CHECKING:
    import onnx_ir as ir

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_ADAPTER = re.compile(
    r"(^|\.)(lora_\w+|ia3_\w+|base_layer|modules_to_save|base_model\.model)(\.|$)"
)
_MERGE = "merge it with peft (model.merge_and_unload(), then save_pretrained) and give that folder"
# Buffers of older checkpoints that are computed anew: masks, rotary tables, positions.
_BUFFERS = re.compile(
    r"(rotary_emb\.\w+|inv_freq|(attn|attention)\.(masked_)?bias|masked_bias|position_ids)$"
)
_NUMBERED = re.compile(r"^(.*?)\.(\d+)\.")


def check_adapters(folder: Path) -> None:
    """Raise ModelError if `folder` is an adapter, or holds one that loading would leave out."""
    found = next((name for name in _ADAPTER_FILES if (folder / name).is_file()), None)
    if found is None:
        return
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is an adapter ({found}), not a model: {_MERGE}, or give the base model."
        )
    raise ModelError(
        f"{folder} holds an adapter beside the model ({found}), which would be left out: {_MERGE}, "
        f"or move {found} away."
    )


def check_unexpected(model: Any, keys: Collection[str], name: str) -> list[str]:
    """Notes on the tensors `keys` of a checkpoint that the transformers `model` has no place for.

    Raises ModelError for those without which the model is another one: adapters, layers beyond the
    configured number, and parameters of modules that the model has.
    """
    left = sorted(key for key in keys if not _BUFFERS.search(key))
    adapters = [key for key in left if _ADAPTER.search(key)]
    if adapters:
        raise ModelError(
            f"{name} holds an adapter that is not merged ({_counted(adapters)}): {_MERGE}."
        )
    layers = _layer_prefixes(model)
    told = []
    for key in left:
        match = _NUMBERED.match(key)
        number = int(match[2]) if match and match[1] in layers else None
        most = layers[match[1]] if match and number is not None else 0
        if number is not None and number >= most:
            # Further layers that predict several tokens ahead are no part of a causal LM.
            if number >= most + (
                getattr(text_config(model), "num_nextn_predict_layers", None) or 0
            ):
                raise ModelError(
                    f"{name} holds weights of layer {number} ('{key}'), but its config.json says "
                    f"num_hidden_layers {most}: correct that number, or save the shortened model "
                    "with save_pretrained."
                )
            told.append(key)
        elif number is not None or _has_module(model, key.rpartition(".")[0]):
            raise ModelError(
                f"{name} holds a weight that the model of its config.json has no place for: "
                f"'{key}'; without it the model is another one. Correct config.json."
            )
        else:
            told.append(key)
    if not told:
        return []
    return [f"weights that are no part of the causal LM are left out: {_counted(told)}"]


def check_sizes(
    mismatched: Collection[tuple[str, Sequence[int], Sequence[int]]], name: str
) -> None:
    """Raise ModelError if a weight has another shape in the file than in the model: `mismatched`
    has triples of its name and these two shapes, as transformers reports them."""
    if not mismatched:
        return
    key, stored, wanted = min(mismatched)
    more = f" ({len(mismatched)} weights differ so)" if len(mismatched) > 1 else ""
    raise ModelError(
        f"The weight '{key}' of {name} has the shape {list(stored)} in its file, and by its "
        f"config.json {list(wanted)}{more}: correct config.json, or get the model again."
    )


def check_finite(weights: Iterable[tuple[str, Any]], name: str) -> None:
    """Raise ModelError naming the first of `weights` (torch tensors) with NaN or infinity."""
    import torch

    for key, tensor in weights:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # NaN comes through, with no copy of the tensor.
        ends = torch.stack(torch.aminmax(tensor.detach()))
        if not torch.isfinite(ends).all():
            raise ModelError(_not_finite(key, tensor.detach().float().numpy(), name))


def check_finite_graph(model: ir.Model, name: str) -> None:
    """As `check_finite` for the constants of an ONNX graph, one in memory at a time: GraphError,
    also for one that cannot be read.

    Infinity in a mask (a constant with one finite value at most) is in order.
    """
    for key, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        try:
            read = tensor.numpy()
        except (ValueError, TypeError) as error:
            raise GraphError(
                f"The constant '{key}' of {name} cannot be read: {error}; the model is damaged, "
                "get or save it again."
            ) from error
        if not read.size or not tensor.dtype.is_floating_point():
            continue
        array = read.astype(np.float32, copy=False)
        low, high = float(array.min()), float(array.max())
        if np.isfinite(low) and np.isfinite(high):
            continue
        if np.isnan(low) or np.isnan(high) or np.unique(array[np.isfinite(array)]).size > 1:
            raise GraphError(_not_finite(str(key), array, name))


def _not_finite(key: str, array: np.ndarray, name: str) -> str:
    bad = np.argwhere(~np.isfinite(array))
    first = bad[0].tolist()
    kind = "NaN" if np.isnan(array[tuple(first)]) else "infinity"
    return (
        f"The weight '{key}' of {name} holds {kind} at {first} ({len(bad)} of its {array.size} "
        "values are not finite): the model is damaged, get or save it again."
    )


def _counted(keys: list[str]) -> str:
    return f"'{keys[0]}'" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")


def _layer_prefixes(model: Any) -> dict[str, int]:
    """Names of the model's lists of layers -> how many layers each has."""
    counts: dict[str, int] = {}
    for key in model.state_dict():
        match = _NUMBERED.match(key)
        if match:
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return counts


def _has_module(model: Any, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return bool(name)
