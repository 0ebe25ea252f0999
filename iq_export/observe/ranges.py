"""Magnitude statistics of activation tensors, accumulated window by window in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from iq_export.observe.samples import Sample
from iq_export.observe.walk import Graph, Observer, Values, walk
from iq_export.progress import Progress

_BINS = 1 << 12
# A histogram counts every so manieth token: its quantiles are for people.
_COUNTED = 8
# The largest of n magnitudes is exceeded by the next one with a chance of 1 in n + 1: of the tokens
# to come, less than 1 % go beyond a range from so many.
FEWEST_TOKENS = 100


@dataclass
class MagnitudeHistogram:
    """Counts of |x| in equal bins over `[0, limit)`; doubles `limit` when a larger value comes.

    Doubling merges neighbouring bins exactly, so the result does not depend on the order of data
    beyond the first window's choice of `limit`.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    limit: float = 0.0

    def add(self, magnitude: np.ndarray) -> None:
        """Count the entries of `magnitude` (any shape, >= 0)."""
        if not magnitude.size:
            return
        top = float(magnitude.max())
        if self.limit == 0.0:
            if top == 0.0:
                self.counts[0] += magnitude.size
                return
            self.limit = top * 1.0001
        while top >= self.limit:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts[: _BINS // 2], self.counts[_BINS // 2 :] = merged, 0
            self.limit *= 2
        bins = (magnitude.ravel() * np.float32(_BINS / self.limit)).astype(np.int32)
        self.counts += np.bincount(np.minimum(bins, _BINS - 1), minlength=_BINS)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def centres(self) -> np.ndarray:
        return (np.arange(_BINS) + 0.5) * (self.limit / _BINS)

    def quantile(self, q: float) -> float:
        """Magnitude below which a share `q` of the entries lies; 0 for an empty histogram."""
        if not self.total or not self.limit:
            return 0.0
        position = int(np.searchsorted(np.cumsum(self.counts), q * self.total))
        return float(self.centres()[min(position, _BINS - 1)])


@dataclass
class TensorStats:
    """Statistics of one activation `[tokens, features]`.

    `absmax` and `histogram`: over all tokens, the latter empty if it was not asked for.
    `absmax_semantic`, `channel_absmax` (`[features]`)
    and `rows`, a bounded random sample, float32 `[sampled, features]`: semantic tokens only, of
    which there are `tokens`.
    """

    absmax: float
    absmax_semantic: float
    channel_absmax: np.ndarray
    histogram: MagnitudeHistogram
    rows: np.ndarray
    tokens: int = 0

    @classmethod
    def empty(cls, features: int) -> TensorStats:
        zeros = np.zeros(features, np.float32)
        rows = np.zeros((0, features), np.float32)
        return cls(0.0, 0.0, zeros, MagnitudeHistogram(), rows)

    def add(
        self, value: np.ndarray, sinks: np.ndarray, sample: np.ndarray, counted: int | None = None
    ) -> None:
        """Account for one window: `value` `[seq, features]`, `sinks` bool `[seq]`; the semantic
        rows among `sample` (row numbers) are kept. With `counted`, the window's number, some of its
        rows, other ones of each window, go into the histogram as well."""
        semantic = value
        if sinks.any():
            self.absmax = max(self.absmax, float(np.abs(value[sinks]).max()))
            semantic = value[~sinks]
        if semantic.size:
            self.tokens += len(semantic)
            top = np.maximum(semantic.max(0), -semantic.min(0))
            np.maximum(self.channel_absmax, top, out=self.channel_absmax)
            self.absmax_semantic = float(self.channel_absmax.max())
            self.absmax = max(self.absmax, self.absmax_semantic)
        if sample.size:
            self.rows = np.concatenate([self.rows, value[sample[~sinks[sample]]]])
        if counted is not None:
            self.histogram.add(np.abs(value[counted % _COUNTED :: _COUNTED]))


class MagnitudeObserver(Observer):
    """Magnitudes of the values in `widths` (name -> features) over the first `windows` windows,
    all tokens alike."""

    def __init__(self, widths: Mapping[str, int], windows: int) -> None:
        self.stats = {name: TensorStats.empty(width) for name, width in widths.items()}
        self.names, self.of = list(self.stats), range(windows)

    def add(self, number: int, values: Values) -> None:
        nobody = np.zeros(0, int)
        for name, value in values.items():
            self.stats[name].add(value, np.zeros(len(value), bool), nobody, number)


def observe_ranges(
    graph: Graph,
    widths: dict[str, int],
    windows: Sequence[Sample],
    sinks: Callable[[str, int, Mapping[str, np.ndarray]], np.ndarray],
    *,
    always: Sequence[str] = (),
    providers: Sequence[str],
    progress: Progress,
    seed: int,
    sample_tokens: int = 512,
    reduce: Callable[[dict[str, TensorStats]], object] | None = None,
    rows: Mapping[str, str] | None = None,
) -> dict[str, TensorStats]:
    """Statistics of the values in `widths` (name -> features) over `windows`.

    `sinks(name, window number, values)` returns the bool `[seq]` mask of rows to leave out of that
    tensor; `values` holds the tensors named in `always`. `rows`: of a value that has only some of
    the tokens, the name of the one that numbers these. At most `sample_tokens` rows are sampled.
    `reduce` gets the finished statistics of a piece of the graph; afterwards their rows go, so that
    those of the whole graph are never in memory together.
    """
    stats = {name: TensorStats.empty(width) for name, width in widths.items()}
    per_window = rows_per_window(len(windows), sample_tokens)
    rows = rows or {}
    names = list(dict.fromkeys([*widths, *rows.values()]))
    for number, values in walk(
        graph, names, windows, always=always, providers=providers, progress=progress
    ):
        for name, value in values.items():
            if name in stats:
                sunk = sinks(name, number, values)
                sunk = sunk[values[rows[name]]] if name in rows else sunk
                sample = sampled_rows(len(value), per_window, seed, number)
                stats[name].add(value, sunk, sample)
        if reduce is not None and number == len(windows) - 1:
            done = {name: stats[name] for name in values if name in stats}
            reduce(done)
            for each in done.values():
                each.rows = each.rows[:0].copy()
    return stats


def rows_per_window(windows: int, most: int = 512) -> int:
    """How many rows of every window are kept, so that it is `most` of all."""
    return max(1, most // windows)


def sampled_rows(length: int, count: int, seed: int, number: int) -> np.ndarray:
    """Row numbers to keep of window `number`: position 0, where most spikes stand, and others."""
    if not length:  # an expert that no token chose
        return np.zeros(0, int)
    rng = np.random.default_rng([seed, number])
    drawn = rng.permutation(np.arange(1, length))[: count - 1]
    return np.append(0, np.sort(drawn))
