"""Times of single launches on the GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable

# Launches in a graph, and how often it is replayed; the sets of tensors that take turns.
_LAUNCHES, _REPLAYS, _WARM_UP, SETS = 21, 30, 5, 3
# GPU cycles to wait so that the CPU is ahead of the GPU, and no graph's launch is timed.
_HEAD_START = 200_000


def graph_time(call: Callable[[int], object]) -> float:
    """Microseconds of one of several calls in a CUDA graph: the median over replays.

    `call` gets the number of its turn, by which it may take one of SETS sets of tensors.
    """
    import torch

    for turn in range(SETS):
        call(turn)  # loads the kernels, which cannot be done in a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(_LAUNCHES):
            call(turn)
    times = []
    for number in range(_WARM_UP + _REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if number >= _WARM_UP:
            times.append(start.elapsed_time(end) * 1e3 / _LAUNCHES)
    return statistics.median(times)
