"""What a compile is asked for, and what it can refuse in a second, before the model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from iq_export.bundle.package import check_output, require_space
from iq_export.cost import Shape, disk_need, memory_need, memory_note, minutes_need, require_memory
from iq_export.engine.onnx_header import read_header
from iq_export.engine.plugin import find_headers, why_no_plugin
from iq_export.engine.profile import Range
from iq_export.engine.targets import (
    AttentionForm,
    Target,
    check_formats,
    check_opset,
    resolve_target,
)
from iq_export.engine.trt import builder_gap, why_not_here
from iq_export.errors import EngineError, ModelError, UsageError
from iq_export.graph.interface import Interface
from iq_export.graph.proto import read
from iq_export.lengths import bundle_limit, engine_profile, window_length
from iq_export.observe.samples import folder_sha256, load_text, text_sha256
from iq_export.options import DEFAULT_TARGETS, CompileOptions, check_values
from iq_export.progress import Progress
from iq_export.run.ort import PROVIDERS, require_providers

if TYPE_CHECKING:
    from iq_export.model.limits import PositionLimit
    from iq_export.model.load import ModelSource
    from iq_export.recipe import Recipe


@dataclass(frozen=True)
class Known:
    """What is known of the model before it is loaded, as far as its files tell."""

    form: AttentionForm
    limit: PositionLimit | None = None
    layers: int | None = None
    shape: Shape | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Need:
    """What a compile takes, about: bytes of memory, of disk where it writes, and of the download
    that comes first; minutes on two cores, without download and engines."""

    memory: int
    disk: int
    download: int
    minutes: int


@dataclass(frozen=True)
class Checked:
    """`options` is what was `asked` with its defaults settled; `calibration` is the text, which is
    read once, empty where a model takes a folder's pictures; `calibration_sha256` is by what it is
    known wherever it lies; `need` is None where nothing tells the model's size yet; `gaps` says of
    a target why it gets no engine."""

    asked: CompileOptions
    options: CompileOptions
    source: ModelSource
    recipe: Recipe
    targets: tuple[Target, ...]
    known: Known
    need: Need | None
    calibration: str
    calibration_sha256: str
    gaps: dict[str, str]
    notes: list[str]


def check(options: CompileOptions) -> Checked:
    """Refuse in a second what would fail after minutes; raises a subclass of IqError."""
    from iq_export.model.trace import check_traced_opset
    from iq_export.recipe import load_recipe

    recipe = load_recipe(options.recipe)
    check_traced_opset(options.opset)
    names = DEFAULT_TARGETS if options.targets is None else options.targets
    targets = tuple(dict.fromkeys(resolve_target(name) for name in names))
    for target in targets:
        check_formats(target, recipe.formats)
        check_opset(target, options.opset)
    check_values(options)
    require_providers(PROVIDERS[options.device])
    if options.budget is not None and recipe.activations is None:
        raise UsageError(
            f"recipe '{options.recipe}' quantizes no activations: --budget is for those that do, "
            "like w8a8."
        )
    signals = Path(options.calibration)
    text = "" if signals.is_dir() else load_text(options.calibration)
    check_output(options.out, options.force)
    source = model_source(options)
    if source.reads_text and signals.is_dir():
        load_text(options.calibration)  # refuses it
    if not source.reads_text and not signals.is_dir():
        raise UsageError(
            f"{source.name} takes no text, so {options.calibration} cannot calibrate it: give a "
            "folder of pictures or recordings with --calibration DIR."
        )
    known = _known(source, recipe, options.dtype)
    built = () if recipe.simulated else targets
    gaps = _gaps(built, known.form, asked=options.targets is not None)
    if source.is_encoder or not source.reads_text or not source.cache:
        _check_whole(options, recipe, source)
        # Nothing is past.
        options = replace(options, profile=replace(options.profile, past=Range(0, 0, 0)))
    settled, remarks = _within(
        replace(options, targets=tuple(t.name for t in targets)), known.limit
    )
    engines = sum(t.name not in gaps and why_not_here(t) is None for t in built)
    need = _need(settled, source, recipe, known.shape, engines)
    warnings = []
    if need is not None:
        require_memory(need.memory, source.name)
        for folder in (options.out, options.work):
            if folder is not None:
                require_space(folder, need.disk)
        warnings = [note for note in (memory_note(need.memory),) if note is not None]
    return Checked(
        asked=options,
        options=settled,
        source=source,
        recipe=recipe,
        targets=targets,
        known=known,
        need=need,
        calibration=text,
        calibration_sha256=text_sha256(text) if source.reads_text else folder_sha256(signals),
        gaps=gaps,
        notes=[
            *known.notes,
            *gaps.values(),
            *remarks,
            *warnings,
            *_plugin_note(options, targets),
        ],
    )


def _check_whole(options: CompileOptions, recipe: Recipe, source: ModelSource) -> None:
    """Refuse what only a model has that predicts one token after the other, and for one that takes
    no text a folder of nothing that it takes."""
    if options.budget is not None:
        raise UsageError(
            f"--budget is one of perplexity, and {source.name} predicts no text: compile without."
        )
    if recipe.cache is not None:
        raise UsageError(
            f"recipe '{options.recipe}' quantizes a KV cache, and {source.name} has none: use w8a8."
        )
    steps = options.preprocessor or source.path
    if not source.reads_text and steps is not None:
        from iq_export.observe.signals import check_signals

        check_signals(Path(options.calibration), steps)


def _need(
    options: CompileOptions, source: ModelSource, recipe: Recipe, shape: Shape | None, engines: int
) -> Need | None:
    """What it takes, if the model's shape is known."""
    if shape is None:
        return None
    calibrates = options.decisions is None
    tokens = options.samples * options.length
    return Need(
        memory_need(shape, recipe, tokens=tokens, calibrates=calibrates),
        disk_need(
            shape, recipe, options.dtype, calibrates=calibrates,
            copied=shape.whole or source.kind in ("gguf", "onnx"),
            engines=engines, keep=options.keep_work or options.work is not None,
        ),
        2 * shape.weights if source.path is None else 0,
        minutes_need(shape, recipe, tokens=tokens, calibrates=calibrates),
    )  # fmt: skip


