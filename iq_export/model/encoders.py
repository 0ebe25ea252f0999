"""Models without a cache: what they are asked for, and how transformers' own become a graph.

Tasks have the names that Hugging Face gives them. Which inputs and outputs a model has is read from
what it takes and gives; as in `load.py`, only transformers knows families here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from iq_export.errors import ModelError, UsageError
from iq_export.graph.interface import BATCH, SEQ, Role, name_of

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

TEXT_GENERATION = "text-generation"
# A graph counts as equal to its model within this share of an output's range.
TOLERANCE = 1e-5
_OUTPUTS = (
    name_of(Role.LOGITS), name_of(Role.ROWS), name_of(Role.POOLED), "image_embeds", "text_embeds",
)  # fmt: skip
_BATCH, _SEQ = 2, 24


@dataclass(frozen=True)
class Task:
    """`loader`: transformers' class that loads it; `takes`: what its input is."""

    loader: str
    takes: Role


TASKS = {
    "feature-extraction": Task("AutoModel", Role.IDS),
    "fill-mask": Task("AutoModelForMaskedLM", Role.IDS),
    "image-feature-extraction": Task("AutoModel", Role.PIXELS),
    "image-classification": Task("AutoModelForImageClassification", Role.PIXELS),
    "automatic-speech-recognition": Task("AutoModel", Role.SOUND),
}
TASK_NAMES = (TEXT_GENERATION, *TASKS)
# The end of an architecture's name -> its task.
_ENDS = {
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
}
_FEATURES = {
    Role.IDS: "feature-extraction",
    Role.PIXELS: "image-feature-extraction",
    Role.SOUND: "automatic-speech-recognition",
}


def task_of(config: Mapping[str, Any], asked: str | None) -> str:
    """What a checkpoint is compiled for: what was `asked`, or what its architecture is for.

    Raises UsageError for a task that is none.
    """
    if asked is not None:
        if asked not in TASK_NAMES:
            raise UsageError(f"unknown task '{asked}': use {', '.join(TASK_NAMES)}.")
        return asked
    named = config.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    for end, task in _ENDS.items():
        if first.endswith(end):
            return task
    if not first.endswith("Model") or first.endswith(("LMHeadModel", "DoubleHeadsModel")):
        kind = _SPEECH.get(first)
        return kind or TEXT_GENERATION
    taken = _takes(first)
    return TEXT_GENERATION if taken is None else _FEATURES[taken]


_SPEECH = {"WhisperForConditionalGeneration": "automatic-speech-recognition"}


def _takes(architecture: str) -> Role | None:
    """The main input of a class of transformers; None if it is not known, or a decoder's."""
    try:
        import transformers
    except ImportError:  # which is said when the model is loaded
        return None
    found = getattr(transformers, architecture, None)
    name = getattr(found, "main_input_name", None)
    role = next((role for role in _FEATURES if name_of(role) == name), None)
    if role is Role.IDS and getattr(found, "config_class", None) in _causal_configs():
        return None
    return role


