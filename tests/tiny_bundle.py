"""The files that every bundle has, for tests that make a small one."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from iq_export.bundle.manifest import FileRecord, GraphInfo, Manifest

REQUIRED = ("model.onnx", "model.onnx.data", "tokenizer.json")
ABSENT = FileRecord(1, "0" * 64)  # of a file that nobody opens


def fill(folder: Path) -> Path:
    """Put what is missing of the files that a manifest must name into `folder`."""
    for name in REQUIRED:
        if not (folder / name).exists():
            (folder / name).write_bytes(b"")
    return folder


def records(**more: FileRecord) -> dict[str, FileRecord]:
    """A manifest's `files` without their files, so that its text can be read."""
    return {**dict.fromkeys(REQUIRED, ABSENT), **more}


def manifest(**values: Any) -> Manifest:
    """A manifest with one graph: what belongs to that is put there."""
    of_graph = {f.name for f in fields(GraphInfo)} - {"name"}
    graph = GraphInfo(**{key: value for key, value in values.items() if key in of_graph})
    rest = {key: value for key, value in values.items() if key not in of_graph}
    return Manifest(**rest, graphs=[graph])


def engine_record(target: str = "rtx-ampere", **changes: Any) -> dict[str, Any]:
    """An engine of a manifest; the plan must be among its files as `engines/<target>.plan`."""
    sizes = {"min": 1, "opt": 1, "max": 4}
    values = {
        "target": target, "plan": f"{target}.plan", "bytes": 1, "sha256": "0" * 64,
        "flavour": "tensorrt_rtx", "tensorrt_version": "1.7.1.116", "compute_capabilities": [86],
        "form": "body", "plugin_embedded": False, "version_compatible": False,
        "strip_weights": False,
        "profile": {"batch": sizes, "seq": sizes, "past": {**sizes, "min": 0}},
    }  # fmt: skip
    return {**values, **changes}
