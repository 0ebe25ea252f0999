"""Bytes per second of each kernel beside a device-to-device copy, and its time with few rows.

Every input is larger than the L2 of any GPU at hand (67 MB each) and three sets of them take turns,
so that nothing of a call's input is left in L2. A call is timed after the same call: what
the L2 still has to write back is then its own. In the order of a real step it is another kernel's;
the same calls in a random order are reported beside it (`mixed`), without bars.

    python -m tools.gpu_check.bandwidth GPU_LIBRARY
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.plugins.calls import ELEMENTS
from tools.gpu_check.statistics import paired_ratio, spread
from tools.gpu_check.timing import SETS, graph_time

ROWS, HIDDEN = 8192, 4096
# Bars: of the copy's bandwidth, and with insertion against without.
SHARES = {
    "rms norm": 0.92,
    "rms norm + insert": 0.91,
    "gated product, blocks of 64": 0.85,
    "gated product, blocks of 512": 0.78,
    "detect": 0.80,
}
INSERTION = 1.02
# Bars of a launch with few rows, in microseconds: `HIDDEN` features, the gated product 11,008.
FEW_ROWS, FEATURES = (1, 8, 32), 11_008
LAUNCHES = {"rms norm": 3.0, "gated product, blocks of 64": 2.6, "detect": 2.2}
# Other widths and types are reported without bars.
WIDTHS, OTHER = (1024, 2048, 4096, 8192), ("float16", "bfloat16", "float32")
_ROUNDS, _FEW_ROUNDS, _WARM_UP, _TEMPLATES = 60, 12, 6, 3
_SINK_EVERY = 64
_DEVICE = "cuda"
_BLOCKS = (1, 64, 512)
# GPU cycles to wait so that the CPU is ahead of the GPU, and no launch is timed.
_HEAD_START = 8_000_000

Call = Callable[[int], None]


def measure(library: Path) -> dict[str, Any]:
    """Per kernel: bytes, seconds, bytes per second, its ratio to the copy; and the insertion's.

    `launches` are microseconds with few rows, `widths` the ratios of other types and widths.
    """
    opened = ctypes.CDLL(str(library))
    calls, sizes = _calls(opened)
    result = table(interleaved(calls, rounds=_ROUNDS, warm_up=_WARM_UP), sizes)
    mixed = interleaved(calls, rounds=_ROUNDS, warm_up=_WARM_UP, alone=False)
    result["mixed"] = {name: row["of_copy"] for name, row in _rows(mixed, sizes).items()}
    result["shape"] = [ROWS, HIDDEN]
    result["note"] = f"fp16, {SETS} sets of tensors take turns; every {_SINK_EVERY}th row a sink"
    result["launches"], missed = launches(opened)
    result["missed"] += missed
    result["widths"] = _widths(opened)
    return result


def table(seconds: Mapping[str, list[float]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """From samples in step to the numbers that are reported. `copy` moves what the norm moves."""
    rows = _rows(seconds, sizes)
    insertion = paired_ratio(seconds["rms norm + insert"], seconds["rms norm"])
    missed = [
        f"{name} has {rows[name]['of_copy']['median']:.0%} of the copy's bandwidth"
        for name, share in SHARES.items()
        if rows[name]["of_copy"]["median"] < share
    ]
    if insertion["median"] > INSERTION:
        missed.append(f"insertion costs {insertion['median']:.3f} x")
    return {"kernels": rows, "insertion": insertion, "missed": missed}


def _rows(seconds: Mapping[str, list[float]], sizes: Mapping[str, int]) -> dict[str, Any]:
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
    return rows


def interleaved(
    calls: dict[str, Call], *, rounds: int, warm_up: int, alone: bool = True
) -> dict[str, list[float]]:
    """Seconds on the GPU of each call, once a round, every round in another order.

    With `alone` each is called twice and the second call is timed, see above.
    """
    import torch

    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    turn = 0
    for number in range(warm_up + rounds):
        torch.cuda._sleep(_HEAD_START)
        events = {}
        for name in order.sample(list(calls), len(calls)):
            if alone:
                calls[name](turn)
                turn += 1
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


def launches(library: ctypes.CDLL) -> tuple[dict[str, float], list[str]]:
    """Microseconds of a launch in a CUDA graph with few rows, fp16; and the bars missed.

    `detect` has no sink, as a decode step seldom has; with one among its rows it has a line of its
    own, without a bar.
    """
    found: dict[str, float] = {}
    missed = []
    for rows in FEW_ROWS:
        norms, _ = _calls(library, rows=rows)
        quiet, _ = _calls(library, rows=rows, sinks=False)
        gated, _ = _calls(library, rows=rows, hidden=FEATURES, blocks=(1, 64))
        wide, _ = _calls(library, rows=rows, hidden=FEATURES // 512 * 512, blocks=(512,))
        calls = {
            **{name: norms[name] for name in ("rms norm", "rms norm + insert")},
            "detect": quiet["detect"],
            "detect, with a sink": norms["detect"],
            **{name: call for name, call in gated.items() if name.startswith("gated")},
            **{name: call for name, call in wide.items() if name.startswith("gated")},
        }
        for name, call in calls.items():
            time = graph_time(call)
            found[f"{name}, {rows} rows"] = time
            if time > LAUNCHES.get(name, time):
                missed.append(f"{name} of {rows} rows takes {time:.2f} us")
    return found, missed


def _widths(library: ctypes.CDLL) -> dict[str, dict[str, float]]:
    """Type and width -> kernel -> its bandwidth over the copy's, the same bytes in each."""
    found = {}
    for kind in OTHER:
        for hidden in WIDTHS:
            rows = ROWS * HIDDEN // hidden // (2 if kind == "float32" else 1)
            calls, sizes = _calls(library, kind, rows, hidden, sinks=False)
            seconds = interleaved(calls, rounds=_FEW_ROUNDS, warm_up=2)
            found[f"{kind} [{rows}, {hidden}]"] = {
                name: row["of_copy"]["median"] for name, row in _rows(seconds, sizes).items()
            }
    return found