def _causal_configs() -> set[type]:
    """Configurations of models that predict the next token, and do not fill masks."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
    )

    return set(MODEL_FOR_CAUSAL_LM_MAPPING) - set(MODEL_FOR_MASKED_LM_MAPPING)


def load_encoder(folder: Path, task: str, *, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """The model for `task` in fp32, and what transformers says of its loading."""
    import transformers

    loader = getattr(transformers, TASKS[task].loader)
    model, info = loader.from_pretrained(
        folder, dtype="float32", output_loading_info=True, use_safetensors=True,
        ignore_mismatched_sizes=True, trust_remote_code=trust_remote_code,
        attn_implementation="sdpa",
    )  # fmt: skip
    return model.eval().requires_grad_(False), info


def flat_encoder(model: Any, task: str, sizes: tuple[int, ...]) -> tuple[torch.nn.Module, Any]:
    """The model as a module of flat inputs and outputs, and example inputs for it.

    sizes: of a picture `(height, width)`, or the frames of a spectrogram `(frames,)`. The module
    has the `names` of its outputs. Raises ModelError if it gives nothing that is known.
    """
    import torch

    takes = TASKS[task].takes
    part = _part(model, takes)
    turned = takes is Role.IDS and any("rotary" in name for name, _ in part.named_modules())

    class FlatEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = part
            self.names: tuple[str, ...] = ()

        def forward(
            self, values: torch.Tensor, mask: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, ...]:
            names = input_names_of(takes)
            given = dict(zip(names, (values, mask)[: len(names)], strict=True))
            if turned:  # TensorRT wants angles for each row of a batch
                batch, seq = values.shape
                given["position_ids"] = torch.arange(seq)[None].expand(batch, seq)
            out = self.model(**given)
            return tuple(out[name] for name in self.names)

    flat = FlatEncoder().eval()
    example = _example(model.config, takes, sizes)
    with torch.no_grad():
        out = part(**dict(zip(input_names_of(takes), example, strict=True)))
    flat.names = tuple(name for name in _OUTPUTS if isinstance(out.get(name), torch.Tensor))
    if not flat.names:
        raise ModelError(
            f"A '{model.config.model_type}' gives none of {', '.join(_OUTPUTS)} for the task "
            f"'{task}'; this architecture is not supported."
        )
    return flat, example


def input_names_of(takes: Role) -> tuple[str, ...]:
    """What a graph of an encoder is given."""
    more = (name_of(Role.MASK),) if takes is Role.IDS else ()
    return (name_of(takes), *more)


def _part(model: Any, takes: Role) -> Any:
    """The part of a model that takes such input alone: of one with two towers a tower with its
    projection, of an encoder-decoder its encoder."""
    import torch

    if takes is Role.SOUND and model.config.is_encoder_decoder:
        return model.get_encoder()
    tower = {Role.PIXELS: "vision_model", Role.IDS: "text_model"}.get(takes, "")
    projection = {Role.PIXELS: "visual_projection", Role.IDS: "text_projection"}.get(takes, "")
    if not (hasattr(model, "vision_model") and hasattr(model, "text_model")):
        return model
    embeds = "image_embeds" if takes is Role.PIXELS else "text_embeds"

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = getattr(model, tower)
            self.projection = getattr(model, projection, None)

        def forward(self, **given: torch.Tensor) -> dict[str, torch.Tensor]:
            out = dict(self.tower(**given))
            if self.projection is None:
                return out
            return {embeds: self.projection(out[name_of(Role.POOLED)])}

    return Tower().eval()


def _example(config: Any, takes: Role, sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    import torch

    inner = getattr(config, "vision_config", config)
    if takes is Role.PIXELS:
        return (torch.randn(_BATCH, getattr(inner, "num_channels", 3), *sizes),)
    if takes is Role.SOUND:
        return (torch.randn(_BATCH, config.num_mel_bins, *sizes),)
    text = getattr(config, "text_config", config)
    ids = torch.arange(_BATCH * _SEQ).reshape(_BATCH, _SEQ) % text.vocab_size
    return ids, torch.ones(_BATCH, _SEQ, dtype=torch.long)


def input_sizes(config: Any, task: str, folder: Path) -> tuple[int, ...]:
    """Of a picture what its preprocessing makes, else what the configuration says; the frames of a
    recording. () of text."""
    from iq_export.observe.preprocessor import PictureSteps, read_steps

    takes = TASKS[task].takes
    if takes is Role.SOUND:
        return (2 * config.max_source_positions,)
    if takes is Role.IDS:
        return ()
    try:
        steps = read_steps(folder)
    except ModelError:
        steps = None
    if isinstance(steps, PictureSteps):
        made = steps.crop or steps.resize
        if isinstance(made, tuple):
            return made
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    found = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if not all(isinstance(each, int) for each in found) or len(found) != 2:
        raise ModelError(
            f"The configuration of a '{config.model_type}' does not say which size its pictures "
            "have, and there is no preprocessor_config.json that does."
        )
    return found


def export_encoder(flat: Any, example: tuple[Any, ...], takes: Role, *, opset: int) -> ir.Model:
    """Export with a dynamic batch, and a dynamic length of text. Raises ModelError if it cannot be
    traced."""
    import torch

    from iq_export.model.export import exported

    axes = {0: torch.export.Dim(BATCH)}
    if takes is Role.IDS:
        axes[1] = torch.export.Dim(SEQ)
    kind = str(getattr(getattr(flat.model, "config", None), "model_type", "unknown"))
    shapes = tuple(dict(axes) for _ in example)
    return exported(
        flat, example, shapes, input_names_of(takes), flat.names, opset=opset, kind=kind
    )


@dataclass(frozen=True)
class Said:
    """What a model says to one window, in float64: `feeds` of the graph, `exact` by output."""

    feeds: dict[str, NDArray[Any]]
    exact: dict[str, NDArray[np.float64]]


def refer(flat: Any, example: tuple[Any, ...], takes: Role) -> list[Said]:
    """What the model says to random windows. Raises ModelError if that is not finite."""
    import torch

    from iq_export.model.arithmetic import float64

    said = []
    random = np.random.default_rng(0)
    for row in range(_BATCH):
        values = [np.ascontiguousarray(tensor[row : row + 1].numpy()) for tensor in example]
        random.shuffle(values[0].reshape(-1))
        with torch.no_grad(), float64():
            out = flat(*map(torch.from_numpy, values))
        exact = {name: tensor.numpy() for name, tensor in zip(flat.names, out, strict=True)}
        if not all(np.isfinite(value).all() for value in exact.values()):
            raise ModelError("The model's own outputs are not finite: its weights are damaged.")
        said.append(Said(dict(zip(input_names_of(takes), values, strict=True)), exact))
    return said


def parity(path: Path, said: list[Said]) -> float:
    """The largest error of the graph at `path`, as a share of an output's range.

    Raises GraphError if it cannot be run.
    """
    from iq_export.graph import io
    from iq_export.run.parts import outputs_of

    found = outputs_of(io.load(path), path.name, [each.feeds for each in said])
    worst = 0.0
    for each, outputs in zip(said, found, strict=True):
        for name, exact in each.exact.items():
            error = np.abs(outputs[name] - exact).max() / max(float(np.ptp(exact)), 1e-30)
            worst = max(worst, float(error) if np.isfinite(error) else np.inf)
    return worst
