"""The main job: a model in, a folder that deploys out."""

from __future__ import annotations

import json
import math
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from iq_export.bundle.manifest import Manifest, TensorInfo, json_safe, record_files
from iq_export.bundle.package import Bundle, atomic_folder, check_output, require_space
from iq_export.calibrate.data import (
    Window,
    held_out_windows,
    load_text,
    text_sha256,
    windows,
)
from iq_export.engine.build import build_engine
from iq_export.engine.plugin import MODES, provide_plugin
from iq_export.engine.profile import Profile
from iq_export.engine.targets import Target, check_opset, check_recipe, resolve_target
from iq_export.engine.trt import why_not_here
from iq_export.errors import BundleError, UsageError
from iq_export.progress import Progress
from iq_export.quant.recipe import Recipe, load_recipe
from iq_export.run.ort import PROVIDERS

# Short windows add first tokens at little cost: most sinks stand at position 0.
PROBES, PROBE_LENGTH = 64, 32
# Windows of the same text that nothing is made from: they tell how well sinks are matched.
HELD_OUT, HELD_OUT_LENGTH = 48, 64
REFERENCES = "references.json"
# Float32 bytes per byte of a 4-bit GGUF file, rounded up.
_GGUF_FACTOR = 8


@dataclass(frozen=True)
class CompileOptions:
    """What `iq-export compile` is asked for; see the README for each option's meaning.

    `samples` windows of `length` tokens calibrate; `work` holds intermediate graphs (a temporary
    folder beside `out` if None), which `keep_work` leaves there for `iq-export eval`.
    """

    model: str
    out: Path
    recipe: str = "w8a8"
    targets: tuple[str, ...] = ("rtx-ampere",)
    calibration: str = "builtin"
    samples: int = 16
    length: int = 512
    profile: Profile = field(default_factory=Profile)
    opset: int = 23
    dtype: str = "fp16"
    seed: int = 0
    plugin: str = "auto"
    tokenizer: Path | None = None
    force: bool = False
    keep_work: bool = False
    work: Path | None = None
    device: str = "cpu"
    max_relative_deviation: float = 0.10
    insertion: str = "auto"
    budget: float | None = None
    trust_remote_code: bool = False
    accept_terms: bool = False


def compile(options: CompileOptions, progress: Progress | None = None) -> Bundle:
    """Compile a model into a bundle at `options.out`, which is whole or absent.

    If TensorRT for a target is not installed, the bundle has the ONNX and a note that says how to
    get the engine. Raises a subclass of IqError for anything the user can mend.
    """
    progress = progress or Progress(quiet=True)
    begin = time.perf_counter()
    checked = _check(options)
    progress.total = progress.total or len(_steps(checked, options))
    with _work_folder(options) as work:
        traced, done = _calibrate_and_rewrite(options, checked.recipe, work, progress)
        with atomic_folder(options.out, options.force) as folder:
            _fill(folder, options, traced, done)
            sinks = done.sink_nodes
            engines, notes = _build(folder, options, checked, sinks, progress)
            timings = {**progress.timings, "total": time.perf_counter() - begin}
            manifest = _manifest(folder, options, checked, traced, done, engines, notes, timings)
            manifest.write(folder)
        _remember(work, options, done)
    return Bundle.open(options.out, verify=False)


def dry_run(options: CompileOptions) -> dict[str, Any]:
    """What a compile would do, with its memory and time, without loading the model's weights.

    Raises what `compile` would raise before its first step.
    """
    checked = _check(options)
    size = checked.weight_bytes or 0
    known = checked.weight_bytes is not None
    return {
        "model": f"{checked.source.name} ({checked.source.kind})",
        "recipe": asdict(checked.recipe),
        "targets": [f"{t.name}: {why_not_here(t) or 'builds here'}" for t in checked.targets],
        "steps": _steps(checked, options),
        "sites": "7 products per block of a gated transformer (q, k, v, o, gate, up, down)",
        "calibration": f"{options.samples} windows of {options.length} tokens, seed {options.seed}",
        "memory": f"about {_memory_need(size) / 1e9:.1f} GB" if known else "known after download",
        "disk": f"about {_disk_need(size) / 1e9:.1f} GB while it runs" if known else "likewise",
        "time": f"about {_minutes(size, options):.0f} min on 2 cores" if known else "likewise",
        "out": str(options.out),
    }


