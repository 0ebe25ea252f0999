"""Discover the lifecycles of spikes from data: who is born where, and where it dies.

Emergence, persistence and disappearance are the three phases of InsertQuant (arXiv 2606.02288,
section on the mechanism; method.md "What a spike is"). No block number is assumed.

Detection is progressive (method.md step 2): tokens that spike before the birth of the others are
caught at an early site, the rest at the birth; what an early site caught stays caught.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
# alpha0 of the early sites is this share of alpha: before the others' birth, a token that goes on
# to carry the spike is known by more than its size.
_EARLY_SHARE = 0.5
# Several sites only if at each of them the sinks are this many times larger than all others: one
# site without a constant threshold would keep the whole lifecycle from being replaced.
_SITE_GAP = 2.0


@dataclass(frozen=True)
class EarlySite:
    """A block before the birth at which some tokens of the lifecycle spike already.

    They are those whose down-projection input exceeds `threshold` there, and position 0 if
    `force_first`. `members`: as in Lifecycle, those first caught here.
    """

    block: int
    threshold: float
    force_first: bool
    members: np.ndarray


@dataclass(frozen=True)
class Lifecycle:
    """One spike from birth to death. Block numbers count from 0; magnitudes are absolute values.

    `members`: indices of its tokens among the calibration tokens (columns of TokenStats).
    `birth` is the last block at which tokens join, the definitive site of detection; `early` are
    the sites before it, by block. `death` is the block that cancels the largest part; `end` the
    last block in which its tokens still stand out. A spike that nobody cancels has `death` None and
    ends at the last block.
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
    early: tuple[EarlySite, ...] = ()

    @property
    def insert_blocks(self) -> range:
        """Blocks whose norms read a residual that carries the spike of all members."""
        return range(self.birth + 1, self.end + 1)

    @property
    def detections(self) -> list[tuple[int, np.ndarray]]:
        """`(block, members first caught there)` of every site of detection, in order."""
        early = [(site.block, site.members) for site in self.early]
        caught = [members for _, members in early]
        rest = np.setdiff1d(self.members, np.concatenate(caught)) if caught else self.members
        return [*early, (self.birth, rest)]

    def scopes(self, sites: Sites) -> list[tuple[set[str], np.ndarray]]:
        """Per site of detection: the products whose inputs may carry the spike, and of whom.

        Node names from the site's down-projection to the one before the next site's; members caught
        so far.
        """
        starts = [block for block, _ in self.detections]
        found, scopes = self.members[:0], []
        for (start, members), end in zip(self.detections, [*starts[1:], self.end + 1], strict=True):
            found = np.union1d(found, members)
            inside = [sites.blocks[start].mlp.output]
            for block in sites.blocks[start + 1 : min(end + 1, self.end + 1)]:
                inside += [*block.attention.linears, *block.mlp.inputs]
                inside += [block.mlp.output] * (block.index < end)
            scopes.append(({linear.node for linear in inside}, found))
        return scopes

    def scope(self, sites: Sites) -> set[str]:
        """Node names of the products whose inputs may carry the spike of any member."""
        return {node for nodes, _ in self.scopes(sites) for node in nodes}

    def common_tokens(self, stats: TokenStats, most: int = 5) -> list[tuple[int, int, int]]:
        """The most frequent members: `(token id, times at position 0, times elsewhere)`."""
        counts: Counter[int] = Counter(stats.token[self.members].tolist())
        first = Counter(stats.token[i].item() for i in self.members if stats.position[i] == 0)
        return [(t, first[t], n - first[t]) for t, n in counts.most_common(most)]


def discover(stats: TokenStats, *, alpha: float = 64.0) -> list[Lifecycle]:
    """Find all lifecycles; an empty list if nothing spikes.

    A token spikes at a block if its down-projection input exceeds `alpha` times the median token's
    (method.md step 1; 64 is the published peers' value). A group of spiking tokens whose residual
    jumps is a birth; one whose residual does not is the death of an earlier group. Births of
    different tokens that share channel and death are one lifecycle. If most tokens spike, the
    median is the spike itself and there is no lifecycle by construction.
    """
    found: list[Lifecycle] = []
    for block in range(stats.down_max.shape[0]):
        members = np.flatnonzero(_grown(stats, block, alpha))
        if not members.size:
            continue
        channel = _mode(stats.residual_channel[block, members])
        _add_birth(found, stats, block, members, channel)
    return [_with_early_site(life, stats, alpha * _EARLY_SHARE, found) for life in found]


def everyone_spikes(stats: TokenStats, *, alpha: float = 64.0) -> list[int]:
    """Blocks at which most tokens spike, so that none can be told from the others.

    The median token's down-projection input there exceeds `alpha` times that of a calm block: the
    lower quartile of all.
    """
    median = np.median(stats.down_max, axis=1)
    calm = float(np.quantile(median, 0.25, method="lower"))
    return np.flatnonzero(median > alpha * max(calm, 1e-12)).tolist()


def _spiking(stats: TokenStats, block: int, alpha: float) -> np.ndarray:
    """Bool `[tokens]`: whose down-projection input exceeds `alpha` times the median token's."""
    median = float(np.median(stats.down_max[block]))
    return stats.down_max[block] > alpha * max(median, 1e-12)


def _grown(stats: TokenStats, block: int, alpha: float) -> np.ndarray:
    """Bool `[tokens]`: who spikes at `block` and has a residual that jumped there."""
    jumped = _before(stats, block) * _BIRTH_GROWTH < stats.residual_max[block]
    return _spiking(stats, block, alpha) & jumped