def _calls(
    library: Any, kind: str = "float16", rows: int = ROWS, hidden: int = HIDDEN, *,
    sinks: bool = True, blocks: tuple[int, ...] = _BLOCKS,
) -> tuple[dict[str, Call], dict[str, int]]:  # fmt: skip
    """What is timed, each on the set of tensors that its turn says; and the bytes it moves."""
    import torch

    def on_device(tensor: Any) -> Any:
        return tensor.to(_DEVICE)

    dtype, count = getattr(torch, kind), rows * hidden
    size = dtype.itemsize
    generator = torch.Generator().manual_seed(0)
    x, branch, total = (
        [torch.randn(rows, hidden, device=_DEVICE, dtype=dtype) for _ in range(SETS)]
        for _ in range(3)
    )
    codes = [torch.empty(rows, hidden, device=_DEVICE, dtype=torch.int8) for _ in range(SETS)]
    norm_bytes = count * (3 * size + 1)
    source, copy = (
        [torch.zeros(norm_bytes // 2, device=_DEVICE, dtype=torch.uint8) for _ in range(SETS)]
        for _ in range(2)
    )
    weight = on_device(torch.ones(hidden, dtype=dtype))
    templates = torch.randn(_TEMPLATES, hidden, generator=generator)
    scale = 0.03
    steps = templates.to(dtype).float() / torch.tensor(scale)
    inserted = on_device(steps.round().clamp(-128, 127).to(torch.int8))
    table = on_device(templates)
    row = torch.arange(rows, dtype=torch.int32)
    index = on_device((row % _SINK_EVERY == 0).int() * (1 + row % _TEMPLATES).int() * int(sinks))
    first, valid = index > 0, on_device(torch.ones(rows, dtype=torch.bool))
    found = torch.empty_like(index)
    sizes = (ctypes.c_int64(rows), ctypes.c_int64(hidden), ctypes.c_int64(_TEMPLATES))
    element = ELEMENTS[kind]
    kept = (weight, table, inserted, index, first, valid, found)

    def launch(name: str, *arguments: Any) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        given = [_pointer(argument) for argument in arguments]
        status = getattr(library, f"iq_launch_{name}")(element, *given, stream)
        if status:
            raise RuntimeError(f"{name} gives CUDA error {status}")

    def norm(insert: bool) -> Call:
        replaced = (index, inserted) if insert else (None, None)

        def call(turn: int) -> None:
            at = turn % SETS
            launch(
                "add_norm", x[at], branch[at], weight, None, *replaced, 1e-5, scale, *sizes,
                total[at], codes[at],
            )  # fmt: skip

        return call

    def change(restore: bool) -> Call:
        def call(turn: int) -> None:
            at = turn % SETS
            launch("change", ctypes.c_bool(restore), x[at], index, table, *sizes, total[at])

        return call

    def gated(block: int) -> Call:
        def call(turn: int) -> None:
            at = turn % SETS
            launch(
                "silu_mul", x[at], branch[at], index, block, float(block**-0.5), scale,
                *sizes[:2], codes[at],
            )  # fmt: skip

        return call

    def detect(turn: int) -> None:
        launch("detect", x[turn % SETS], first, valid, table, 200.0, *sizes, found)

    def plain_copy(turn: int) -> None:
        copy[turn % SETS].copy_(source[turn % SETS])

    calls: dict[str, Call] = {
        "copy": plain_copy,
        "detect": detect,
        "insert": change(False),
        "restore": change(True),
        "rms norm": norm(False),
        "rms norm + insert": norm(True),
        **{f"gated product, blocks of {block}": gated(block) for block in blocks},
    }
    # Rows of sinks need not be read where they are replaced; a norm reads them, for the sum.
    replaced = int((index > 0).sum()) * hidden
    read = count - replaced
    moved = {
        "copy": 2 * (norm_bytes // 2),
        "detect": count * size + rows * (1 + 1 + 4),
        "insert": read * size + count * size + rows * 4,
        "restore": count * 2 * size + rows * 4,
        "rms norm": norm_bytes + hidden * size,
        "rms norm + insert": norm_bytes + hidden * size + rows * 4,
        **{f"gated product, blocks of {b}": read * 2 * size + count + rows * 4 for b in blocks},
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