def with_limit(checked: Checked, limit: PositionLimit | None, progress: Progress) -> Checked:
    """`checked` by the limit that only the traced model told: that of a GGUF file, or a table of
    positions that no configuration speaks of."""
    known = checked.known.limit
    if limit is None or (known is not None and (known.hard or not limit.hard)):
        return checked
    asked = replace(checked.asked, targets=checked.options.targets)
    options, remarks = _within(asked, limit)
    for remark in remarks:
        progress.note(remark)
    return replace(checked, options=options, notes=[*checked.notes, *remarks])


def _plugin_note(options: CompileOptions, targets: Sequence[Target]) -> list[str]:
    """What `--plugin on` lacks; whether there are sinks to need it shows only later."""
    here = any(why_not_here(target) is None for target in targets)
    reason = why_no_plugin(find_headers()) if options.plugin == "on" and here else ""
    said = reason.removeprefix("no plugin: ")
    return [f"with --plugin on there is no engine if the model has sinks: {said}"] if said else []


def _within(
    options: CompileOptions, limit: PositionLimit | None
) -> tuple[CompileOptions, list[str]]:
    """The options with lengths that the model has positions for, and notes."""
    length, remarks = window_length(options.length, limit)
    profile, more = engine_profile(options.profile, limit)
    return replace(options, length=length, profile=profile), [*remarks, *more]


def _known(source: ModelSource, recipe: Recipe, dtype: str) -> Known:
    """Check what the model's files tell without being loaded, as far as they are within reach.

    Of a GGUF file the header was checked by `resolve`; the rest is when it is loaded.
    """
    from iq_export.model.limits import position_limit
    from iq_export.model.load import configuration
    from iq_export.model.support import check_support

    if source.kind == "onnx":
        assert source.path is not None
        try:
            header = read_header(source.path)
        except EngineError as error:
            raise ModelError(f"{source.path} is not an ONNX file, or it is damaged.") from error
        form = AttentionForm(dtype, header.head_dim, header.softcap)
        shape = _shape_of_graph(source.path)
        limit = bundle_limit(source.tokenizer, source.path) if source.tokenizer else None
        return Known(form, limit, shape=shape)
    if source.kind == "gguf":
        return Known(AttentionForm(dtype), shape=_shape_of_gguf(source))
    found = configuration(source)
    if found is None:
        hub = source.kind == "hub"
        note = (
            f"config.json of {source.name} could not be read (the Hugging Face hub cannot be "
            "reached): the model is checked after its download"
        )
        return Known(AttentionForm(dtype), notes=(note,) if hub else ())
    if source.is_encoder:
        if source.part is not None:
            raise UsageError(
                f"--part {source.part} is of models that write text, and {source.name} is compiled "
                f"for {source.task}: leave it out, or give --task text-generation."
            )
        return Known(AttentionForm(dtype), position_limit(found) if source.reads_text else None)
    remote = source.trust_remote_code and "auto_map" in found
    support = check_support(found, source.name, recipe, part=source.part, remote_code=remote)
    return Known(
        AttentionForm(dtype, support.head_dim, support.softcap),
        position_limit(support.completed),
        support.layers,
        support.shape,
    )


def _gaps(targets: Sequence[Target], form: AttentionForm, *, asked: bool) -> dict[str, str]:
    """Why targets get no engine, by name, where their builder is known to lack something.

    Raises EngineError if an engine that was asked for would be built here.
    """
    found = {target: builder_gap(target, form) for target in targets}
    gaps = {target: gap for target, gap in found.items() if gap is not None}
    for target, gap in gaps.items():
        if asked and why_not_here(target) is None:
            raise EngineError(
                f"{gap}. Without --target the bundle is made all the same, with no engine."
            )
    return {target.name: gap for target, gap in gaps.items()}


def model_source(options: CompileOptions) -> ModelSource:
    """The model that is asked for, found but not loaded."""
    from iq_export.model.load import resolve

    return resolve(
        options.model, tokenizer=options.tokenizer, trust_remote_code=options.trust_remote_code,
        accept_terms=options.accept_terms, part=options.part, task=options.task,
    )  # fmt: skip


def _shape_of_gguf(source: ModelSource) -> Shape | None:
    """From the header of the file, if it is here."""
    from iq_export.model.fetch import EMBEDDED, embedded_model, is_cached
    from iq_export.model.gguf_file import read_header as read_gguf

    path = source.path
    if path is None and source.name in EMBEDDED and is_cached(source.name):
        path = embedded_model(source.name)
    if path is None:
        return None
    header = read_gguf(path)
    layers = header.keys.get(f"{header.architecture}.block_count")
    if not isinstance(layers, int):
        return None
    return Shape.of_matrices((tensor.shape for tensor in header.tensors.values()), layers)


def _shape_of_graph(path: Path) -> Shape | None:
    """From the weights that an ONNX file lists."""
    graph = read(path, ModelError).graph
    layers = len(Interface.of_proto(graph).past) // 2
    return Shape.of_matrices((tuple(tensor.dims) for tensor in graph.initializer), layers)
