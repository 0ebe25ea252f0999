"""The main job: a model in, a folder that deploys out."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iq_export.bundle.lock import claim_shared, clear_dead
from iq_export.bundle.manifest import (
    MANIFEST_NAME,
    GraphInfo,
    Manifest,
    TensorInfo,
    json_safe,
    listable,
    record_files,
)
from iq_export.bundle.package import (
    MODEL_NAME,
    PLAN_NAME,
    Bundle,
    atomic_folder,
    clear_partial,
    unmarked_partials,
)
from iq_export.bundle.recipe import recipe_of
from iq_export.checksum import sha256_file
from iq_export.cost import gigabytes
from iq_export.disk import trouble_is_bundle_error
from iq_export.engine.build import build_engine
from iq_export.engine.plugin import PluginBuild, provide_plugin
from iq_export.engine.targets import engine_note
from iq_export.engine.trt import why_not_here
from iq_export.errors import (
    BundleError,
    DataError,
    EngineError,
    IqError,
    ModelError,
    UsageError,
)
from iq_export.files import copy_belonging
from iq_export.graph.model_files import model_files
from iq_export.lengths import bundle_limit
from iq_export.observe.samples import (
    Window,
    check_windows,
    held_out_windows,
    is_pipe,
    windows,
)
from iq_export.options import CompileOptions, record, repeated
from iq_export.precheck import Checked, Need, check, model_source, with_limit
from iq_export.progress import Progress
from iq_export.run.ort import PROVIDERS
from iq_export.work import Work, check_work, default_work, kept_trace, work_folder

if TYPE_CHECKING:
    from iq_export.decisions import Decisions
    from iq_export.graph.sites import Sites
    from iq_export.observe.walk import Graph

# Short windows add first tokens at little cost: most sinks stand at position 0.
PROBES, PROBE_LENGTH = 64, 32
# Windows of the same text that nothing is made from: they tell how well sinks are matched.
HELD_OUT, HELD_OUT_LENGTH = 48, 64


class EnginesFailed(EngineError):
    """TensorRT refused one or more engines at the end: `bundle` is whole without them."""

    def __init__(self, bundle: Bundle) -> None:
        failures = bundle.manifest.graph.engine_failures
        names = ", ".join(failures)
        super().__init__(
            f"{bundle.folder} is complete but for the engine of {names}: "
            f"{' | '.join(failures.values()).rstrip('.')}. Its model.onnx can be used as it is; "
            f"try again with: iq-export build {bundle.folder} --target {next(iter(failures))}, or "
            "with another target or smaller shapes."
        )
        self.bundle = bundle


def compile(options: CompileOptions, progress: Progress | None = None) -> Bundle:
    """Compile a model into a bundle at `options.out`, which is whole or absent.

    If TensorRT for a target is not installed, the bundle has the ONNX and a note that says how to
    get the engine. Raises a subclass of IqError for anything the user can mend: EnginesFailed when
    TensorRT refuses an engine in the last step, after the bundle was put in place without it.
    """
    progress = progress or Progress(quiet=True)
    begin = time.perf_counter()
    check_work(options.out, options.work)
    clear_partial(options.out)
    clear_dead(default_work(options.out))
    for path in unmarked_partials(options.out):
        progress.note(
            f"{path} is the beginning of a bundle by an older version of iq-export: remove it if "
            "none is running"
        )
    earlier, options = _decided(options)
    checked = check(options)
    options = checked.options
    if checked.need is not None:
        progress.note(f"needs {_said(checked.need)}")
    for note in checked.notes:
        progress.note(note)
    progress.total = progress.total or len(_steps(checked, options))
    out = Path(os.path.abspath(options.out))
    keep = options.keep_work or options.work is not None
    with work_folder(out, options.work, keep=keep, say=progress.waits) as work:
        with atomic_folder(out, options.force, say=progress.waits) as folder:
            traced = _trace(options, work, progress, earlier)
            made = traced.digests()
            checked = with_limit(checked, bundle_limit(traced.assets, traced.model), progress)
            options = checked.options
            if earlier is None:
                done = _calibrate_and_rewrite(options, checked, traced, work, progress)
                records = _records(done, traced, None)
            else:
                with _unchanged(earlier):
                    done = _carry(options, checked, traced, earlier, work, progress)
                    records = _records(done, traced, earlier)
            _fill(folder, traced, made, done, records)
            sinks = done.sink_nodes
            built = _build(folder, options, checked, sinks, progress)
            timings = {**progress.timings, "total": time.perf_counter() - begin}
            manifest = _manifest(folder, options, checked, traced, done, records, built, timings)
            manifest.write(folder)
        if keep:
            but = f"{out} is complete, but the graph to compare it with was not kept: "
            with trouble_is_bundle_error(work.folder, but):
                work.keep_trace()
                work.forget_unfinished()
    bundle = Bundle(options.out, manifest)
    if built.failures:
        raise EnginesFailed(bundle)
    return bundle


def dry_run(options: CompileOptions) -> dict[str, Any]:
    """What a compile would do, with its memory and time, without loading the model's weights.

    Raises what `compile` would raise before its first step.
    """
    check_work(options.out, options.work)
    earlier, options = _decided(options)
    checked = check(options)
    options = checked.options
    need = checked.need
    layers = checked.known.layers
    return {
        "model": f"{checked.source.name} ({checked.source.kind})",
        "recipe": checked.recipe.record(),
        "targets": [
            f"{t.name}: {checked.gaps.get(t.name) or why_not_here(t) or 'builds here'}"
            for t in checked.targets
        ],
        "steps": _steps(checked, options),
        "decisions": "made in these steps" if earlier is None else f"those of {earlier.folder}",
        "sites": f"the weighted products of {layers or 'all'} blocks",
        "calibration": f"{options.samples} windows of {options.length} tokens, seed {options.seed}",
        "shapes": ", ".join(
            f"{axis} {sizes['min']} to {sizes['max']}"
            for axis, sizes in options.profile.to_json().items()
        ),
        "memory": "known after download" if need is None else f"about {gigabytes(need.memory)}",
        "disk": "likewise" if need is None else f"about {gigabytes(need.disk)}{_download(need)}",
        "time": "likewise" if need is None else f"about {need.minutes:,} min on 2 cores",
        "notes": [*checked.notes, *_not_yet(checked)],
        "out": str(options.out),
    }


def _not_yet(checked: Checked) -> list[str]:
    if checked.source.kind != "gguf" or checked.known.limit is not None:
        return []
    return [
        "how many positions the model has shows when the GGUF file is loaded: windows and engine "
        "shapes may get shorter then"
    ]


def reference_graphs(
    bundle: Bundle,
    work: Path | None,
    progress: Progress | None = None,
    hold: ExitStack | None = None,
    **permitted: bool,
) -> dict[str, Graph]:
    """Graphs to compare a bundle with, by label, in the order of the table.

    The first is the traced graph, from the work folder or traced again; the others are lowered in
    memory from the decisions in the bundle; one of an older version, which does not hold them, is
    calibrated again from the options in its manifest.
    What permits code or terms (`options.PERMISSIONS`) is not taken from there, whoever wrote it: it
    is asked for anew.
    Until `hold` is closed no other run changes the traced graph. Raises ModelError if the model is
    not what the bundle was made of, and BundleError if another run replaced the graph at once.
    """
    from iq_export.baselines import baselines
    from iq_export.passes.order import INSERTED

    check_work(bundle.folder, work)
    folder = work or default_work(bundle.folder)
    progress = progress or Progress(quiet=True)
    plan = bundle.plan()
    recalled = isinstance(plan.get("decisions"), dict) and isinstance(plan.get("absmax"), dict)
    if not recalled and is_pipe(str(bundle.manifest.options.get("calibration"))):
        raise DataError(
            f"the calibration text of {bundle.folder} came from a pipe and cannot be read again: "
            "measure the bundle alone with --bundle-only, or compile it again from a file"
        )
    held, done = _hold(bundle, folder, progress, hold) if recalled else None, None
    if held is None:
        options = _options_of(bundle, folder, **permitted)
        if recalled:
            progress.note(f"no traced graph of this bundle in {folder}: tracing {options.model!r}")
        else:
            progress.note(f"{bundle.folder} is of an older version: calibrating again")
        with work_folder(bundle.folder, folder, keep=True, say=progress.waits) as made:
            checked = None if recalled else _checked_again(bundle, options, folder, progress)
            traced = _trace(options, made, progress)
            _check_same_source(bundle, traced.source_sha256)
            if checked is not None:
                done = _calibrate_and_rewrite(options, checked, traced, made, progress)
            with trouble_is_bundle_error(made.folder):
                made.keep_trace()
        held = _hold(bundle, folder, progress, hold)
    if held is None:
        raise BundleError(f"another run has replaced the graph in {folder}: run it again")
    done = _recall(bundle, held, plan["absmax"]) if done is None else replace(done, traced=held)
    graphs: dict[str, Graph] = {"fp32": held, **baselines(done)}
    if done.sinks:
        graphs["insertion only"] = done.graph(INSERTED)
    return graphs


def _checked_again(
    bundle: Bundle, options: CompileOptions, folder: Path, progress: Progress
) -> Checked:
    """What the bundle, of an older version, is calibrated from."""
    if "alpha" in bundle.manifest.options:
        progress.note(
            "this bundle is of an older version, which found sinks by --alpha: they are found "
            "anew, so the graph with insertion alone may differ from what the bundle was made of"
        )
    checked = check(replace(options, out=folder / "bundle"))  # the bundle itself is only read
    recorded = bundle.manifest.options.get("calibration_sha256", checked.calibration_sha256)
    if recorded != checked.calibration_sha256:
        progress.note(
            f"warning: the calibration text {options.calibration} has changed since "
            f"{bundle.folder} was made: only the fp32 graph is what it was then"
        )
    return checked


def _hold(bundle: Bundle, folder: Path, progress: Progress, hold: ExitStack | None) -> Path | None:
    """The kept graph that was traced from the source of `bundle`, if there is one and it is whole:
    then no run changes it until `hold` is closed."""
    from iq_export.model.trace import TracedModel

    with ExitStack() as stack:
        stack.enter_context(claim_shared(folder, say=progress.waits))
        place = kept_trace(folder)
        if place is None:
            return None
        try:
            traced = TracedModel.load(place)
        except ModelError:
            return None
        if bundle.manifest.source.get("sha256", traced.source_sha256) != traced.source_sha256:
            return None
        if not _weights_are_there(traced.model):
            return None
        if hold is not None:
            hold.push(stack.pop_all())
        return traced.model


def _weights_are_there(traced: Path) -> bool:
    """Whether the files that a traced graph refers to are what they were."""
    from iq_export.graph import io
    from iq_export.graph.stored import StoredTensor

    tensors = (value.const_value for value in io.load(traced).graph.initializers.values())
    places = {t.place.file: t.place for t in tensors if isinstance(t, StoredTensor)}
    return all(place.is_there() for place in places.values())


def _check_same_source(bundle: Bundle, sha256: str) -> None:
    """Refuse to compare a bundle with another model than it was made of."""
    if bundle.manifest.source.get("sha256", sha256) != sha256:
        raise ModelError(
            f"{bundle.manifest.source['model']} is not what {bundle.folder} was made of: its files "
            "have changed since. Compile it again, or measure the bundle alone with --bundle-only."
        )


@dataclass(frozen=True)
class _Built:
    """Engine reports by target, why TensorRT refused the others, and notes."""

    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _steps(checked: Checked, options: CompileOptions) -> list[str]:
    """Names of the steps of a compile, as its progress prints them."""
    here = any(t.name not in checked.gaps and why_not_here(t) is None for t in checked.targets)
    engines = ["Build engines"] if here and not checked.recipe.simulated else []
    if options.decisions is not None:
        return ["Trace", "Quantize", "Check the quantized graph", *engines]
    steps = ["Trace", "Observe tokens", "Fit sinks", "Observe ranges", "Smooth and rotate"]
    steps.append("Insert sinks")
    if checked.recipe.activations is not None or checked.recipe.gptq:
        steps.append("Calibrate quantizers")
    if checked.recipe.cache is not None:
        steps.append("Calibrate the KV cache")
    steps.append("Choose the insertion")
    if options.budget is not None:
        steps.append("Search a mixed plan")
    steps += ["Quantize", "Check the quantized graph"]
    return steps + engines


def _said(need: Need) -> str:
    return (
        f"about {gigabytes(need.memory)} of memory, {gigabytes(need.disk)} of disk"
        f"{_download(need)} and {need.minutes:,} min on 2 cores"
    )


def _download(need: Need) -> str:
    return f" (and {gigabytes(need.download)} for the download)" if need.download else ""


def _trace(
    options: CompileOptions, work: Work, progress: Progress, earlier: Bundle | None = None
) -> Any:
    """The traced model. Raises ModelError before it is loaded if `earlier`, whose decisions are
    taken, was made of another one."""
    from iq_export.model.trace import trace

    def accept(sha256: str) -> None:
        if earlier is not None and earlier.manifest.source.get("sha256") != sha256:
            raise ModelError(
                f"{options.model} is not the model that {earlier.folder} was made of, so its "
                "decisions are for another one: compile without --decisions"
            )

    with progress.step("Trace"):
        return trace(
            model_source(options), work.place_of_trace(), opset=options.opset, progress=progress,
            reuse=work.traced, accept=accept,
        )  # fmt: skip


def _calibrate_and_rewrite(
    options: CompileOptions, checked: Checked, traced: Any, work: Work, progress: Progress
) -> Any:
    from iq_export.checkpoint import Checkpoint, job_key
    from iq_export.observe.text_check import token_warnings
    from iq_export.pipeline import Calibration, rewrite
    from iq_export.run.generate import Tokenizer

    text = checked.calibration
    tokenizer = Tokenizer(traced.assets)

    def cut(length: int, count: int, seed: int) -> list[Window]:
        return windows(tokenizer, text, length=length, count=count, seed=seed, bos="mixed")

    data = Calibration(
        windows=cut(options.length, options.samples, options.seed),
        probes=cut(min(PROBE_LENGTH, options.length), PROBES, options.seed + 1),
        max_relative_deviation=options.max_relative_deviation,
        seed=options.seed,
        providers=PROVIDERS[options.device],
        insertion=options.insertion,
        budget=math.inf if options.budget is None else options.budget,
    )
    data = replace(
        data,
        heldout=held_out_windows(
            tokenizer, text, data.all, length=min(HELD_OUT_LENGTH, options.length), count=HELD_OUT
        ),
    )
    check_windows(
        [*data.all, *data.heldout], tokenizer, traced.model, f"text {options.calibration}"
    )
    warnings = token_warnings(data.windows, tokenizer)
    for warning in warnings:
        progress.note(f"warning: {warning}")
    stages = work.run / f"{options.recipe}-{options.dtype}"
    stages.mkdir()
    key = job_key(
        traced.digests(), traced.source_sha256, checked.recipe.record(), options.dtype, data,
        _versions(),
    )  # fmt: skip
    kept = Checkpoint(work.unfinished, key, progress.note)
    done = rewrite(traced.model, stages, checked.recipe, options.dtype, data, progress, kept)
    return replace(done, warnings=[*traced.notes, *warnings, *done.warnings])


def _decided(options: CompileOptions) -> tuple[Bundle | None, CompileOptions]:
    """The bundle whose decisions are taken, if there is one, and the options with its recipe.

    Raises BundleError if it is damaged or of an older version, which did not record them, and
    UsageError for an option that they do not leave open.
    """
    if options.decisions is None:
        return None, options
    from iq_export.saved_decisions import recorded

    earlier = Bundle.open(options.decisions)
    for name in ("budget", "insertion", "max_relative_deviation"):
        if getattr(options, name) != getattr(CompileOptions, name):
            raise UsageError(
                f"--{name.replace('_', '-')} is among what was decided for {earlier.folder}: "
                "leave it out, or compile without --decisions"
            )
    options = replace(options, recipe=recipe_for(earlier, options.recipe))
    recorded(earlier)
    if options.dtype == "fp16" and earlier.manifest.dtype != "fp16":
        raise UsageError(
            f"{earlier.folder} was decided for fp32, and half precision needs decisions of its "
            "own: give --dtype fp32, or compile without --decisions"
        )
    return earlier, options


@contextmanager
def _unchanged(earlier: Bundle) -> Iterator[None]:
    """Raise BundleError if files of `earlier` that decisions are read from are not, when the block
    ends, what they were when it was opened: whatever it made, or failed at, came of others."""
    from iq_export.saved_decisions import TEMPLATES_NAME

    read = {
        name: record.sha256
        for name, record in earlier.manifest.files.items()
        if name in (PLAN_NAME, TEMPLATES_NAME) or name.startswith(MODEL_NAME)
    }
    try:
        yield
    except IqError as error:
        try:
            _check_stage(earlier.folder, read)
        except BundleError as changed:
            raise changed from error
        raise
    _check_stage(earlier.folder, read)


def _carry(
    options: CompileOptions,
    checked: Checked,
    traced: Any,
    earlier: Bundle,
    work: Work,
    progress: Progress,
) -> Any:
    """The model lowered from the decisions of `earlier`."""
    from iq_export.pipeline import carry
    from iq_export.run.generate import Tokenizer
    from iq_export.saved_decisions import load_decisions

    tokenizer = Tokenizer(traced.assets)
    cut = windows(
        tokenizer, checked.calibration, length=options.length, count=options.samples,
        seed=options.seed, bos="mixed",
    )  # fmt: skip
    check_windows(cut, tokenizer, traced.model, f"text {options.calibration}")
    stages = work.run / f"{options.recipe}-{options.dtype}"
    stages.mkdir()

    def decided(sites: Sites) -> Decisions:
        return replace(load_decisions(earlier, sites), dtype=options.dtype)

    done = carry(
        traced.model, stages, decided, cut,
        providers=PROVIDERS[options.device], progress=progress,
    )  # fmt: skip
    return replace(done, warnings=[*traced.notes, *done.warnings])


def _recall(bundle: Bundle, traced: Path, absmax: dict[str, Any]) -> Any:
    """The decisions of `bundle` for its own model."""
    from iq_export.pipeline import recall
    from iq_export.saved_decisions import load_decisions

    if not all(isinstance(value, (int, float)) for value in absmax.values()):
        raise BundleError(f"{bundle.path(PLAN_NAME)} is damaged: compile the bundle again")
    return recall(traced, lambda sites: load_decisions(bundle, sites), absmax)


def recipe_for(earlier: Bundle, asked: str) -> str:
    """The name of the recipe that the decisions of `earlier` were made for.

    Raises UsageError if another one was `asked` for, and BundleError if it has changed since.
    """
    from iq_export.recipe import load_recipe

    name = earlier.manifest.recipe
    if asked not in (name, CompileOptions.recipe):
        raise UsageError(
            f"the decisions of {earlier.folder} are for recipe '{name}', and '{asked}' is another: "
            "leave --recipe out, or compile without --decisions"
        )
    if (made := recipe_of(earlier.manifest)) is not None and made != load_recipe(name):
        raise BundleError(
            f"recipe '{name}' is not what it was when {earlier.folder} was made: compile without "
            "--decisions"
        )
    return name


@dataclass(frozen=True)
class _Records:
    """What plan.json and the manifest say of how the graph was made."""

    plan: dict[str, Any]
    lifecycles: list[dict[str, Any]]
    mixed: dict[str, Any] | None


def _records(done: Any, traced: Any, earlier: Bundle | None) -> _Records:
    """Of a run that calibrated, or what `earlier` says with what is new."""
    from iq_export.plan import fusion_record, lifecycle_records, mixed_record, plan_record
    from iq_export.run.generate import Tokenizer
    from iq_export.saved_decisions import record as decisions_record

    if earlier is None:
        tokenizer = Tokenizer(traced.assets)
        lifecycles = lifecycle_records(done, tokenizer)
        return _Records(plan_record(done, tokenizer), lifecycles, mixed_record(done))
    new = {
        "fusion": fusion_record(done.quantized),
        "warnings": done.warnings,
        "decisions": decisions_record(done.chosen),
    }
    lifecycles = earlier.manifest.graph.lifecycles
    return _Records({**earlier.plan(), **new}, lifecycles, earlier.manifest.mixed)


def _fill(folder: Path, traced: Any, made: dict[str, str], done: Any, records: _Records) -> None:
    """Put in place what ships: the graph, which is moved there, the tokenizer and its kin, the plan
    and templates.

    Raises BundleError if another program wrote to the traced model, whose files were `made`, while
    this run used them.
    """
    from iq_export.saved_decisions import TEMPLATES_NAME, save_arrays

    for file in sorted(traced.assets.iterdir()):
        copy_belonging(traced.assets, file.name, folder / listable(file.name))
    shutil.rmtree(done.quantized.with_name("codes"), ignore_errors=True)  # they are in the graph
    for file in model_files(done.quantized):
        shutil.move(file, folder / file.name)
    _check_stage(traced.folder, made)
    save_arrays(done.chosen, folder / TEMPLATES_NAME)
    text = json.dumps(json_safe(records.plan), indent=1, ensure_ascii=False) + "\n"
    (folder / "plan.json").write_text(text, encoding="utf-8")


def _check_stage(folder: Path, digests: dict[str, str]) -> None:
    """BundleError unless the files of this stage are those that this run wrote or checked."""
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != digest:
            raise BundleError(
                f"another program changed {path} while this run used it: nothing was written, "
                "compile again"
            )


def _build(
    folder: Path, options: CompileOptions, checked: Checked, sinks: int, progress: Progress
) -> _Built:
    """Engines for all targets that this machine has a TensorRT for; one that fails stops no other.

    Raises what is no refusal of TensorRT's: an interrupt, a full disk.
    """
    if checked.recipe.simulated:
        return _Built(notes=[f"recipe {checked.recipe.name} is for study: no engine was built"])
    built = _Built()
    buildable = []
    for target in checked.targets:
        reason = None if target.name in checked.gaps else why_not_here(target)
        if reason is not None:
            built.notes.append(reason)
        elif target.name not in checked.gaps:
            buildable.append(target)
    if not buildable:
        return built
    with progress.step("Build engines"):
        architectures = sorted({sm for t in buildable for sm in t.compute_capabilities})
        plugin: PluginBuild | EngineError
        try:
            plugin = provide_plugin(options.plugin, folder / "plugins", architectures, sinks)
        except EngineError as error:  # --plugin on, and it cannot be compiled
            plugin = error
        for target in buildable:
            try:
                if isinstance(plugin, EngineError):
                    raise plugin
                chosen = plugin.covering(target.compute_capabilities)
                if chosen.path is None and options.plugin == "auto" and sinks:
                    built.notes.append(f"{target.name}: {chosen.reason}")
                report = build_engine(
                    folder / "model.onnx", folder / "engines" / f"{target.name}.plan", target,
                    options.profile, plugin=chosen.path, form_reason=chosen.reason,
                    sink_nodes=sinks, progress=progress,
                )  # fmt: skip
            except EngineError as error:
                # The path of a folder that is renamed soon would lead nowhere.
                reason = str(error).replace(f"{folder}{os.sep}", "")
                built.failures[target.name] = reason
                built.notes.append(f"{engine_note(target.name)}: {reason}")
                progress.note(built.notes[-1])
            else:
                built.engines[target.name] = report.to_json()
    return built


def _manifest(
    folder: Path,
    options: CompileOptions,
    checked: Checked,
    traced: Any,
    done: Any,
    records: _Records,
    built: _Built,
    timings: dict[str, float],
) -> Manifest:
    from iq_export.report.html import write_report

    notes = [*checked.notes, *built.notes, *done.warnings]
    if not records.lifecycles:
        notes.append("no token can be told from the others by a spike: no sink op was inserted")
    if done.chosen.exponent:
        notes.append(
            "half precision cannot hold the residual stream: scaled by "
            f"1/{2**done.chosen.exponent}, exactly, in its constants"
        )
    notes += [f"left as it is: {r.node}: {r.reason}" for r in done.sites.refused]
    inputs, outputs = _interface(folder / MODEL_NAME)
    graph = GraphInfo(
        inputs=inputs,
        outputs=outputs,
        profile=options.profile.to_json(),
        engines=built.engines,
        engine_failures=built.failures,
        lifecycles=records.lifecycles,
    )
    manifest = Manifest(
        name=traced.name,
        recipe=options.recipe,
        recipe_settings=checked.recipe.record(),
        dtype=options.dtype,
        opset=options.opset,
        source={
            "model": options.model,
            "sha256": traced.source_sha256,
            "revision": traced.revision,
            "license": traced.license_note,
        },
        versions=_versions(),
        options={**record(options), "calibration_sha256": checked.calibration_sha256},
        graphs=[graph],
        targets=[target.name for target in checked.targets],
        check=done.check.to_dict(),
        mixed=records.mixed,
        timings=timings,
        peak_rss_bytes=_peak_rss(),
        notes=notes,
    )
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    write_report(manifest, plan, folder / "report.html")
    return replace(manifest, files=record_files(folder))


def _interface(model: Path) -> tuple[list[TensorInfo], list[TensorInfo]]:
    import onnx_ir as ir

    graph = ir.load(model).graph

    def info(value: Any) -> TensorInfo:
        shape = [size if isinstance(size, int) else str(size.value) for size in value.shape]
        return TensorInfo(value.name, value.dtype.name.lower(), shape)

    return [info(v) for v in graph.inputs], [info(v) for v in graph.outputs]


def _versions() -> dict[str, str]:
    packages = ("iq-export", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "numpy")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _options_of(bundle: Bundle, work: Path, **permitted: bool) -> CompileOptions:
    """The options that a bundle was compiled with, as far as its references depend on them.

    Raises BundleError if one is of another kind than this version writes.
    """
    values = permitted | repeated(bundle.manifest.options, bundle.folder / MANIFEST_NAME)
    return CompileOptions(**values, out=bundle.folder, work=work, targets=())


def _peak_rss() -> int:
    """High-water mark of this process or its largest child, bytes (Linux counts in KiB)."""
    unit = 1 if sys.platform == "darwin" else 1024
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return unit * max(resource.getrusage(who).ru_maxrss for who in whose)
