"""Discover the lifecycles of spikes from data: who is born where, and where it dies.

Emergence, persistence and disappearance are the three phases of InsertQuant (arXiv 2606.02288,
section on the mechanism; method.md "What a spike is"). No block number is assumed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from iq_export.calibrate.token_stats import TokenStats
from iq_export.graph.sites import Sites

# A birth at least doubles the residual's largest value of its tokens; a death never does.
_BIRTH_GROWTH = 2.0
# A lifecycle has ended where its tokens' residual is within this factor of the median token's.
_RESIDUAL_EXCESS = 8.0
# The block that takes away at least this share of the spike is its death.
_DEATH_SHARE = 0.25
# Sinks of a block are clamped where they alone stretch the down-projection's range.
_CLAMP_EXCESS = 1.5
# Position 0 is forced into the set if it spikes in at least this share of the windows.
_FIRST_RATE = 0.95


@dataclass(frozen=True)
class Lifecycle:
    """One spike from birth to death. Block numbers count from 0; magnitudes are absolute values.

    `members`: indices of its tokens among the calibration tokens (columns of TokenStats).
    `death` is the block that cancels the largest part; `end` the last block in which its tokens
    still stand out. A spike that nobody cancels has `death` None and ends at the last block.
    """

    birth: int
    death: int | None
    end: int
    channel: int
    threshold: float
    force_first: bool
    clamp_blocks: tuple[int, ...]
    members: np.ndarray
    down_peak: float
    down_median: float
    residual_peak: float
    first_rate: float

    @property
    def insert_blocks(self) -> range:
        """Blocks whose norms read a residual that carries the spike."""
        return range(self.birth + 1, self.end + 1)

    def scope(self, sites: Sites) -> set[str]:
        """Node names of the products whose inputs may carry the spike."""
        birth = sites.blocks[self.birth].mlp.output
        later = [sites.blocks[block] for block in self.insert_blocks]
        branches = [branch for block in later for branch in (block.attention, block.mlp)]
        return {birth.node, *(linear.node for b in branches for linear in b.linears)}

    def common_tokens(self, stats: TokenStats, most: int = 5) -> list[tuple[int, int, int]]:
        """The most frequent members: `(token id, times at position 0, times elsewhere)`."""
        counts: Counter[int] = Counter(stats.token[self.members].tolist())
        first = Counter(stats.token[i].item() for i in self.members if stats.position[i] == 0)
        return [(t, first[t], n - first[t]) for t, n in counts.most_common(most)]


def discover(stats: TokenStats, *, alpha: float = 64.0) -> list[Lifecycle]:
    """Find all lifecycles; an empty list if nothing spikes.

    A token spikes at a block if its down-projection input exceeds `alpha` times the median token's
    (method.md step 1; 64 is the published peers' value). A group of spiking tokens whose residual
    jumps is a birth; one whose residual does not is the death of an earlier group. If most tokens
    spike, the median is the spike itself and there is no lifecycle by construction.
    """
    blocks = stats.down_max.shape[0]
    median = np.median(stats.down_max, axis=1)
    births: list[tuple[int, np.ndarray, int]] = []
    for block in range(blocks):
        spiking = stats.down_max[block] > alpha * max(float(median[block]), 1e-12)
        grown = spiking & (_before(stats, block) * _BIRTH_GROWTH < stats.residual_max[block])
        if grown.any():
            members = np.flatnonzero(grown)
            channel = _mode(stats.residual_channel[block, members])
            births.append((block, members, channel))
    return [_follow(stats, *birth) for birth in _first_of_each(births, stats)]


def _before(stats: TokenStats, block: int) -> np.ndarray:
    """Residual magnitude before the block; before block 0 nothing is known, so any spike is new."""
    if block == 0:
        return np.zeros(stats.down_max.shape[1], np.float32)
    return stats.residual_max[block - 1]


def _mode(values: np.ndarray) -> int:
    return Counter(values.tolist()).most_common(1)[0][0]


def _first_of_each(
    births: list[tuple[int, np.ndarray, int]], stats: TokenStats
) -> list[tuple[int, np.ndarray, int]]:
    """Drop a later birth on the same channel of tokens that already carry the spike."""
    kept: list[tuple[int, np.ndarray, int]] = []
    for block, members, channel in births:
        carried = any(
            channel == other_channel
            and np.isin(members, other).mean() > 0.5
            and (stats.residual_channel[block - 1, members] == channel).mean() > 0.5
            for _, other, other_channel in kept
        )
        if not carried:
            kept.append((block, members, channel))
    return kept


def _follow(stats: TokenStats, birth: int, members: np.ndarray, channel: int) -> Lifecycle:
    """Track the written channel of the members from block to block."""
    blocks = stats.down_max.shape[0]
    on_channel = stats.residual_channel[:, members] == channel
    carried = np.median(np.where(on_channel, stats.residual_max[:, members], 0.0), axis=1)
    typical = np.median(stats.residual_max, axis=1)
    calm = np.flatnonzero(carried[birth:] < _RESIDUAL_EXCESS * typical[birth:])
    # The same channel of the same tokens may spike again later: only the first life counts.
    end = birth + int(calm[0]) if calm.size else blocks - 1
    drops = carried[birth:end] - carried[birth + 1 : end + 1]
    death: int | None = None
    if drops.size and drops.max() > _DEATH_SHARE * carried[birth : end + 1].max():
        death = birth + 1 + int(drops.argmax())
    semantic = np.ones(stats.down_max.shape[1], bool)
    semantic[members] = False
    semantic_max = stats.down_max[:, semantic].max(1) if semantic.any() else np.zeros(blocks)
    member_max = stats.down_max[:, members].max(1)
    clamp = [
        block
        for block in range(birth, end + 1)
        if block == birth or member_max[block] > _CLAMP_EXCESS * semantic_max[block]
    ]
    starts = stats.position == 0
    first_rate = float(np.isin(np.flatnonzero(starts), members).mean())
    return Lifecycle(
        birth=birth,
        death=death,
        end=end,
        channel=channel,
        threshold=threshold_between(stats.down_max[birth], members),
        force_first=first_rate >= _FIRST_RATE,
        clamp_blocks=tuple(clamp),
        members=members,
        down_peak=float(member_max[birth]),
        down_median=float(np.median(stats.down_max[birth])),
        residual_peak=float(carried[birth : end + 1].max()),
        first_rate=first_rate,
    )


def threshold_between(down_max: np.ndarray, members: np.ndarray) -> float:
    """tau: the geometric middle between the largest semantic and the smallest sink magnitude.

    A decode step sees one token, so the deployed threshold is a constant (method.md step 2).
    """
    semantic = np.ones(down_max.size, bool)
    semantic[members] = False
    top = float(down_max[semantic].max()) if semantic.any() else 0.0
    bottom = float(down_max[members].min())
    return float(np.sqrt(max(top, 1e-6) * bottom)) if top < bottom else bottom