def reference_graphs(
    bundle: Bundle, work: Path | None, progress: Progress | None = None
) -> dict[str, Path]:
    """Graphs to compare a bundle with, label -> file: from the work folder, or made again.

    They are made by the same steps from the options in the manifest; the order is the table's.
    """
    folder = work or default_work(bundle.folder)
    expected = bundle.manifest.files["plan.json"].sha256
    found = _recall_references(folder, expected)
    if found:
        return found
    progress = progress or Progress(quiet=True)
    progress.note(f"no graphs of this bundle in {folder}: making them again")
    if "alpha" in bundle.manifest.options:
        progress.note(
            "this bundle is of an older version, which found sinks by --alpha: they are found "
            "anew, so the graph with insertion alone may differ from what the bundle was made of"
        )
    options = _options_of(bundle, folder)
    checked = _check(replace(options, force=True))
    with _work_folder(options) as made:
        _, done = _calibrate_and_rewrite(options, checked.recipe, made, progress)
        _remember(made, options, done, plan_sha256=expected)
    return _recall_references(folder, expected)


def default_work(out: Path) -> Path:
    """Where a compile keeps its intermediate graphs if no folder is named."""
    out = Path(out).absolute()
    return out.parent / f".{out.name}.work"


@dataclass(frozen=True)
class _Checked:
    source: Any
    recipe: Recipe
    targets: tuple[Target, ...]
    weight_bytes: int | None
    calibration_sha256: str


def _check(options: CompileOptions) -> _Checked:
    """Refuse in a second what would fail after minutes."""
    from iq_export.model.fetch import EMBEDDED
    from iq_export.sinks.form import INSERTIONS

    recipe = load_recipe(options.recipe)
    targets = tuple(resolve_target(name) for name in dict.fromkeys(options.targets))
    for target in targets:
        check_recipe(target, recipe.weight_bits)
        check_opset(target, options.opset)
    if options.device not in PROVIDERS:
        raise UsageError(f"unknown device '{options.device}': use {', '.join(PROVIDERS)}.")
    if options.plugin not in MODES:
        raise UsageError(f"unknown plugin mode '{options.plugin}': use {', '.join(MODES)}.")
    if options.dtype not in ("fp16", "fp32"):
        raise UsageError(f"unknown dtype '{options.dtype}': use fp16 or fp32.")
    if options.insertion not in INSERTIONS:
        raise UsageError(f"unknown insertion '{options.insertion}': use {', '.join(INSERTIONS)}.")
    if not 0 < options.max_relative_deviation < 1:
        raise UsageError("max_relative_deviation lies between 0 and 1.")
    if options.budget is not None and options.budget <= 1:
        raise UsageError(f"a budget of {options.budget:g} is not above 1: fp32 itself has 1.")
    if options.budget is not None and recipe.activation_max is None:
        raise UsageError(
            f"recipe '{options.recipe}' quantizes no activations: --budget is for those that do, "
            "like w8a8."
        )
    text = load_text(options.calibration)
    check_output(options.out, options.force)
    source = _source(options)
    embedded = EMBEDDED.get(source.name) if source.path is None else None
    size = _GGUF_FACTOR * embedded.gguf_bytes if embedded else _weight_bytes(source.path)
    if size is not None:
        require_space(options.out, _disk_need(size))
    return _Checked(source, recipe, targets, size, text_sha256(text))


def _source(options: CompileOptions) -> Any:
    from iq_export.model.load import resolve

    return resolve(
        options.model, tokenizer=options.tokenizer, trust_remote_code=options.trust_remote_code,
        accept_terms=options.accept_terms,
    )  # fmt: skip


def _steps(checked: _Checked, options: CompileOptions) -> list[str]:
    """Names of the steps of a compile, as its progress prints them."""
    steps = ["Trace", "Observe tokens", "Observe ranges"]
    if checked.recipe.folded_rotation:
        steps.append("Fold rotations")
    steps += ["Smooth and rotate", "Fit and insert sinks"]
    if checked.recipe.activation_max is not None or checked.recipe.gptq:
        steps.append("Calibrate quantizers")
    if checked.recipe.kv_bits == 8:
        steps.append("Calibrate the KV cache")
    steps.append("Choose the insertion")
    if options.budget is not None:
        steps.append("Search a mixed plan")
    steps += ["Quantize", "Check the quantized graph"]
    here = any(why_not_here(target) is None for target in checked.targets)
    if here and not checked.recipe.simulated:
        steps.append("Build engines")
    return steps