def _before(stats: TokenStats, block: int) -> np.ndarray:
    """Residual magnitude before the block; before block 0 nothing is known, so any spike is new."""
    if block == 0:
        return np.zeros(stats.down_max.shape[1], np.float32)
    return stats.residual_max[block - 1]


def _mode(values: np.ndarray) -> int:
    return Counter(values.tolist()).most_common(1)[0][0]


def _add_birth(
    found: list[Lifecycle], stats: TokenStats, block: int, members: np.ndarray, channel: int
) -> None:
    """A lifecycle of its own, or later members of one that lives; no birth of who carries it."""
    for number, life in enumerate(found):
        if life.channel != channel or block > life.end:
            continue
        carried = np.isin(members, life.members)
        carried &= stats.residual_channel[block - 1, members] == channel
        fresh = members[~carried]
        alone = _follow(stats, [(block, fresh)], channel) if fresh.size else None
        if alone is not None and (alone.death, alone.end) == (life.death, life.end):
            joined = _follow(stats, [*life.detections, (block, fresh)], channel)
            if _tells_apart(stats, joined):
                found[number] = joined
                return
        if carried.mean() > 0.5:
            return
    found.append(_follow(stats, [(block, members)], channel))


def _with_early_site(
    life: Lifecycle, stats: TokenStats, alpha: float, others: Sequence[Lifecycle]
) -> Lifecycle:
    """Add the block before the first site, if tokens that spike less there carry on from it.

    Those tokens leave the later sites, where they may not spike. A block in which another life of
    the same channel ends is not looked at.
    """
    (first, _), *_ = life.detections
    block = first - 1
    if block < 0 or any(o is not life and o.end >= block >= o.birth for o in others):
        return life
    calm = _RESIDUAL_EXCESS * np.median(stats.residual_max, axis=1)
    carries = _grown(stats, block, alpha)
    for later in range(block, first + 1):
        carries &= stats.residual_channel[later] == life.channel
        carries &= stats.residual_max[later] > calm[later]
    early = np.flatnonzero(carries)
    if not early.size:
        return life
    later_sites = [(b, np.setdiff1d(members, early)) for b, members in life.detections]
    births = [(block, early), *(site for site in later_sites if site[1].size)]
    extended = _follow(stats, births, life.channel)
    return extended if _tells_apart(stats, extended) else life


def _tells_apart(stats: TokenStats, life: Lifecycle) -> bool:
    """Whether the sinks of every site stand well above all tokens that are none by then."""
    caught = life.members[:0]
    for block, members in life.detections:
        caught = np.union1d(caught, members)
        others = np.delete(stats.down_max[block], caught)
        if stats.down_max[block, members].min() < _SITE_GAP * others.max(initial=0):
            return False
    return True


def _follow(stats: TokenStats, births: Sequence[tuple[int, np.ndarray]], channel: int) -> Lifecycle:
    """Track the written channel of the members of all `births` (block, members) to the end."""
    blocks = stats.down_max.shape[0]
    birth = births[-1][0]
    members = np.sort(np.concatenate([group for _, group in births]))
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
    starts = np.flatnonzero(stats.position == 0)
    clamp: list[int] = []
    detected: list[EarlySite] = []
    found = members[:0]
    for (block, group), until in zip(births, [*(b for b, _ in births[1:]), end + 1], strict=True):
        threshold = threshold_between(stats.down_max[block], group, found)
        found = np.union1d(found, group)
        clamp += _stretched(stats, found, range(block, until))
        force = bool(np.isin(starts, found).mean() >= _FIRST_RATE)
        detected.append(EarlySite(block, threshold, force, group))
    *early, definitive = detected
    return Lifecycle(
        birth=birth,
        death=death,
        end=end,
        channel=channel,
        threshold=definitive.threshold,
        force_first=definitive.force_first,
        clamp_blocks=tuple(clamp),
        members=members,
        down_peak=float(stats.down_max[births[0][0] : birth + 1, members].max()),
        down_median=float(np.median(stats.down_max[birth])),
        residual_peak=float(carried[birth : end + 1].max()),
        first_rate=float(np.isin(starts, members).mean()),
        early=tuple(early),
    )


def _stretched(stats: TokenStats, members: np.ndarray, blocks: range) -> list[int]:
    """The first of `blocks`, where `members` spike, and where else they stretch the range."""
    semantic = np.ones(stats.down_max.shape[1], bool)
    semantic[members] = False
    top = {b: float(stats.down_max[b, semantic].max(initial=0)) for b in blocks}
    peak = {b: float(stats.down_max[b, members].max()) for b in blocks}
    return [b for b in blocks if b == blocks.start or peak[b] > _CLAMP_EXCESS * top[b]]


def threshold_between(
    down_max: np.ndarray, members: np.ndarray, caught: np.ndarray | None = None
) -> float:
    """tau: the geometric middle between the largest semantic and the smallest sink magnitude.

    A decode step sees one token, so the deployed threshold is a constant (method.md step 2). What
    an earlier site has `caught` is neither.
    """
    semantic = np.ones(down_max.size, bool)
    semantic[members] = False
    if caught is not None:
        semantic[caught] = False
    top = float(down_max[semantic].max()) if semantic.any() else 0.0
    bottom = float(down_max[members].min())
    return float(np.sqrt(max(top, 1e-6) * bottom)) if top < bottom else bottom
