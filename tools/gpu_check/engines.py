"""Plans on the device: built, deserialised, run with PyTorch's memory, compared and looked into.

    python -m tools.gpu_check.engines build|check|latency TASK.json

Each call is a process of its own, since TensorRT may end it; it prints one JSON line at the end.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iq_export.checksum import sha256_file
from iq_export.engine.build import BuildRequest
from iq_export.engine.targets import RTX
from iq_export.engine.trt import BuildLog, load
from iq_export.engine.worker import build as build_plan
from iq_export.errors import EngineError, IqError
from tools.gpu_check.statistics import distance, paired_ratio, spread

_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "INT32": "int32",
    "INT64": "int64", "BOOL": "bool",
}  # fmt: skip
# Kernels of the GPU whose names say that they multiply int8 codes.
_INT8_KERNEL = re.compile(r"i8i8|imma|_s8|s8_|int8|i8816|i16832|i32864", re.I)
_KEPT_KERNELS = 60
_ROUNDS, _WARM_UP = 40, 8
_DEVICE = "cuda"


class Engine:
    """A deserialised plan and its context. Raises EngineError with TensorRT's own words."""

    def __init__(self, plan: Path) -> None:
        tensorrt = load(RTX)
        self.trt = tensorrt.module
        self._log = BuildLog()
        self._logger = tensorrt.logger(self._log)
        self._runtime = self.trt.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = True  # the plugin is within
        self.engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self.engine is None:
            raise EngineError(f"{tensorrt.label} does not deserialise it: {self._log.summary()}")
        self.context = self._context()
        if self.context is None:
            raise EngineError(f"{tensorrt.label} gives no context: {self._log.summary()}")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        is_input = self.trt.TensorIOMode.INPUT
        self.inputs = [n for n in names if self.engine.get_tensor_mode(n) == is_input]
        self.outputs = [n for n in names if n not in self.inputs]

    def _context(self) -> Any:
        """Kernels are compiled for new shapes at once: TensorRT for RTX uses others meanwhile."""
        strategies = getattr(self.trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is None:
            return self.engine.create_execution_context()
        config = self.engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return self.engine.create_execution_context(config)

    def why_not(self, batch: int, seq: int, past: int) -> str:
        """Which input is outside of the plan's profile, or ""."""
        for name in self.inputs:
            low, _, high = self.engine.get_tensor_profile_shape(name, 0)
            shape = self.shape(name, batch, seq, past)
            if any(not a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
                return f"{name} {list(shape)} is outside of the plan's {list(low)} to {list(high)}"
        return ""

    def shape(self, name: str, batch: int, seq: int, past: int) -> tuple[int, ...]:
        """Of an input, by its name: the tensors of a causal LM with KV cache."""
        own = list(self.engine.get_tensor_shape(name))
        own[0] = batch
        if name.startswith("past_"):
            own[2 if len(own) > 2 else 1] = past
        else:
            own[1] = past + seq if name == "attention_mask" else seq
        return tuple(own)

    def bind(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Set every input and room for every output, which are returned. `feeds` must live on."""
        import torch

        for name, tensor in feeds.items():
            self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, _address(tensor))
        found = {}
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            found[name] = torch.empty(shape, dtype=self._dtype(name), device=_DEVICE)
            self.context.set_tensor_address(name, _address(found[name]))
        return found

    def feeds(self, ids: Any, past: dict[str, Any] | None, past_length: int) -> dict[str, Any]:
        """Inputs for token ids [batch, seq] behind `past` of that length, nothing padded."""
        import torch

        batch, seq = ids.shape
        positions = torch.arange(past_length, past_length + seq, device=_DEVICE)
        given = {
            "input_ids": ids,
            "attention_mask": torch.ones(batch, past_length + seq, device=_DEVICE),
            "position_ids": positions.expand(batch, seq),
            **(past or {}),
        }
        found = {}
        for name in self.inputs:
            shape = self.shape(name, batch, seq, past_length)
            value = given.get(name)
            if value is None:  # a cache without content
                value = torch.zeros(shape, device=_DEVICE)
            found[name] = value.to(self._dtype(name)).contiguous()
        return found

    def enqueue(self, stream: Any) -> None:
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise EngineError(f"it does not run: {self._log.summary()}")

    def run(self, ids: Any, past: dict[str, Any] | None, past_length: int) -> dict[str, Any]:
        """The outputs, once they are there."""
        import torch

        feeds = self.feeds(ids, past, past_length)
        found = self.bind(feeds)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        self.enqueue(stream)
        stream.synchronize()
        return found

    def layers(self) -> Any:
        """What TensorRT says of its layers for the shapes that were bound last."""
        inspector = self.engine.create_engine_inspector()
        inspector.execution_context = self.context
        text = inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
        return json.loads(text).get("Layers", [])

    def _dtype(self, name: str) -> Any:
        import torch

        return getattr(torch, _DTYPES[self.engine.get_tensor_dtype(name).name])


def _address(tensor: Any) -> int:
    """TensorRT wants an address for a tensor without elements, too."""
    import torch

    if tensor.numel():
        return int(tensor.data_ptr())
    if not hasattr(_address, "spare"):
        _address.spare = torch.zeros(256, device=_DEVICE)  # type: ignore[attr-defined]
    return int(_address.spare.data_ptr())  # type: ignore[attr-defined]


def present_as_past(outputs: dict[str, Any]) -> dict[str, Any]:
    """The cache of a step as inputs of the next one."""
    renamed = {}
    for name, tensor in outputs.items():
        if name.startswith("present."):
            renamed[name.replace("present.", "past_key_values.", 1)] = tensor
        elif name.startswith("present_"):
            renamed[name.replace("present_", "past_", 1)] = tensor
    return renamed


def build(task: dict[str, Any]) -> dict[str, Any]:
    """One plan on the device, aimed at `compute_capabilities` (none: the device itself)."""
    plan = Path(task["plan"])
    request = BuildRequest(
        source=task["graph"], model=task["graph"], plan=str(plan), target=task["target"],
        flavour=RTX, compute_capabilities=tuple(task["compute_capabilities"]),
        profile=task["profile"], opset=task["opset"], sink_nodes=task["sink_nodes"],
        plugin_nodes=task["plugin_nodes"], plugin=task["plugin"], timing_cache=None,
        version_compatible=False, strip_weights=False, profiling_verbosity="detailed",
    )  # fmt: skip
    report = build_plan(request)
    return {
        "sha256": report.sha256, "bytes": report.bytes, "seconds": report.seconds,
        "plugin_layers": report.plugin_layers, "warnings": list(report.warnings),
    }  # fmt: skip


def check(task: dict[str, Any]) -> dict[str, Any]:
    """A plan's logits beside ONNX Runtime's: a prefill, then tokens one by one through the cache;
    its layers, and the kernels that a prefill of 512 tokens launched."""
    import torch

    plan = Path(task["plan"])
    result: dict[str, Any] = {"sha256": sha256_file(plan)}
    engine = Engine(plan)
    if task["reference"]:
        stored = np.load(task["reference"])
        found = decode(engine, torch.from_numpy(stored["ids"]).to(_DEVICE), task["decoded"])
        result["finite"] = bool(np.isfinite(found).all())
        result["logits"] = distance(found, stored["logits"]) if result["finite"] else None
        if not result["finite"]:
            raise EngineError("its logits are not finite")
    if not engine.why_not(1, 512, 0):
        ids = torch.randint(100, 1000, (1, 512), device=_DEVICE)
        engine.run(ids, None, 0)
        result["products"] = _attempt(lambda: _layers(engine, task))
        result["kernels"] = _attempt(lambda: _kernels(engine, ids))
    return result


def _attempt(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an inspector or profiler says; its failure does not take the logits along."""
    try:
        return action()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def _layers(engine: Engine, task: dict[str, Any]) -> dict[str, Any]:
    layers = engine.layers()
    Path(task["layers"]).write_text(json.dumps(layers, indent=1), encoding="utf-8")
    return products(layers, task["linears"])


def decode(engine: Engine, ids: Any, decoded: int) -> np.ndarray:
    """Logits of the last `decoded` + 1 tokens of every row, as float32."""
    length = ids.shape[1]
    outputs = engine.run(ids[:, : length - decoded], None, 0)
    found = [outputs["logits"][:, -1:]]
    for at in range(length - decoded, length):
        outputs = engine.run(ids[:, at : at + 1], present_as_past(outputs), at)
        found.append(outputs["logits"])
    return np.concatenate([logits.float().cpu().numpy() for logits in found], axis=1)


def products(layers: Sequence[Any], linears: Sequence[str]) -> dict[str, Any]:
    """In which type the products `linears` run, by the layers that name them.

    A product is in int8 where a layer that names it reads an int8 tensor and is no quantizer.
    TensorRT may fuse and rename: what no layer names is counted apart, not guessed.
    """
    int8: set[str] = set()
    other: set[str] = set()
    for layer in layers:
        if not isinstance(layer, dict):
            continue
        kind = f"{layer.get('LayerType', '')}".lower()
        if "quantize" in kind or "constant" in kind:
            continue
        text = f"{layer.get('Name', '')} {layer.get('Metadata', '')}"
        formats = " ".join(
            f"{i.get('Format/Datatype', '')} {i.get('Format', '')} {i.get('Datatype', '')}"
            for i in layer.get("Inputs", [])
            if isinstance(i, dict)
        )
        named = [n for n in linears if re.search(rf"{re.escape(n)}(?![\w/.\-])", text)]
        (int8 if "int8" in formats.lower() else other).update(named)
    other -= int8
    return {
        "int8": len(int8),
        "other": sorted(other),
        "not named": len(set(linears) - int8 - other),
        "of": len(linears),
        "layers": len(layers),
    }


def _kernels(engine: Engine, ids: Any) -> dict[str, Any]:
    """Names, counts and times of the kernels of one run, from CUPTI through PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        engine.run(ids, None, 0)
    rows = [
        {"name": e.key, "count": e.count, "microseconds": e.device_time_total}
        for e in recorded.key_averages()
        if e.device_time_total
    ]
    rows.sort(key=lambda row: -row["microseconds"])
    int8 = [row for row in rows if _INT8_KERNEL.search(row["name"])]
    return {
        "int8_by_name": sum(row["count"] for row in int8),
        "all": sum(row["count"] for row in rows),
        "longest": rows[:_KEPT_KERNELS],
    }


def latency(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every case for all plans, interleaved; ratios are of the same round.

    Without and with CUDA graphs, where every engine can be captured.
    """
    engines = {name: Engine(Path(plan)) for name, plan in task["plans"].items()}
    cases: dict[str, Any] = {}
    for case in task["cases"]:
        sizes = case["batch"], case["seq"], case["past"]
        reasons = [f"{n}: {why}" for n, e in engines.items() if (why := e.why_not(*sizes))]
        if reasons:
            cases[case["name"]] = {"skipped": reasons[0]}
            continue
        cases[case["name"]] = _case(engines, *sizes)
    return {"cases": cases}


def _case(engines: dict[str, Engine], batch: int, seq: int, past: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 1000, (batch, seq), generator=generator).to(_DEVICE)
    bound = {}
    for name, engine in engines.items():
        feeds = engine.feeds(ids, None, past)
        bound[name] = (feeds, engine.bind(feeds))
    result: dict[str, Any] = {"stream": _times({n: e.enqueue for n, e in engines.items()})}
    try:
        graphs = {name: _capture(engine) for name, engine in engines.items()}
    except (EngineError, RuntimeError) as error:
        result["cuda graph"] = {"skipped": str(error).strip().splitlines()[0]}
    else:
        result["cuda graph"] = _times({n: lambda _, g=g: g.replay() for n, g in graphs.items()})
    return result


def _capture(engine: Engine) -> Any:
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        engine.enqueue(torch.cuda.current_stream())
    return graph


def _times(calls: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds from the first launch to the last result, and ratios to the first of `calls`."""
    import torch

    stream = torch.cuda.Stream()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for number in range(_WARM_UP + _ROUNDS):
            for i in range(len(names)):
                name = names[(i + number) % len(names)]
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                calls[name](stream)
                end.record()
                end.synchronize()
                if number >= _WARM_UP:
                    samples[name].append(start.elapsed_time(end))
    return with_ratios(samples)


def with_ratios(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Per engine its milliseconds, and per pair that is asked about the ratio in the same round."""
    names = list(samples)
    ratios = {f"{n} / {names[0]}": paired_ratio(samples[n], samples[names[0]]) for n in names[1:]}
    for name in names:
        if f"{name}-bare" in samples:
            ratios[f"{name} / {name}-bare"] = paired_ratio(samples[name], samples[f"{name}-bare"])
    return {"milliseconds": {n: spread(s) for n, s in samples.items()}, "ratios": ratios}


def main() -> int:
    step, path = sys.argv[1:]
    task = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        result = {"build": build, "check": check, "latency": latency}[step](task)
    except IqError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
