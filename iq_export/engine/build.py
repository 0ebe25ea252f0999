"""Build a TensorRT plan from `model.onnx`.

TensorRT may abort the process and keeps memory once it has used it, so every build runs in a child
process (`python -m iq_export.engine.worker`): an abort becomes an EngineError, and the memory goes
back to the system.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

from iq_export.child import CLEAN_FOLDER, environment
from iq_export.engine.onnx_header import read_header
from iq_export.engine.profile import Profile, Range
from iq_export.engine.targets import Target, check_opset
from iq_export.engine.trt import LABELS, check_levers, why_not_here
from iq_export.errors import EngineError, UsageError
from iq_export.files import check_size
from iq_export.progress import Progress

__all__ = ["EngineReport", "Profile", "Range", "build_engine"]

VERBOSITIES = ("layer_names_only", "detailed", "none")
LARGEST_TIMING_CACHE = 1 << 30  # far larger than any that TensorRT writes
_SIGKILL_HINT = " The system ended it, most likely for want of memory."
_TAIL_LINES = 12
_PLUGIN_PREFIX = "iq plugins: "  # as in plugins/src/log.cpp


@dataclass(frozen=True)
class BuildRequest:
    """What the child process is asked to build; all paths absolute. Messages name `source`, the
    graph that `model` was made from."""

    source: str
    model: str
    plan: str
    target: str
    flavour: str
    compute_capabilities: tuple[int, ...]
    profile: dict[str, dict[str, int]]
    opset: int
    sink_nodes: int
    plugin_nodes: int  # what the plugin has to take; 0 without it
    plugin: str | None
    timing_cache: str | None
    version_compatible: bool
    strip_weights: bool
    profiling_verbosity: str

    @classmethod
    def from_json(cls, text: str) -> BuildRequest:
        data = json.loads(text)
        data["compute_capabilities"] = tuple(data["compute_capabilities"])
        return cls(**data)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class EngineReport:
    """One plan and how it was made: an entry of the manifest.

    `form` says how the sink ops went in: "plugin" (as many PLUGIN_V3 layers as sink and fused
    nodes), "body" (standard ops, no PLUGIN_V3 layer) or "none" (the model has no sink ops), and
    `form_reason` why. In the plugin form `fused` counts the fused ops by name, `absorbed` the sink
    ops that went into them, and `unfused` says why other quantizers were left. `layers` counts the
    layers of the parsed network, before TensorRT fuses them. With `plugin_embedded` the plan
    carries the plugin library, and a runtime must allow host code; else it must load the library
    first; `plugin_version` is that of its layers. `peak_rss_bytes` is the child's.
    """

    target: str
    plan: str
    bytes: int
    sha256: str
    seconds: float
    flavour: str
    tensorrt_version: str
    compute_capabilities: tuple[int, ...]
    form: str
    sink_nodes: int
    plugin_layers: int
    plugin_embedded: bool
    layers: int
    opset: int
    profile: dict[str, dict[str, int]]
    version_compatible: bool
    strip_weights: bool
    peak_rss_bytes: int
    warnings: tuple[str, ...] = ()
    plugin_version: str = ""
    form_reason: str = ""
    fused: dict[str, int] = field(default_factory=dict)
    absorbed: int = 0
    unfused: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineReport:
        """The report that `to_json` wrote; unknown keys of a newer version are ignored."""
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        for key in ("compute_capabilities", "warnings"):
            values[key] = tuple(values.get(key, ()))
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        data = asdict(self)
        for key in ("compute_capabilities", "warnings"):
            data[key] = list(data[key])
        return data


def build_engine(
    onnx_path: Path,
    plan_path: Path,
    target: Target,
    profile: Profile,
    *,
    plugin: Path | None = None,
    form_reason: str = "",
    sink_nodes: int | None = None,
    progress: Progress | None = None,
    timing_cache: Path | None = None,
    version_compatible: bool = False,
    strip_weights: bool = False,
    profiling_verbosity: str = "detailed",
) -> EngineReport:
    """Build `onnx_path` for `target` and write the plan, whole or not at all.

    With `plugin` the sink ops become its layers, fused with what stands around them in a copy of
    the graph (`passes/fuse.py`), and the library is embedded in the plan where the flavour can do
    that; without, their function bodies are built. Either way the form is proven by counting
    PLUGIN_V3 layers; `form_reason` goes into the report. `sink_nodes` is counted in the graph if
    not given. Axes of the inputs must be named batch, seq, past or total. Ctrl-C stops the child as
    well.

    Raises UsageError for an option that is unknown or that the target lacks, as
    `check_timing_cache` does, and EngineError if
    TensorRT is missing, too old for the graph's opset, refuses the graph or the target, dies, or
    builds the other form.
    """
    if profiling_verbosity not in VERBOSITIES:
        raise UsageError(
            f"unknown profiling verbosity '{profiling_verbosity}': use {', '.join(VERBOSITIES)}."
        )
    if timing_cache is not None:
        check_timing_cache(timing_cache)
    check_levers(target, version_compatible=version_compatible, strip_weights=strip_weights)
    header = read_header(onnx_path)
    check_opset(target, header.opset)
    reason = why_not_here(target)
    if reason is not None:
        raise EngineError(reason)
    if plugin is not None and not plugin.is_file():
        raise EngineError(f"the plugin library '{plugin}' does not exist.")
    if sink_nodes is None:
        sink_nodes = header.sink_nodes
    plan_path.parent.mkdir(parents=True, exist_ok=True)
    partial = plan_path.with_name(f".{plan_path.name}.{os.getpid()}.partial")
    if not sink_nodes:
        plugin = None
    request = BuildRequest(
        source=str(onnx_path.resolve()),
        model=str(onnx_path.resolve()),
        plan=str(partial.resolve()),
        target=target.name,
        flavour=target.flavour,
        compute_capabilities=target.compute_capabilities,
        profile=profile.to_json(),
        opset=header.opset,
        sink_nodes=sink_nodes,
        plugin_nodes=0,
        plugin=str(plugin.resolve()) if plugin else None,
        timing_cache=str(timing_cache.resolve()) if timing_cache else None,
        version_compatible=version_compatible,
        strip_weights=strip_weights,
        profiling_verbosity=profiling_verbosity,
    )
    progress = progress or Progress(quiet=True)
    try:
        if plugin is None:
            report = _run_worker(request, progress)
        else:
            report = _build_fused(onnx_path, request, progress)
        partial.replace(plan_path)
    finally:
        partial.unlink(missing_ok=True)
    return replace(report, plan=plan_path.name, form_reason=form_reason)


def check_timing_cache(path: Path) -> None:
    """Raise UsageError if there is something at `path` that is no file, or far too large."""
    if path.exists() and not path.is_file():
        # It is replaced after a build: a device would be gone for the whole machine.
        raise UsageError(f"--timingCacheFile {path} is not a file: give a file or a new name")
    if path.exists():
        check_size(path, LARGEST_TIMING_CACHE, UsageError)


def _build_fused(onnx_path: Path, request: BuildRequest, progress: Progress) -> EngineReport:
    """Build from a fused copy of the graph, which lies beside it and shares its weights.

    The copy has no function bodies, so that TensorRT cannot take one where the plugin is meant;
    before 10.7 it would take it in any case (read in its changelog).
    """
    from iq_export.graph import io
    from iq_export.passes.fuse import fuse
    from iq_export.sinks.ops import DOMAIN

    model = io.load(onnx_path)
    fusion = fuse(model)
    model.functions.clear()
    nodes = sum(node.domain == DOMAIN for node in model.graph)
    handle, name = tempfile.mkstemp(
        dir=onnx_path.parent, prefix=f".{onnx_path.stem}.", suffix=".fused.onnx"
    )
    copy = Path(name).resolve()
    try:
        os.close(handle)
        io.save_skeleton(model, copy)
        report = _run_worker(replace(request, model=str(copy), plugin_nodes=nodes), progress)
    finally:
        copy.unlink(missing_ok=True)
    return replace(report, fused=dict(fusion.ops), absorbed=fusion.absorbed, unfused=fusion.reasons)


def _run_worker(request: BuildRequest, progress: Progress) -> EngineReport:
    """Run the build in a child process and return what it reports."""
    phase = "starting"
    result: EngineReport | None = None
    with tempfile.TemporaryFile(mode="w+", errors="replace") as stderr, _worker(stderr) as process:
        assert process.stdin is not None and process.stdout is not None
        # A child that is dead already is explained below, by its exit code.
        with suppress(BrokenPipeError):
            process.stdin.write(request.to_json())
            process.stdin.close()
        for event in _events(process.stdout):
            kind = event["event"]
            if kind == "error":
                process.wait()
                raise _error(event, _plugin_words(stderr))
            if kind == "phase":
                phase = event["text"]
            elif kind == "progress":
                progress.update(event["done"], event["total"])
            elif kind == "report":
                result = EngineReport.from_json(event["report"])
        code = process.wait()
        if result is not None and code == 0:
            return result
        raise EngineError(_post_mortem(request, phase, code, _lines(stderr)))


@contextmanager
def _worker(stderr: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """The child process, with the sources of this package first on its path; never left behind."""
    process = subprocess.Popen(
        [sys.executable, "-m", "iq_export.engine.worker", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        errors="replace",
        cwd=CLEAN_FOLDER,
        env=environment(package=True),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None and not stream.closed:
                stream.close()


def _events(lines: IO[str]) -> Iterator[dict[str, Any]]:
    """The child's events, one JSON object a line; other output of TensorRT's is passed over."""
    for line in lines:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event


def _error(event: dict[str, Any], plugin_words: str) -> Exception:
    """The child's exception: a system error (a full disk) keeps its number for the caller."""
    if event.get("errno"):
        return OSError(event["errno"], event["text"])
    return EngineError(event["text"] + plugin_words)


def _lines(stderr: IO[str]) -> list[str]:
    stderr.seek(0)
    return stderr.read().strip().splitlines()


def _plugin_words(stderr: IO[str]) -> str:
    """What the plugin said: TensorRT gives it no logger at build time, and only reports a code."""
    words = [line.removeprefix(_PLUGIN_PREFIX) for line in _lines(stderr) if _PLUGIN_PREFIX in line]
    return f" The plugin says: {' | '.join(words[:_TAIL_LINES])}." if words else ""


def _post_mortem(request: BuildRequest, phase: str, code: int, stderr: list[str]) -> str:
    how, hint = f"ended with code {code}", ""
    if code < 0:
        known = {int(number): number.name for number in signal.Signals}
        name = known.get(-code, f"signal {-code}")
        how, hint = f"died of {name}", _SIGKILL_HINT if name == "SIGKILL" else ""
    tail = " | ".join(stderr[-_TAIL_LINES:])
    return (
        f"{LABELS[request.flavour]} {how} while {phase} the engine for '{request.target}'.{hint}"
        + (f" Its last words: {tail}" if tail else "")
    )
