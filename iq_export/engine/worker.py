"""The child process of `engine.build`: one build, then the end.

Reads a BuildRequest as JSON from stdin and writes events as JSON lines to stdout: `phase`,
`progress`, and at last `report` or `error`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iq_export.engine.build import LARGEST_TIMING_CACHE, BuildRequest, EngineReport
from iq_export.engine.profile import Profile
from iq_export.engine.targets import ENTERPRISE, RTX, check_tensorrt_opset
from iq_export.engine.trt import BuildLog, TensorRT, load
from iq_export.errors import EngineError, IqError
from iq_export.files import read_named
from iq_export.supervise import end_with_parent

_PLUGIN_NAMESPACE = "iq"
_PLUGIN_VERSION = "1"  # the nodes carry it as well, see sinks/ops.py


def main() -> int:
    """Serve the one request on stdin; 0 if the plan was written, 1 with an `error` event if not.

    The one argument is the parent's process id.
    """
    end_with_parent(int(sys.argv[1]))
    request = BuildRequest.from_json(sys.stdin.read())
    try:
        report = build(request)
    except IqError as error:
        _emit("error", text=str(error))
        return 1
    except OSError as error:
        _emit("error", text=error.strerror or str(error), errno=error.errno)
        return 1
    _emit("report", report=report.to_json())
    return 0


def build(request: BuildRequest) -> EngineReport:
    """Parse, prove the form, build, and write the plan; the parent renames the finished file."""
    started = time.perf_counter()
    _emit("phase", text="loading")
    tensorrt = load(request.flavour)
    if request.flavour == ENTERPRISE:
        check_tensorrt_opset(tensorrt.version, request.opset, "this machine")
    log = BuildLog()
    logger = tensorrt.logger(log)
    builder = tensorrt.module.Builder(logger)
    if request.plugin:
        with _explained(tensorrt, log, f"load the plugin for '{request.target}'"):
            tensorrt.load_plugin(
                builder.get_plugin_registry(), Path(request.plugin), _PLUGIN_NAMESPACE
            )
    _emit("phase", text="parsing")
    network = builder.create_network(tensorrt.network_flags())
    _parse(tensorrt, network, logger, request, log)
    plugin_layers = _count_plugins(tensorrt, network)
    form = prove_form(request.sink_nodes, plugin_layers, request.plugin_nodes)
    config = _configure(tensorrt, builder, network, request)
    _emit("phase", text="building")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(
            f"{tensorrt.label} cannot build the engine for '{request.target}': {log.summary()}."
        )
    size, digest = _write(Path(request.plan), plan)
    _save_timing_cache(config, request)
    return EngineReport(
        target=request.target,
        plan=request.plan,
        bytes=size,
        sha256=digest,
        seconds=time.perf_counter() - started,
        flavour=request.flavour,
        tensorrt_version=tensorrt.module.__version__,
        compute_capabilities=request.compute_capabilities,
        form=form,
        sink_nodes=request.sink_nodes,
        plugin_layers=plugin_layers,
        plugin_embedded=_embeds_plugin(tensorrt, request),
        layers=network.num_layers,
        opset=request.opset,
        profile=request.profile,
        version_compatible=request.version_compatible,
        strip_weights=request.strip_weights,
        peak_rss_bytes=_peak_rss_bytes(),
        warnings=tuple(log.warnings),
        plugin_version=_PLUGIN_VERSION if form == "plugin" else "",
    )


def prove_form(sink_nodes: int, plugin_layers: int, plugin_nodes: int) -> str:
    """ "plugin", "body" or "none"; EngineError if the layers do not match what was asked for.

    `plugin_nodes` are the sink and fused nodes that the plugin is to take. TensorRT takes a
    function body silently where a plugin was meant (a node without `plugin_namespace`, a version
    mismatch), so the count of layers is the only proof.
    """
    if plugin_layers != plugin_nodes:
        raise EngineError(
            f"TensorRT made {plugin_layers} plugin layers, but {plugin_nodes} sink and fused nodes "
            f"were meant to become one each: the nodes' plugin_namespace and plugin_version do not "
            f"match the plugin library."
        )
    if sink_nodes == 0:
        return "none"
    return "plugin" if plugin_nodes else "body"


def _embeds_plugin(tensorrt: TensorRT, request: BuildRequest) -> bool:
    """Enterprise TensorRT carries plugins in version compatible plans only (read in NvInfer.h)."""
    return request.plugin is not None and (tensorrt.flavour == RTX or request.version_compatible)


def _parse(
    tensorrt: TensorRT, network: Any, logger: Any, request: BuildRequest, log: BuildLog
) -> None:
    parser = tensorrt.module.OnnxParser(network, logger)
    # By path, so that external data is found next to the model and never copied into Python.
    if parser.parse_from_file(request.model):
        return
    errors = [_describe(parser.get_error(i)) for i in range(parser.num_errors)]
    raise EngineError(
        f"{tensorrt.label} cannot parse '{request.source}': {' | '.join(errors) or log.summary()}."
    )


def _describe(error: Any) -> str:
    """`node 'layers.3/mlp/down_proj' (MatMul): why` from a ParserError."""
    text = error.desc().strip().rstrip(".")
    name = error.node_name() if hasattr(error, "node_name") else ""
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    return f"node '{name}' ({operator}): {text}" if name or operator else text


def _count_plugins(tensorrt: TensorRT, network: Any) -> int:
    kind = tensorrt.module.LayerType.PLUGIN_V3
    return sum(network.get_layer(i).type == kind for i in range(network.num_layers))


def _configure(tensorrt: TensorRT, builder: Any, network: Any, request: BuildRequest) -> Any:
    trt = tensorrt.module
    config = builder.create_builder_config()
    tensorrt.set_compute_capabilities(config, request.compute_capabilities)
    config.profiling_verbosity = getattr(
        trt.ProfilingVerbosity, request.profiling_verbosity.upper()
    )
    if request.version_compatible:
        tensorrt.set_flag(config, "VERSION_COMPATIBLE")
    if request.strip_weights:
        tensorrt.set_flag(config, "STRIP_PLAN")
    if _embeds_plugin(tensorrt, request):
        config.plugins_to_serialize = [request.plugin]
    if request.timing_cache:
        _load_timing_cache(config, Path(request.timing_cache))
    monitor = tensorrt.progress_monitor(
        lambda done, total: _emit("progress", done=done, total=total)
    )
    if monitor is not None:
        config.progress_monitor = monitor
    profile = builder.create_optimization_profile()
    sizes = Profile.from_json(request.profile)
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tensor.shape
        # A missing name stays "": Profile.shapes then says which input has an unknown axis.
        dims = [
            size if size >= 0 else tensor.get_dimension_name(axis) or ""
            for axis, size in enumerate(shape)
        ]
        profile.set_shape(tensor.name, *sizes.shapes(tensor.name, dims))
    config.add_optimization_profile(profile)
    return config


def _load_timing_cache(config: Any, path: Path) -> None:
    """Start from the timings in `path` if there are any; a foreign file is no reason to fail."""
    data = read_named(path, LARGEST_TIMING_CACHE, EngineError) if path.exists() else b""
    cache = config.create_timing_cache(data)
    if cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=False)


def _save_timing_cache(config: Any, request: BuildRequest) -> None:
    if not request.timing_cache:
        return
    cache = config.get_timing_cache()
    if cache is not None:
        path = Path(request.timing_cache)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        _write(fresh, cache.serialize())
        fresh.replace(path)  # two builds at once must not mix their timings


def _write(path: Path, plan: Any) -> tuple[int, str]:
    """Write TensorRT's buffer without a copy; its size in bytes and its sha256."""
    view = memoryview(plan)
    path.write_bytes(view)
    return view.nbytes, hashlib.sha256(view).hexdigest()


def _peak_rss_bytes() -> int:
    """This process's peak resident memory; 0 where the system does not say (Windows)."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent had before the exec
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def _explained(tensorrt: TensorRT, log: BuildLog, what: str) -> Iterator[None]:
    """Add TensorRT's own words to an EngineError."""
    try:
        yield
    except EngineError as error:
        raise EngineError(f"{tensorrt.label} cannot {what}: {error} {log.summary()}.") from error


def _emit(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
