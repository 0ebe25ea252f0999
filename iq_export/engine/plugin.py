"""Compile the TensorRT plugin of the sink ops from `plugins/`.

It needs nvcc, CMake, a C++ compiler and TensorRT's headers. None of them is a dependency of this
package: where one is missing the engine is built from the ops' function bodies, and the reason is
told.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from iq_export import supervise
from iq_export.child import CLEAN_FOLDER, environment, find_program
from iq_export.errors import EngineError, UsageError

LIBRARY = "libiq_plugins.so"
HEADER = "NvInferRuntime.h"
HEADERS_VARIABLE = "TENSORRT_INCLUDE_DIR"
# Where tools/fetch_trt_headers.py puts them: a folder of the cache, and their path in the wheel.
HEADERS_CACHE = "tensorrt-headers"
HEADERS_MEMBERS = "kernel_lens/include/tensorrt"
MODES = ("auto", "on", "off")

# The API that the plugin keeps to; IPluginV3 itself exists since 10.0.
_OLDEST_HEADERS = (10, 3)
_KEPT_LINES = 6


@dataclass(frozen=True)
class PluginBuild:
    """A compiled plugin library, or the reason (one sentence) why there is none; `provide_plugin`
    says why there is one, too.

    `headers` is the TensorRT version of the headers, `architectures` those the kernels are
    compiled for (86 for sm_86); for the last one there is PTX as well.
    """

    path: Path | None = None
    reason: str = ""
    sha256: str = ""
    architectures: tuple[int, ...] = ()
    headers: str = ""
    seconds: float = 0.0

    def covering(self, architectures: Sequence[int]) -> PluginBuild:
        """This library if it has kernels for all of them, else the reason for function bodies."""
        lacking = set(architectures) - set(self.architectures)
        if self.path is None or not lacking:
            return self
        return PluginBuild(reason=_not_for(lacking))


def build_plugin(
    out_dir: Path,
    architectures: Sequence[int],
    *,
    whole: bool = False,
    headers: Path | None = None,
    warnings_are_errors: bool = False,
) -> PluginBuild:
    """Compile `libiq_plugins.so` into `out_dir`, whole or not at all.

    For those of `architectures` that nvcc knows (see `PluginBuild.covering`), or with `whole` for
    all or none. `headers` is the folder with TensorRT's headers; looked for if not given. Never
    raises for a missing or failing tool: see `PluginBuild.reason`.
    """
    started = time.perf_counter()
    include = headers or find_headers()
    reason = why_no_plugin(include)
    sources, nvcc = find_sources(), find_nvcc()
    if reason or sources is None or nvcc is None or include is None:
        return PluginBuild(reason=reason)
    known = nvcc_architectures(nvcc)
    lacking = set(architectures) - known if known else set()
    wanted = tuple(sorted(set(architectures) - lacking))
    if not wanted or (whole and lacking):
        return PluginBuild(reason=_not_for(lacking))
    with tempfile.TemporaryDirectory(prefix="iq-plugins-") as folder:
        options = {
            HEADERS_VARIABLE: str(include.absolute()),
            "IQ_WERROR": "ON" if warnings_are_errors else "OFF",
        }
        reason = cmake_build(sources, Path(folder), nvcc, wanted, "iq_plugins", options)
        if reason:
            return PluginBuild(reason=reason)
        library = _install(Path(folder) / LIBRARY, out_dir / LIBRARY)
    return PluginBuild(
        path=library,
        sha256=hashlib.sha256(library.read_bytes()).hexdigest(),
        architectures=wanted,
        headers=".".join(map(str, headers_version(include))),
        seconds=time.perf_counter() - started,
    )


def provide_plugin(
    mode: str, out_dir: Path, architectures: Sequence[int], sink_nodes: int
) -> PluginBuild:
    """The plugin as `--plugin auto|on|off` asks for it; none for a model without sink ops.

    In "auto" it may lack some of `architectures`: see `PluginBuild.covering`. Raises UsageError for
    an unknown mode, EngineError if it is "on" and cannot be compiled for all of them.
    """
    if mode not in MODES:
        raise UsageError(f"unknown plugin mode '{mode}': use {', '.join(MODES)}.")
    if mode == "off":
        return PluginBuild(reason="no plugin: it is switched off.")
    if not sink_nodes:
        return PluginBuild(reason="no plugin: the model has no sink ops.")
    build = build_plugin(out_dir, architectures, whole=mode == "on")
    if build.path is None:
        if mode == "on":
            raise EngineError(build.reason)
        return build
    why = "asked for" if mode == "on" else "nvcc, CMake and TensorRT's headers are here"
    names = _names(build.architectures)
    return replace(
        build, reason=f"plugin: {why}; compiled for {names} with headers {build.headers}."
    )


def cmake_build(
    sources: Path,
    folder: Path,
    nvcc: Path,
    architectures: Sequence[int],
    target: str,
    options: dict[str, str],
) -> str:
    """Configure `sources` in `folder` and build `target`; the reason why it failed, or ""."""
    *others, last = [str(sm) for sm in architectures]
    cmake = str(find_cmake() or "cmake")
    definitions = {
        "CMAKE_CUDA_COMPILER": str(nvcc),
        "CMAKE_CUDA_ARCHITECTURES": ";".join([*(f"{sm}-real" for sm in others), last]),
        **options,
    }
    configure = [cmake, "-S", str(sources), "-B", str(folder)]
    configure += [f"-D{name}={value}" for name, value in definitions.items()]
    if find_program("ninja"):
        configure += ["-G", "Ninja"]
    jobs = str(os.cpu_count() or 1)
    compile_ = [cmake, "--build", str(folder), "--target", target, "--parallel", jobs]
    for command in (configure, compile_):
        done = supervise.run(command, cwd=CLEAN_FOLDER, env=environment())
        if done.returncode != 0:
            return f"the plugin does not compile: {_first_errors(done.stdout + done.stderr)}"
    return ""


def find_headers() -> Path | None:
    """The folder with TensorRT's headers: $TENSORRT_INCLUDE_DIR, the SDK, or the download cache."""
    return next((folder for folder in _header_folders() if (folder / HEADER).is_file()), None)


