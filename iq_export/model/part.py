"""The text part of a checkpoint of several parts: a decoder beside a vision tower, say.

transformers' class of the whole checkpoint stays what is loaded and traced, called with text alone,
so that names of weights, tied tables and what stands around the decoder are its own business. The
parts that text does not pass are taken out of it. A model of one part is its own text part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from iq_export.errors import ModelError

TEXT = "text"


def text_part(config: Any) -> Any | None:
    """The text decoder's configuration within one of several parts; None if it has no such parts.

    Raises ModelError where transformers finds several.
    """
    try:
        inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError as error:
        raise ModelError(
            f"A '{config.model_type}' has several parts that read text, and none of them is the "
            "decoder alone; it is not supported."
        ) from error
    return None if inner is config else inner


def model_class(config: Any) -> Any:
    """transformers' class for a configuration: of several parts the one that has them all.

    Raises KeyError if it has none that writes text, ImportError for a library that it lacks.
    """
    from transformers.models.auto import modeling_auto as auto

    whole = auto.MODEL_FOR_MULTIMODAL_LM_MAPPING
    if text_part(config) is not None and type(config) in whole:
        return whole[type(config)]
    return auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def text_config(model: Any) -> Any:
    """The configuration that the decoder of a transformers model reads."""
    return model.config if text_part(model.config) is None else model.get_decoder().config


def decoder_name(model: Any) -> str:
    """Qualified name of the decoder, without the head."""
    if text_part(model.config) is None:
        return str(model.base_model_prefix)
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def leave_out(model: Any) -> list[str]:
    """Take the parts that text does not pass out of a transformers model; says which.

    Raises ModelError if the model does not run on text alone.
    """
    import torch

    model.eval()
    ran: set[Any] = set()
    with ExitStack() as hooks, torch.no_grad():
        for module in model.modules():
            handle = module.register_forward_pre_hook(lambda module, _: ran.add(module))
            hooks.callback(handle.remove)
        try:
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
        except Exception as error:  # a model's own code
            said = " ".join((str(error).splitlines() or [type(error).__name__])[0].split())
            raise ModelError(
                f"A '{model.config.model_type}' does not run on text alone "
                f"({said.rstrip('.')[:200]}); this architecture is not supported."
            ) from error
    left = []
    for part, path in list(_unused(model, model.get_decoder(), ran)):
        above, _, name = path.rpartition(".")
        size = sum(parameter.numel() for parameter in part.parameters())
        setattr(model.get_submodule(above), name, None)
        left.append(f"{path} ({size:,} parameters)")
    idle = [layer for layer in _layers(model) if ran.isdisjoint(layer.modules())]
    if idle:
        size = sum(parameter.numel() for layer in idle for parameter in layer.parameters())
        left.append(f"{len(idle)} layers of the decoder ({size:,} parameters)")
    return [f"left out, since text does not pass it: {', '.join(left)}"] if left else []


def _layers(model: Any) -> list[Any]:
    """The layers of the decoder; none if which they are is not plain."""
    import torch

    depth = getattr(text_config(model), "num_hidden_layers", None)
    lists = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList)]
    return next((list(layers) for layers in lists if len(layers) == depth), [])


def _unused(parent: Any, decoder: Any, ran: set[Any], path: str = "") -> Iterator[tuple[Any, str]]:
    """Modules with weights beside the decoder of which nothing `ran`, with their names."""
    for name, child in parent.named_children():
        inside = set(child.modules())
        if child is not decoder and inside.isdisjoint(ran):
            if any(True for _ in child.parameters()):
                yield child, f"{path}{name}"
        elif child is not decoder and decoder in inside:
            yield from _unused(child, decoder, ran, f"{path}{name}.")
