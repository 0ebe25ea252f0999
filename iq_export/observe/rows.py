"""Rows of some tokens only, from a walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from iq_export.observe.samples import Sample
from iq_export.observe.token_stats import TokenStats
from iq_export.observe.walk import Graph, Observer, Values, observe
from iq_export.progress import Progress


class RowObserver(Observer):
    """Values of the member rows only: `rows[name]` is float32 `[members, features]`.

    `widths` maps value names to their features per token; `stats` tells of the first `count`
    windows of a walk.
    """

    def __init__(
        self, widths: Mapping[str, int], stats: TokenStats, members: np.ndarray, count: int
    ) -> None:
        self.names, self.of = list(widths), range(count)
        self.rows = {n: np.zeros((members.size, width), np.float32) for n, width in widths.items()}
        self._window, self._position = stats.window[members], stats.position[members]

    def reach(self, number: int) -> int:
        return int(self._position[self._window == number].max(initial=-1)) + 1

    def add(self, number: int, values: Values) -> None:
        mine = np.flatnonzero(self._window == number)
        for name, value in values.items():
            self.rows[name][mine] = value[self._position[mine]]


def collect_rows(
    graph: Graph,
    widths: Mapping[str, int],
    stats: TokenStats,
    members: np.ndarray,
    windows: Sequence[Sample],
    *,
    providers: Sequence[str],
    progress: Progress,
) -> dict[str, np.ndarray]:
    """Walk the graph over `windows`, those of `stats`, with a RowObserver alone."""
    observer = RowObserver(widths, stats, members, len(windows))
    observe(graph, [observer], windows, providers=providers, progress=progress)
    return observer.rows