def headers_version(include: Path) -> tuple[int, ...]:
    """(10, 14, 1) from NvInferVersion.h; () where it cannot be read.

    Since 10.11 the numbers stand in a macro of their own, TRT_MAJOR_ENTERPRISE, that
    NV_TENSORRT_MAJOR refers to.
    """
    try:
        text = (include / "NvInferVersion.h").read_text(errors="replace")
    except OSError:
        return ()
    numbers = []
    for part in ("MAJOR", "MINOR", "PATCH"):
        match = re.search(rf"#define (?:NV_TENSORRT_{part}|TRT_{part}_ENTERPRISE) (\d+)", text)
        if match is None:
            return ()
        numbers.append(int(match.group(1)))
    return tuple(numbers)


def headers_cache() -> Path:
    """Where tools/fetch_trt_headers.py puts the headers it downloads."""
    root = os.environ.get("IQ_EXPORT_CACHE")
    folder = Path(root).expanduser() if root else Path.home() / ".cache" / "iq_export"
    return folder / HEADERS_CACHE / HEADERS_MEMBERS


def find_nvcc() -> Path | None:
    """The CUDA compiler: $CUDACXX, on PATH, below $CUDA_HOME, or where it is usually installed."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [
        os.environ.get("CUDACXX"),
        "nvcc",
        *(f"{root}/bin/nvcc" for root in roots if root),
    ]
    found = (find_program(candidate) for candidate in candidates if candidate)
    return next(filter(None, found), None)


def nvcc_architectures(nvcc: Path) -> set[int]:
    """What `nvcc` compiles for, 86 for sm_86; none where it does not say."""
    done = supervise.run([str(nvcc), "--list-gpu-arch"], cwd=CLEAN_FOLDER, env=environment())
    return {int(sm) for sm in re.findall(r"compute_(\d+)\b", done.stdout)}


def find_cmake() -> Path | None:
    """CMake on PATH, or from PyPI beside this Python, whose environment may not be activated."""
    return find_program("cmake") or find_program(str(Path(sys.executable).parent / "cmake"))


def find_sources() -> Path | None:
    """The plugin's sources: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).resolve().parents[1]
    folders = (package.parent / "plugins", package / "_plugins")
    return next((folder for folder in folders if (folder / "CMakeLists.txt").is_file()), None)


def _names(architectures: Iterable[int]) -> str:
    return ", ".join(f"sm_{sm}" for sm in sorted(architectures))


def _not_for(architectures: Iterable[int]) -> str:
    return f"no plugin: this nvcc does not compile for {_names(architectures)}."


def why_no_plugin(include: Path | None) -> str:
    """What the plugin cannot be compiled for want of here; "" if nothing is lacking. `include`:
    the folder with TensorRT's headers, as `find_headers` finds it."""
    if platform.system() != "Linux":
        return "no plugin: it is compiled on Linux only."
    if find_sources() is None:
        return "no plugin: its sources are not installed."
    if find_nvcc() is None:
        return "no plugin: nvcc was not found, set CUDACXX or CUDA_HOME or put it on PATH."
    if find_cmake() is None:
        return "no plugin: cmake was not found, install it with: pip install cmake."
    if include is None:
        return (
            f"no plugin: TensorRT's headers ({HEADER}) were not found, set {HEADERS_VARIABLE} to "
            f"their folder, or run tools/fetch_trt_headers.py of a checkout."
        )
    version = headers_version(include)
    if version and version < _OLDEST_HEADERS:
        have, need = (".".join(map(str, v)) for v in (version, _OLDEST_HEADERS))
        return f"no plugin: the TensorRT headers in '{include}' are {have}, {need} is needed."
    return ""


def _header_folders() -> Iterator[Path]:
    if os.environ.get(HEADERS_VARIABLE):
        yield Path(os.environ[HEADERS_VARIABLE])
        return  # a folder given by name is not replaced by another
    for name in ("TensorRT_ROOT", "TENSORRT_ROOT", "TRT_ROOT"):
        if os.environ.get(name):
            yield Path(os.environ[name]) / "include"
    yield Path(f"/usr/include/{platform.machine()}-linux-gnu")
    for folder in ("/usr/include", "/usr/local/tensorrt/include", "/opt/tensorrt/include"):
        yield Path(folder)
    wheels = Path(sysconfig.get_path("purelib"))
    yield from sorted([*wheels.glob("tensorrt*/include"), *wheels.glob("nvidia/*/include")])
    with suppress(RuntimeError):  # no home
        yield headers_cache()


def _first_errors(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|fatal|Unsupported gpu", line, re.I)]
    return " | ".join((errors or lines[-_KEPT_LINES:])[:_KEPT_LINES])


def _install(built: Path, final: Path) -> Path:
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        shutil.copyfile(built, partial)
        partial.chmod(0o755)
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)
    return final
