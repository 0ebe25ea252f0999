"""Bytes per second of each kernel beside a device-to-device copy, interleaved in one run.

Every tensor is larger than the L2 of any GPU at hand (67 MB each) and three sets of them take
turns, so that nothing of a call's input is left in L2.

    python -m tools.gpu_check.bandwidth GPU_LIBRARY
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.plugins.calls import ELEMENTS
from tools.gpu_check.statistics import paired_ratio, spread

ROWS, HIDDEN = 8192, 4096
# Bars: of the copy's bandwidth, and with insertion against without.
SHARE, INSERTION = 0.85, 1.05
BARRED = ("rms norm", "rms norm + insert", "gated product, blocks of 64")
_SETS, _ROUNDS, _WARM_UP, _TEMPLATES = 3, 60, 6, 3
_SINK_EVERY = 64
_DEVICE = "cuda"
_BLOCKS = (1, 64, 512)
# GPU cycles to wait so that the CPU is ahead of the GPU, and no launch is timed.
_HEAD_START = 8_000_000

Call = Callable[[int], None]


def measure(library: Path) -> dict[str, Any]:
    """Per kernel: bytes, seconds, bytes per second, its ratio to the copy; and the insertion's."""
    calls, sizes = _calls(ctypes.CDLL(str(library)))
    seconds = interleaved(calls, rounds=_ROUNDS, warm_up=_WARM_UP)
    result = table(seconds, sizes)
    result["shape"] = [ROWS, HIDDEN]
    result["note"] = f"fp16, {_SETS} sets of tensors take turns; every {_SINK_EVERY}th row a sink"
    return result


def table(seconds: dict[str, list[float]], sizes: dict[str, int]) -> dict[str, Any]:
    """From samples in step to the numbers that are reported. `copy` moves what the norm moves."""
    rows: dict[str, Any] = {}
    for name, samples in seconds.items():
        time = spread(samples)
        # Both in bytes per second, so that kernels that move less are compared as well.
        ratio = paired_ratio(
            [sizes[name] / sample for sample in samples],
            [sizes["copy"] / sample for sample in seconds["copy"]],
        )
        rows[name] = {
            "bytes": sizes[name],
            "seconds": time,
            "bytes_per_second": sizes[name] / time["median"],
            "of_copy": ratio,
        }
    insertion = paired_ratio(seconds["rms norm + insert"], seconds["rms norm"])
    missed = [
        f"{name} has {rows[name]['of_copy']['median']:.0%} of the copy's bandwidth"
        for name in BARRED
        if rows[name]["of_copy"]["median"] < SHARE
    ]
    if insertion["median"] > INSERTION:
        missed.append(f"insertion costs {insertion['median']:.3f} x")
    return {"kernels": rows, "insertion": insertion, "missed": missed}


def interleaved(calls: dict[str, Call], *, rounds: int, warm_up: int) -> dict[str, list[float]]:
    """Seconds on the GPU of each call, once a round, every round starting with another one."""
    import torch

    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    turn = 0
    for number in range(warm_up + rounds):
        torch.cuda._sleep(_HEAD_START)
        events = {}
        for i in range(len(names)):
            name = names[(i + number) % len(names)]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[name](turn)
            end.record()
            events[name] = (start, end)
            turn += 1
        torch.cuda.synchronize()
        if number >= warm_up:
            for name, (start, end) in events.items():
                seconds[name].append(start.elapsed_time(end) / 1e3)
    return seconds


def _calls(library: Any) -> tuple[dict[str, Call], dict[str, int]]:
    """What is timed, each on the set of tensors that its turn says; and the bytes it moves."""
    import torch

    def on_device(tensor: Any) -> Any:
        return tensor.to(_DEVICE)

    half, count = torch.float16, ROWS * HIDDEN
    generator = torch.Generator().manual_seed(0)
    x, branch, total = (
        [torch.randn(ROWS, HIDDEN, device=_DEVICE, dtype=half) for _ in range(_SETS)]
        for _ in range(3)
    )
    codes = [torch.empty(ROWS, HIDDEN, device=_DEVICE, dtype=torch.int8) for _ in range(_SETS)]
    norm_bytes = count * (3 * 2 + 1)
    source, copy = (
        [torch.zeros(norm_bytes // 2, device=_DEVICE, dtype=torch.uint8) for _ in range(_SETS)]
        for _ in range(2)
    )
    weight = on_device(torch.ones(HIDDEN, dtype=half))
    table = on_device(torch.randn(_TEMPLATES, HIDDEN, generator=generator))
    row = torch.arange(ROWS, dtype=torch.int32)
    index = on_device((row % _SINK_EVERY == 0).int() * (1 + row % _TEMPLATES).int())
    first, valid = index > 0, on_device(torch.ones(ROWS, dtype=torch.bool))
    found = torch.empty_like(index)
    sizes = (ctypes.c_int64(ROWS), ctypes.c_int64(HIDDEN), ctypes.c_int64(_TEMPLATES))
    element = ELEMENTS["float16"]
    kept = (weight, table, index, first, valid, found)

    def launch(name: str, *arguments: Any) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        given = [_pointer(argument) for argument in arguments]
        status = getattr(library, f"iq_launch_{name}")(element, *given, stream)
        if status:
            raise RuntimeError(f"{name} gives CUDA error {status}")

    def norm(insert: bool) -> Call:
        sinks = (index, table) if insert else (None, None)

        def call(turn: int) -> None:
            at = turn % _SETS
            launch(
                "add_norm", x[at], branch[at], weight, None, *sinks, 1e-5, 0.03, *sizes,
                total[at], codes[at],
            )  # fmt: skip

        return call

    def change(restore: bool) -> Call:
        def call(turn: int) -> None:
            at = turn % _SETS
            launch("change", ctypes.c_bool(restore), x[at], index, table, *sizes, total[at])

        return call

    def gated(block: int) -> Call:
        def call(turn: int) -> None:
            at = turn % _SETS
            launch(
                "silu_mul", x[at], branch[at], index, block, float(block**-0.5), 0.03,
                *sizes[:2], codes[at],
            )  # fmt: skip

        return call

    def detect(turn: int) -> None:
        launch("detect", x[turn % _SETS], first, valid, table, 200.0, *sizes, found)

    def plain_copy(turn: int) -> None:
        copy[turn % _SETS].copy_(source[turn % _SETS])

    calls: dict[str, Call] = {
        "copy": plain_copy,
        "detect": detect,
        "insert": change(False),
        "restore": change(True),
        "rms norm": norm(False),
        "rms norm + insert": norm(True),
        **{f"gated product, blocks of {block}": gated(block) for block in _BLOCKS},
    }
    # Rows of sinks are not read where they are replaced; a norm reads them, for the sum.
    replaced = int((index > 0).sum()) * HIDDEN
    read = count - replaced
    moved = {
        "copy": 2 * (norm_bytes // 2),
        "detect": count * 2 + ROWS * (1 + 1 + 4),
        "insert": read * 2 + count * 2 + ROWS * 4,
        "restore": count * 4 + ROWS * 4,
        "rms norm": norm_bytes + HIDDEN * 2,
        "rms norm + insert": norm_bytes + HIDDEN * 2 + ROWS * 4,
        **{f"gated product, blocks of {b}": read * 4 + count + ROWS * 4 for b in _BLOCKS},
    }
    assert kept  # the calls hold their pointers
    return calls, moved


def _pointer(value: Any) -> Any:
    """As ctypes takes it: tensors by their address."""
    if value is None:
        return ctypes.c_void_p()
    if hasattr(value, "data_ptr"):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else value


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
