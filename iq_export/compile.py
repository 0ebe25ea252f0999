"""The main job: a model in, a folder that deploys out."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from iq_export.bundle.lock import clear_dead
from iq_export.bundle.package import Bundle, atomic_folder, clear_partial, unmarked_partials
from iq_export.cost import gigabytes
from iq_export.disk import trouble_is_bundle_error
from iq_export.engine.build import build_engine
from iq_export.engine.plugin import PluginBuild, provide_plugin
from iq_export.engine.targets import engine_note
from iq_export.engine.trt import why_not_here
from iq_export.errors import EngineError, ModelError
from iq_export.files import copy_belonging
from iq_export.fill import Built, fill, make_manifest, records_of, versions
from iq_export.lengths import bundle_limit
from iq_export.observe.preprocessor import FILE as PREPROCESSOR
from iq_export.options import CompileOptions
from iq_export.precheck import Checked, Need, check, model_source, with_limit
from iq_export.progress import Progress
from iq_export.work import Work, check_work, default_work, work_folder


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
    earlier, options = _earlier(options)
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
            traced = trace_model(options, work, progress, earlier)
            made = traced.digests()
            if checked.source.reads_text:
                checked = with_limit(checked, bundle_limit(traced.assets, traced.model), progress)
            options = checked.options
            if earlier is None:
                done = calibrate_and_rewrite(options, checked, traced, work, progress)
                records = records_of(done, traced, None)
            else:
                from iq_export.carry import carry_over, unchanged

                with unchanged(earlier):
                    done = carry_over(options, checked, traced, earlier, work, progress)
                    records = records_of(done, traced, earlier)
            fill(folder, traced, made, done, records)
            if options.preprocessor is not None:
                steps = options.preprocessor
                copy_belonging(steps.parent, steps.name, folder / PREPROCESSOR, ModelError)
            sinks = done.sink_nodes
            built = _build(folder, options, checked, sinks, progress)
            timings = {**progress.timings, "total": time.perf_counter() - begin}
            manifest = make_manifest(
                folder, options, checked, traced, done, records, built, timings
            )
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
    earlier, options = _earlier(options)
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


def _earlier(options: CompileOptions) -> tuple[Bundle | None, CompileOptions]:
    """The bundle whose decisions are taken, if there is one, and the options with its recipe."""
    if options.decisions is None:
        return None, options
    from iq_export.carry import earlier_bundle

    return earlier_bundle(options, options.decisions)


def _not_yet(checked: Checked) -> list[str]:
    if checked.source.kind != "gguf" or checked.known.limit is not None:
        return []
    return [
        "how many positions the model has shows when the GGUF file is loaded: windows and engine "
        "shapes may get shorter then"
    ]


def _steps(checked: Checked, options: CompileOptions) -> list[str]:
    """Names of the steps of a compile, as its progress prints them."""
    here = any(t.name not in checked.gaps and why_not_here(t) is None for t in checked.targets)
    engines = ["Build engines"] if here and not checked.recipe.simulated else []
    if options.decisions is not None:
        return ["Trace", "Quantize", "Check the quantized graph", *engines]
    steps = ["Trace", "Observe tokens", "Fit sinks", "Observe ranges", "Smooth and rotate"]
    steps.append("Insert sinks")
    if checked.recipe.weights is not None:
        steps.append("Calibrate quantizers" if checked.recipe.calibrates else "Round weights")
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


def trace_model(
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


def calibrate_and_rewrite(
    options: CompileOptions, checked: Checked, traced: Any, work: Work, progress: Progress
) -> Any:
    """A `pipeline.Rewrite` of the traced model. What an interrupted run finished is taken from the
    work folder. Raises DataError if the text is too short, and GraphError as `rewrite` does."""
    from iq_export.calibration import calibration_of
    from iq_export.checkpoint import Checkpoint, job_key
    from iq_export.pipeline import rewrite

    data, warnings = calibration_of(options, checked, traced, progress)
    for warning in warnings:
        progress.note(f"warning: {warning}")
    stages = work.run / f"{options.recipe}-{options.dtype}"
    stages.mkdir()
    key = job_key(
        traced.digests(), traced.source_sha256, checked.recipe.record(), options.dtype, data,
        versions(),
    )  # fmt: skip
    kept = Checkpoint(work.unfinished, key, progress.note)
    done = rewrite(traced.model, stages, checked.recipe, options.dtype, data, progress, kept)
    return replace(done, warnings=[*traced.notes, *warnings, *done.warnings])


def _build(
    folder: Path, options: CompileOptions, checked: Checked, sinks: int, progress: Progress
) -> Built:
    """Engines for all targets that this machine has a TensorRT for; one that fails stops no other.

    Raises what is no refusal of TensorRT's: an interrupt, a full disk.
    """
    if checked.recipe.simulated:
        return Built(notes=[f"recipe {checked.recipe.name} is for study: no engine was built"])
    built = Built()
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
