"""Fill the folder of a bundle, and write down what is in it and how it was made."""

from __future__ import annotations

import json
import platform
import resource
import shutil
import sys
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from iq_export.bundle.manifest import (
    GraphInfo,
    Manifest,
    TensorInfo,
    json_safe,
    listable,
    record_files,
)
from iq_export.bundle.package import MODEL_NAME, Bundle
from iq_export.checksum import check_files
from iq_export.files import copy_belonging
from iq_export.graph.model_files import model_files
from iq_export.options import CompileOptions, record
from iq_export.precheck import Checked


@dataclass(frozen=True)
class Built:
    """Engine reports by target, why TensorRT refused the others, and notes."""

    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Records:
    """What plan.json and the manifest say of how the graph was made."""

    plan: dict[str, Any]
    lifecycles: list[dict[str, Any]]
    mixed: dict[str, Any] | None


def records_of(done: Any, traced: Any, earlier: Bundle | None) -> Records:
    """Of a run that calibrated, or what `earlier` says with what is new."""
    from iq_export.found import Unnamed
    from iq_export.plan import fusion_record, lifecycle_records, mixed_record, plan_record
    from iq_export.run.generate import Tokenizer
    from iq_export.saved_decisions import record as decisions_record

    if earlier is None:
        text = (traced.assets / "tokenizer.json").is_file()
        tokenizer = Tokenizer(traced.assets) if text else Unnamed()
        lifecycles = lifecycle_records(done, tokenizer)
        return Records(plan_record(done, tokenizer), lifecycles, mixed_record(done))
    new = {
        "fusion": fusion_record(done.quantized),
        "warnings": done.warnings,
        "decisions": decisions_record(done.chosen),
    }
    lifecycles = earlier.manifest.graph.lifecycles
    return Records({**earlier.plan(), **new}, lifecycles, earlier.manifest.mixed)


def fill(folder: Path, traced: Any, made: dict[str, str], done: Any, records: Records) -> None:
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
    check_files(traced.folder, made)
    save_arrays(done.chosen, folder / TEMPLATES_NAME)
    text = json.dumps(json_safe(records.plan), indent=1, ensure_ascii=False) + "\n"
    (folder / "plan.json").write_text(text, encoding="utf-8")


def make_manifest(
    folder: Path,
    options: CompileOptions,
    checked: Checked,
    traced: Any,
    done: Any,
    records: Records,
    built: Built,
    timings: dict[str, float],
) -> Manifest:
    """The manifest of what is in `folder`, whose report is written there."""
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
        versions=versions(),
        options={**record(options), "calibration_sha256": checked.calibration_sha256},
        graphs=[graph],
        targets=[target.name for target in checked.targets],
        check=done.check.to_dict(),
        mixed=records.mixed,
        timings=timings,
        peak_rss_bytes=peak_rss(),
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


def versions() -> dict[str, str]:
    """Of Python and of the packages that a graph depends on."""
    packages = ("iq-export", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "numpy")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_rss() -> int:
    """High-water mark of this process or its largest child, bytes (Linux counts in KiB)."""
    unit = 1 if sys.platform == "darwin" else 1024
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return unit * max(resource.getrusage(who).ru_maxrss for who in whose)
