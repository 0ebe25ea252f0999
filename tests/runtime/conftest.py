"""libiq_runtime compiled once per session, and a small bundle as the compiler writes it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from iq_export.bundle.manifest import TensorInfo, record_files
from iq_export.engine.build import EngineReport
from iq_export.engine.plugin import find_cmake
from tests.tiny_bundle import manifest

SOURCES = Path(__file__).resolve().parents[2] / "plugins" / "runtime"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"
SANITIZED = {
    "CMAKE_BUILD_TYPE": "Debug",
    "CMAKE_CXX_FLAGS": SANITIZERS,
    "CMAKE_CXX_FLAGS_DEBUG": "",
}
# A fault that a sanitizer finds ends the process with a code that nothing else uses.
FAULT = 99
ENVIRONMENT = {
    **os.environ,
    "ASAN_OPTIONS": f"exitcode={FAULT}",
    "UBSAN_OPTIONS": f"exitcode={FAULT}:print_stacktrace=1",
}
VOCAB, HEADS, SIZE = 97, 2, 4  # of the fake engine, plugins/runtime/test/fake/machine.cpp
PAST_MAX, SEQ_MAX = 300, 5


@dataclass(frozen=True)
class Done:
    """How a command ended: its code, what it printed, and its error message."""

    code: int
    out: str
    error: str


def execute(command: Sequence[object], **variables: str) -> Done:
    """Run `command`; fails the test if it was ended by a signal or a sanitizer spoke up."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, errors="replace",
        check=False, timeout=120, env={**ENVIRONMENT, **variables},
    )  # fmt: skip
    assert 0 <= done.returncode < FAULT, f"{done.returncode}: {done.stderr}"
    return Done(done.returncode, done.stdout, done.stderr)


def compile_(sources: Path, folder: Path, definitions: dict[str, str], *targets: str) -> Path:
    """Configure `sources` in `folder` and build `targets`, all by default."""
    commands = [[find_cmake(), "-S", sources, "-B", folder]]
    commands[0] += [f"-D{name}={value}" for name, value in definitions.items()]
    commands[0] += ["-G", "Ninja"] if shutil.which("ninja") else []
    commands += [[find_cmake(), "--build", folder, "--parallel", os.cpu_count() or 1]]
    commands[1] += [word for target in targets for word in ("--target", target)]
    for command in commands:
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder


@pytest.fixture(scope="session")
def tools() -> None:
    """Skips, with the reason, where the library cannot be compiled."""
    compiler = os.environ.get("CXX", "c++")
    lacking = "" if shutil.which(compiler) else f"a C++ compiler ({compiler})"
    lacking = lacking or ("" if find_cmake() else "cmake")
    for header in ("nlohmann/json.hpp", "openssl/evp.h"):
        if not lacking:
            done = subprocess.run(
                [compiler, "-E", "-x", "c++", "-"], input=f"#include <{header}>\n",
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            lacking = "" if done.returncode == 0 else header
    if lacking:
        pytest.skip(f"libiq_runtime cannot be compiled: {lacking} is missing")


@pytest.fixture(scope="session")
def built(tools: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder of the library without CUDA, its command and its tests, with sanitizers."""
    definitions = {**SANITIZED, "IQ_SESSION": "OFF", "IQ_TESTS": "ON", "IQ_WERROR": "ON"}
    return compile_(SOURCES, tmp_path_factory.mktemp("runtime"), definitions)


@pytest.fixture(scope="session")
def arithmetic(tools: None, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """plugins/runtime/test/step_test.cpp, without sanitizers: Python has none."""
    definitions = {"IQ_SESSION": "OFF", "IQ_TESTS": "ON", "IQ_WERROR": "ON"}
    folder = compile_(SOURCES, tmp_path_factory.mktemp("step"), definitions, "iq_step_test")
    library = ctypes.CDLL(str(folder / "libiq_step_test.so"))
    for name, kind in (("choose", ctypes.c_int64), ("key", ctypes.c_uint32),
                       ("uniform", ctypes.c_double), ("window", ctypes.c_int64),
                       ("chunk", ctypes.c_int64)):  # fmt: skip
        getattr(library, f"iq_{name}").restype = kind
    return library


def engine(target: str, **changes: object) -> EngineReport:
    values: dict[str, object] = dict(
        target=target, plan=f"{target}.plan", bytes=0, sha256="", seconds=1.0, flavour="tensorrt",
        tensorrt_version="10.15.1.29", compute_capabilities=(87,), form="plugin", sink_nodes=3,
        plugin_layers=3, plugin_embedded=False, layers=9, opset=23, version_compatible=False,
        strip_weights=False, peak_rss_bytes=1, plugin_version="1",
        profile={
            "batch": {"min": 1, "opt": 1, "max": 3},
            "seq": {"min": 1, "opt": 4, "max": SEQ_MAX},
            "past": {"min": 0, "opt": 64, "max": PAST_MAX},
        },
    )  # fmt: skip
    return EngineReport(**{**values, **changes})  # type: ignore[arg-type]


ORIN = engine("orin")
RTX = engine(
    "rtx-ampere", flavour="tensorrt_rtx", tensorrt_version="1.7.1.116", compute_capabilities=(86,),
    form="body", plugin_layers=0, plugin_version="",
)  # fmt: skip


def tensors() -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Inputs and outputs with an int8 cache's sink index among them."""
    rows = ["batch", "seq"]
    half = "float16"
    inputs = [TensorInfo("input_ids", "int64", rows), TensorInfo("position_ids", "int64", rows)]
    inputs += [TensorInfo("attention_mask", "int64", ["batch", "total"])]
    outputs = [TensorInfo("logits", "float", [*rows, VOCAB])]
    for kind in ("key", "value"):
        shape = ["batch", HEADS, "past", SIZE]
        inputs.append(TensorInfo(f"past_key_values.0.{kind}", half, shape))
        outputs.append(TensorInfo(f"present.0.{kind}", half, ["batch", HEADS, "total", SIZE]))
    inputs.append(TensorInfo("past_sinks.0", "int32", ["batch", "past"]))
    outputs.append(TensorInfo("present_sinks.0", "int32", ["batch", "total"]))
    return inputs, outputs


MakeBundle = Callable[..., Path]


def write_bundle(folder: Path, *engines: EngineReport, **changes: object) -> Path:
    """A bundle in a new `folder`, with the manifest written by the compiler's own code."""
    contents = {
        "model.onnx": b"graph", "model.onnx.data": b"weights" * 9, "tokenizer.json": b'{"a": 1}',
        "config.json": b'{"eos_token_id": null}',
        "generation_config.json": b'{"eos_token_id": [5]}',
        "plan.json": b"{}", "plugins/libiq_plugins.so": b"\x7fELF library",
    }  # fmt: skip
    for e in engines:
        inside = b" with the lean runtime" if e.version_compatible else b""
        contents[f"engines/{e.plan}"] = b"plan of " + e.target.encode() + inside
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    files = record_files(folder)
    records = {}
    for report in engines:
        plan = files[f"engines/{report.plan}"]
        records[report.target] = {**report.to_json(), "bytes": plan.bytes, "sha256": plan.sha256}
    inputs, outputs = tensors()
    values: dict[str, object] = dict(
        name="tiny", recipe="w8a8kv8", dtype="fp16", opset=23, inputs=inputs, outputs=outputs,
        profile=ORIN.profile, targets=list(records), engines=records, files=files,
        source={"model": "tiny"}, timings={"trace": 1.5}, notes=["größer"],
    )  # fmt: skip
    manifest(**{**values, **changes}).write(folder)
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with an enterprise engine, its plugin beside the plan, and one for RTX."""
    return write_bundle(tmp_path / "bundle", ORIN, RTX)
