"""The machine that results are of, as one JSON line: GPU, driver, CUDA, versions."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from typing import Any

from iq_export.engine.plugin import find_nvcc
from iq_export.engine.targets import RTX
from iq_export.engine.trt import load
from iq_export.errors import EngineError


def describe() -> dict[str, Any]:
    """What can be found out; None for a missing tool, and for TensorRT the reason."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    nvcc = find_nvcc()
    try:
        tensorrt = load(RTX).label
    except EngineError as error:
        tensorrt = f"none: {error}"
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "multiprocessors": properties.multi_processor_count,
        "nvidia_smi": _first_line("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "nvcc": _first_line(str(nvcc), "--version", find="release") if nvcc else None,
        "tensorrt": tensorrt,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
    }


def _first_line(tool: str, *arguments: str, find: str = "") -> str | None:
    if shutil.which(tool) is None:
        return None
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    return next((line.strip() for line in done.stdout.splitlines() if find in line), None)


if __name__ == "__main__":
    print(json.dumps(describe()))
