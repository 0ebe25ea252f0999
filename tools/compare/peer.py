"""Run another project's quantizer on an ONNX file: `python peer.py JOB.json`.

A script of its own, because it runs in that project's environment: nothing but numpy, onnx and the
peer itself may be imported here. JOB has `tool` (`onnxruntime` or `modelopt`), `model`, `output`,
`windows` (a .npy of int64 token ids `[windows, length]`), `nodes` (the products to quantize) and
`options`. Prints one JSON line: the versions, the seconds and the peak memory of this process.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader


class Windows(CalibrationDataReader):
    """One prefill from an empty KV cache per window."""

    def __init__(self, model: Path, ids: np.ndarray) -> None:
        graph = onnx.load(model, load_external_data=False).graph
        self.feeds = [_feed(graph, row[None]) for row in ids]
        self.rewind()

    def __len__(self) -> int:
        return len(self.feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = iter(self.feeds[start_index:end_index])

    def rewind(self) -> None:
        self.left = iter(self.feeds)

    def get_first(self) -> dict[str, np.ndarray]:
        return self.feeds[0]

    def __deepcopy__(self, _: Any) -> Windows:
        """Iterators cannot be copied; ONNX Runtime copies the reader for SmoothQuant."""
        copy = Windows.__new__(Windows)
        copy.feeds = self.feeds
        copy.rewind()
        return copy


def _feed(graph: onnx.GraphProto, ids: np.ndarray) -> dict[str, np.ndarray]:
    positions = np.arange(ids.shape[1], dtype=np.int64)[None]
    known = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": positions,
    }
    feed = {}
    for value in graph.input:
        if value.name in known:
            feed[value.name] = known[value.name]
        else:  # past_key_values.N.key/value: [batch, kv_heads, 0, head_dim]
            sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            feed[value.name] = np.zeros((1, sizes[1], 0, sizes[3]), np.float32)
    return feed


def with_onnxruntime(job: dict[str, Any]) -> None:
    """`quantize_static`, QDQ. Options: `method` MinMax or Entropy, `smooth` for its SmoothQuant."""
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    options = job["options"]
    extra: dict[str, Any] = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "CalibTensorRangeSymmetric": True,
        # A pair in front of each product and none behind it, as TensorRT fuses it.
        "OpTypesToExcludeOutputQuantization": ["MatMul"],
        "CalibStridedMinMax": 1,  # else all activations of all windows are held at once
    }
    if options.get("smooth"):
        extra |= {"SmoothQuant": True, "SmoothQuantAlpha": 0.5, "SmoothQuantFolding": True}
    quantize_static(
        job["model"], job["output"], Windows(Path(job["model"]), np.load(job["windows"])),
        quant_format=QuantFormat.QDQ, op_types_to_quantize=["MatMul"],
        nodes_to_quantize=list(job["nodes"]), per_channel=True, reduce_range=False,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[options["method"]],
        use_external_data_format=True, extra_options=extra,
    )  # fmt: skip


def with_modelopt(job: dict[str, Any]) -> None:
    """`modelopt.onnx.quantization.quantize` int8. Options: `method` max or entropy."""
    from modelopt.onnx.quantization import quantize

    quantize(
        job["model"], quantize_mode="int8", calibration_method=job["options"]["method"],
        calibration_data_reader=Windows(Path(job["model"]), np.load(job["windows"])),
        calibration_eps=["cpu"], op_types_to_quantize=["MatMul"],
        nodes_to_quantize=[f"^{re.escape(name)}$" for name in job["nodes"]],
        use_external_data_format=True, output_path=job["output"], high_precision_dtype="fp32",
        log_level="WARNING",
    )  # fmt: skip


_TOOLS = {
    "onnxruntime": (with_onnxruntime, ("onnxruntime", "neural-compressor")),
    "modelopt": (with_modelopt, ("nvidia-modelopt", "onnxruntime-gpu", "onnxruntime")),
}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run, packages = _TOOLS[job["tool"]]
    begin = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        run(job)
    seconds = time.perf_counter() - begin
    versions = {}
    for name in (*packages, "onnx", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes(), "versions": versions}))


def peak_bytes() -> int:
    """This process's own high-water mark (`ru_maxrss` would count the parent's as well)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0


if __name__ == "__main__":
    main()