def _weight_bytes(path: Path | None) -> int | None:
    """Size of the float32 graph to expect, from the files of the model; None before a download."""
    if path is None:
        return None
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    if path.suffix == ".onnx":
        files += path.parent.glob(f"{path.name}*data")
    factor = _GGUF_FACTOR if path.suffix == ".gguf" else 2 if path.is_dir() else 1
    return factor * sum(file.stat().st_size for file in files)


def _memory_need(size: int) -> float:
    return 1.2e9 + 3.5 * size


def _disk_need(size: int) -> int:
    return int(3.5 * size) + (200 << 20)


def _minutes(size: int, options: CompileOptions) -> float:
    tokens = 4 * options.samples * options.length + PROBES * PROBE_LENGTH
    return 1.5 + tokens * size / 4 * 2 / 60e9 / 60 * 2


@contextmanager
def _work_folder(options: CompileOptions) -> Iterator[Path]:
    """The folder for intermediate graphs; removed afterwards unless it was asked for.

    The traced graph in a folder that was named is found again by the next run: long work resumes.
    """
    keep = options.keep_work or options.work is not None
    folder = options.work or default_work(options.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BundleError(f"cannot write in {folder.parent}: {error.strerror}") from error
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _calibrate_and_rewrite(
    options: CompileOptions, recipe: Recipe, work: Path, progress: Progress
) -> tuple[Any, Any]:
    from iq_export.calibrate.text_check import token_warnings
    from iq_export.model.trace import trace
    from iq_export.rewrite import Calibration, rewrite
    from iq_export.run.generate import Tokenizer

    source = _source(options)
    with progress.step("Trace"):
        traced = trace(source, work / "traced", opset=options.opset, progress=progress)
    text = load_text(options.calibration)
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
    warnings = token_warnings(data.windows, tokenizer)
    for warning in warnings:
        progress.note(f"warning: {warning}")
    stages = work / f"{options.recipe}-{options.dtype}"
    stages.mkdir(exist_ok=True)
    done = rewrite(traced.model, stages, recipe, options.dtype, data, progress)
    return traced, replace(done, warnings=[*warnings, *done.warnings])


def _fill(folder: Path, options: CompileOptions, traced: Any, done: Any) -> None:
    """Copy what ships: the quantized graph, the tokenizer and its kin, the plan and templates."""
    from iq_export.plan import plan_record, save_templates
    from iq_export.run.generate import Tokenizer

    for file in sorted(traced.assets.iterdir()):
        shutil.copyfile(file, folder / file.name)
    from iq_export.graph import io

    io.save(io.load(done.quantized), folder / "model.onnx")
    save_templates(done, folder / "sinks.safetensors")
    record = plan_record(done, Tokenizer(traced.assets))
    text = json.dumps(json_safe(record), indent=1, ensure_ascii=False) + "\n"
    (folder / "plan.json").write_text(text, encoding="utf-8")


def _build(
    folder: Path, options: CompileOptions, checked: _Checked, sinks: int, progress: Progress
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Engines for all targets that this machine has a TensorRT for; notes for the others."""
    engines: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    buildable = []
    if checked.recipe.simulated:
        return engines, [f"recipe {checked.recipe.name} is for study: no engine was built"]
    for target in checked.targets:
        reason = why_not_here(target)
        if reason is None:
            buildable.append(target)
        else:
            notes.append(reason)
    if not buildable:
        return engines, notes
    with progress.step("Build engines"):
        architectures = sorted({sm for t in buildable for sm in t.compute_capabilities})
        plugin = provide_plugin(options.plugin, folder / "plugins", architectures, sinks)
        for target in buildable:
            chosen = plugin.covering(target.compute_capabilities)
            if chosen.path is None and options.plugin == "auto" and sinks:
                notes.append(f"{target.name}: {chosen.reason}")
            report = build_engine(
                folder / "model.onnx", folder / "engines" / f"{target.name}.plan", target,
                options.profile, plugin=chosen.path, form_reason=chosen.reason, sink_nodes=sinks,
                progress=progress,
            )  # fmt: skip
            engines[target.name] = report.to_json()
    return engines, notes


def _manifest(
    folder: Path,
    options: CompileOptions,
    checked: _Checked,
    traced: Any,
    done: Any,
    engines: dict[str, dict[str, Any]],
    notes: list[str],
    timings: dict[str, float],
) -> Manifest:
    from iq_export.plan import lifecycle_records, mixed_record
    from iq_export.report.html import write_report
    from iq_export.run.generate import Tokenizer

    notes += done.warnings
    if not done.decisions:
        notes.append("no token can be told from the others by a spike: no sink op was inserted")
    if done.scale_exponent:
        notes.append(
            "half precision cannot hold the residual stream: scaled by "
            f"1/{2**done.scale_exponent}, exactly, in its constants"
        )
    notes += [f"left as it is: {r.node}: {r.reason}" for r in done.sites.refused]
    inputs, outputs = _interface(folder / "model.onnx")
    manifest = Manifest(
        name=traced.name,
        recipe=options.recipe,
        dtype=options.dtype,
        opset=options.opset,
        source={
            "model": options.model,
            "sha256": traced.source_sha256,
            "revision": traced.revision,
            "license": traced.license_note,
        },
        versions=_versions(),
        options={**_option_record(options), "calibration_sha256": checked.calibration_sha256},
        inputs=inputs,
        outputs=outputs,
        profile=options.profile.to_json(),
        targets=list(dict.fromkeys(options.targets)),
        engines=engines,
        lifecycles=lifecycle_records(done, Tokenizer(traced.assets)),
        mixed=mixed_record(done),
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


_RECORDED = ("model", "recipe", "calibration", "samples", "length", "opset", "dtype", "seed",
             "device", "max_relative_deviation", "insertion", "budget",
             "trust_remote_code")  # fmt: skip


def _option_record(options: CompileOptions) -> dict[str, Any]:
    record = {name: getattr(options, name) for name in _RECORDED}
    if options.tokenizer is not None:
        record["tokenizer"] = str(options.tokenizer)
    return record


def _options_of(bundle: Bundle, work: Path) -> CompileOptions:
    recorded = dict(bundle.manifest.options)
    tokenizer = recorded.pop("tokenizer", None)
    # No reference depends on the first two; "alpha" is an option that older versions had.
    for name in ("budget", "calibration_sha256", "alpha"):
        recorded.pop(name, None)
    return CompileOptions(
        out=bundle.folder,
        work=work,
        targets=(),
        tokenizer=Path(tokenizer) if tokenizer else None,
        **recorded,
    )


def _peak_rss() -> int:
    """High-water mark of this process or its largest child, bytes (Linux counts in KiB)."""
    unit = 1 if sys.platform == "darwin" else 1024
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return unit * max(resource.getrusage(who).ru_maxrss for who in whose)


def _remember(
    work: Path, options: CompileOptions, done: Any, *, plan_sha256: str | None = None
) -> None:
    """Write the baselines and note which graphs belong to the bundle, if the folder is kept."""
    if not (options.keep_work or options.work is not None):
        return
    from iq_export.references import write_baselines

    graphs = {"fp32": done.traced, **write_baselines(done, options)}
    if done.sinks:
        graphs["insertion only"] = done.inserted
    if plan_sha256 is None:
        plan_sha256 = record_files(options.out, ["plan.json"])["plan.json"].sha256
    record = {"plan_sha256": plan_sha256, "graphs": {k: str(v) for k, v in graphs.items()}}
    text = json.dumps(record, indent=1)
    (done.quantized.parent / REFERENCES).write_text(text, encoding="utf-8")
    done.quantized.unlink()
    done.quantized.with_name(done.quantized.name + ".data").unlink(missing_ok=True)


def _recall_references(work: Path, plan_sha256: str) -> dict[str, Path]:
    for file in sorted(work.glob(f"*/{REFERENCES}")):
        record = json.loads(file.read_text(encoding="utf-8"))
        graphs = {label: Path(path) for label, path in record["graphs"].items()}
        if record["plan_sha256"] == plan_sha256 and all(p.is_file() for p in graphs.values()):
            return graphs
    return {}
