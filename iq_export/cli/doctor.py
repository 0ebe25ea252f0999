"""`iq-export doctor`: what this machine can do, and what is missing for the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from typing import Any

from iq_export.child import find_program
from iq_export.cli import options
from iq_export.cli.inspect import columns
from iq_export.memory import memory_bytes

_OK, _MISSING = "ok", "missing"


@dataclass(frozen=True)
class Check:
    """One line: `state` is ok or missing, `need` says which command needs it."""

    name: str
    state: str
    found: str
    need: str


def add_parser(subparsers: Any) -> None:
    """Define the subcommand."""
    subparsers.add_parser(
        "doctor", help="what is installed here, what is missing, and which command needs it"
    )


def run(args: argparse.Namespace) -> int:
    """Print the checks. Missing parts are no error: a device needs no torch."""
    checks = all_checks()
    if args.json:
        options.print_json([asdict(check) for check in checks])
    else:
        rows = [(c.state, c.name, c.found, c.need) for c in checks]
        options.say("\n".join(columns([("", "what", "found", "needed for"), *rows])))
    return 0


def all_checks() -> list[Check]:
    """Every check, cheapest first; none imports torch or TensorRT."""
    return [*_machine(), *_packages(), *_tensorrt(), *_tools()]


def _machine() -> list[Check]:
    checks = [Check("Python", _OK, platform.python_version(), "everything (3.10 or newer)")]
    checks.append(Check("CPU cores", _OK, str(os.cpu_count()), "calibration, evaluation"))
    memory = memory_bytes()
    if memory is not None:
        checks.append(Check("memory", _OK, options.size(memory), "compile (SmolLM2: 5 GB)"))
    free = options.size(shutil.disk_usage(".").free)
    checks.append(Check("free disk here", _OK, free, "compile (about 3.5 x the fp32 weights)"))
    return checks


def _packages() -> list[Check]:
    wanted = (
        (("numpy",), "everything"),
        (("onnxruntime", "onnxruntime-gpu"), "eval, run, verify, compile (1.27 or newer)"),
        (("tokenizers",), "eval, run, compile"),
        (("jinja2",), "run"),
        (("onnx",), "build, verify, compile"),
        (("onnx-ir",), "build with the plugin, compile"),
        (("torch",), "compile: pip install 'iq-export[compile]'"),
        (("transformers",), "compile: pip install 'iq-export[compile]'"),
        (("gguf",), "compile of GGUF files"),
    )
    return [_package(names, need) for names, need in wanted]


def _package(names: tuple[str, ...], need: str) -> Check:
    for name in names:
        try:
            return Check(name, _OK, importlib.metadata.version(name), need)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Check(names[0], _MISSING, "-", need)


def _tensorrt() -> list[Check]:
    from iq_export.engine import trt
    from iq_export.engine.targets import TARGETS

    installed = trt.available()
    need = "build, compile --target"
    checks = []
    for flavour, label in trt.LABELS.items():
        if flavour not in installed:
            checks.append(Check(label, _MISSING, "-", f"{need}: {trt.install_hint(flavour)}"))
            continue
        checks.append(Check(label, _OK, trt.installed_version(flavour) or "found", need))
    sm = trt.device_compute_capability()
    found = f"sm_{sm}" if sm else "none"
    use = "running engines; building for Jetson and data-centre targets"
    checks.append(Check("NVIDIA GPU", _OK if sm else _MISSING, found, use))
    buildable = [t.name for t in TARGETS.values() if trt.why_not_here(t) is None]
    found = ", ".join(buildable) or "none"
    checks.append(Check("engines for", _OK if buildable else _MISSING, found, need))
    return checks


def _tools() -> list[Check]:
    """What compiling the TensorRT plugin takes."""
    from iq_export.engine import plugin

    tools = (
        ("C++ compiler", find_program("c++")),
        ("CMake", plugin.find_cmake()),
        ("nvcc", plugin.find_nvcc()),
        ("TensorRT headers", plugin.find_headers()),
    )
    need = "TensorRT plugin (--plugin on)"
    return [
        Check(name, _OK if found else _MISSING, str(found) if found else "-", need)
        for name, found in tools
    ]
