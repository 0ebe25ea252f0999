"""Per-token magnitudes of every block: what lifecycle discovery looks at (docs/discovery.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iq_export.calibrate.data import Window
from iq_export.graph.sites import Sites
from iq_export.observe.walk import Graph, walk
from iq_export.progress import Progress


@dataclass(frozen=True)
class TokenStats:
    """One column per calibration token (all windows end to end), one row per block.

    `down_max`, `residual_max`: float32 `[blocks, tokens]`, max over channels of |down-projection
    input| and of |residual after the block|. `residual_channel`: int32, the channel of the latter.
    `window`, `position`, `token`: int `[tokens]`, where each column comes from. `embedded`: float32
    `[tokens]`, max over channels of |residual before the first block|; None if it is not known.
    """

    down_max: np.ndarray
    residual_max: np.ndarray
    residual_channel: np.ndarray
    window: np.ndarray
    position: np.ndarray
    token: np.ndarray
    embedded: np.ndarray | None = None


def observe_tokens(
    graph: Graph,
    sites: Sites,
    windows: Sequence[Window],
    *,
    providers: Sequence[str],
    progress: Progress,
) -> TokenStats:
    """Run the graph over `windows` and keep three numbers per block and token, one before."""
    lengths = [len(window.ids) for window in windows]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shape = (len(sites.blocks), int(starts[-1]))
    embedded = np.zeros(shape[1], np.float32)
    stats = TokenStats(
        down_max=np.zeros(shape, np.float32),
        residual_max=np.zeros(shape, np.float32),
        residual_channel=np.zeros(shape, np.int32),
        window=np.repeat(np.arange(len(windows)), lengths),
        position=np.concatenate([np.arange(length) for length in lengths]),
        token=np.concatenate([np.asarray(window.ids) for window in windows]),
        embedded=embedded,
    )
    down = {block.mlp.output.input: block.index for block in sites.blocks}
    residual = {block.mlp.residual: block.index for block in sites.blocks}
    names = [sites.embedding, *down, *residual]
    runs = walk(graph, names, windows, providers=providers, progress=progress)
    for number, values in runs:
        columns = slice(int(starts[number]), int(starts[number + 1]))
        for name, value in values.items():
            magnitude = np.abs(value)
            if name in down:
                stats.down_max[down[name], columns] = magnitude.max(1)
            elif name == sites.embedding:
                embedded[columns] = magnitude.max(1)
            else:
                stats.residual_max[residual[name], columns] = magnitude.max(1)
                stats.residual_channel[residual[name], columns] = magnitude.argmax(1)
    return stats
