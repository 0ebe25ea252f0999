"""Per-token magnitudes of every block: what lifecycle discovery looks at (docs/discovery.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iq_export.graph.sites import Sites
from iq_export.observe.samples import Sample
from iq_export.observe.walk import Graph, Observer, Values, observe
from iq_export.progress import Progress


@dataclass(frozen=True)
class TokenStats:
    """One column per calibration token (all windows end to end), one row per block.

    `down_max`, `residual_max`: float32 `[blocks, tokens]`, max over channels of |down-projection
    input| (a mixture's: `Branch.inner`) and of |residual after the block|. `residual_channel`:
    int32, the channel of the latter.
    `window`, `position`, `token`: int `[tokens]`, where each column comes from. `embedded`: float32
    `[tokens]`, max over channels of |residual before the first block|; None if it is not known.
    `causal`: whether no row needs later ones.
    `onward_max`, `onward_channel`: as `residual_max` and its channel, behind the norm that the
    residual passes; None if it passes none.
    """

    down_max: np.ndarray
    residual_max: np.ndarray
    residual_channel: np.ndarray
    window: np.ndarray
    position: np.ndarray
    token: np.ndarray
    embedded: np.ndarray | None = None
    causal: bool = True
    onward_max: np.ndarray | None = None
    onward_channel: np.ndarray | None = None

    @property
    def starts(self) -> np.ndarray:
        """Columns of first rows: int64, none where a row is as near to all others."""
        return np.flatnonzero(self.position == 0) if self.causal else np.zeros(0, np.int64)

    @property
    def onward(self) -> tuple[np.ndarray, np.ndarray]:
        """What goes on into the next block: magnitudes and channels `[blocks, tokens]`."""
        if self.onward_max is None or self.onward_channel is None:
            return self.residual_max, self.residual_channel
        return self.onward_max, self.onward_channel


class TokenObserver(Observer):
    """Keeps three numbers per block and token, and one before the first block. `windows` are those
    of a walk from the number `first` on."""

    def __init__(self, sites: Sites, windows: Sequence[Sample], first: int = 0) -> None:
        self.of = range(first, first + len(windows))
        lengths = [window.rows for window in windows]
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        shape = (len(sites.blocks), int(self._starts[-1]))
        self._embedding, self._embedded = sites.embedding, np.zeros(shape[1], np.float32)
        normed = any(block.mlp.onward != block.mlp.residual for block in sites.blocks)
        self.stats = TokenStats(
            down_max=np.zeros(shape, np.float32),
            residual_max=np.zeros(shape, np.float32),
            residual_channel=np.zeros(shape, np.int32),
            window=np.repeat(np.arange(len(windows)), lengths),
            position=np.concatenate([np.arange(length) for length in lengths]),
            token=np.concatenate([window.tokens for window in windows]),
            embedded=self._embedded,
            causal=all(window.causal for window in windows),
            onward_max=np.zeros(shape, np.float32) if normed else None,
            onward_channel=np.zeros(shape, np.int32) if normed else None,
        )
        self._down = {block.mlp.inner: block.index for block in sites.blocks}
        self._residual = {block.mlp.residual: block.index for block in sites.blocks}
        self._onward = {block.mlp.onward: block.index for block in sites.blocks if normed}
        self.names = [self._embedding, *self._down, *self._residual, *self._onward]

    def add(self, number: int, values: Values) -> None:
        columns = slice(int(self._starts[number]), int(self._starts[number + 1]))
        for name, value in values.items():
            magnitude = np.abs(value)
            if name in self._down:
                self.stats.down_max[self._down[name], columns] = magnitude.max(1)
            elif name == self._embedding:
                self._embedded[columns] = magnitude.max(1)
            if name in self._residual:
                block = self._residual[name]
                self.stats.residual_max[block, columns] = magnitude.max(1)
                self.stats.residual_channel[block, columns] = magnitude.argmax(1)
            if name in self._onward:
                sizes, channels = self.stats.onward
                sizes[self._onward[name], columns] = magnitude.max(1)
                channels[self._onward[name], columns] = magnitude.argmax(1)


def observe_tokens(
    graph: Graph,
    sites: Sites,
    windows: Sequence[Sample],
    *,
    providers: Sequence[str],
    progress: Progress,
) -> TokenStats:
    """Walk the graph over `windows` with a TokenObserver alone."""
    observer = TokenObserver(sites, windows)
    observe(graph, [observer], windows, providers=providers, progress=progress)
    return observer.stats
