"""Discover the lifecycles of spikes from data: who is born where, and where it dies.

Emergence, persistence and disappearance are the three phases of InsertQuant (arXiv 2606.02288).
No block number and no ratio is assumed: a lifecycle is a few tokens whose residual leaves the
others', stays away from them and comes back. Where the others end is read from the gap in the data
(`leaving`), block by block. The down-projection of the block in which they leave, or the norm
behind it, has written the spike, however large its input is.

Detection is progressive: tokens that leave before the others are caught at an early site, the rest
at the birth; what an early site caught stays caught. At run time a site looks at the input of its
down-projection; `separable` tells whether a constant threshold there finds the tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iq_export.graph.sites import Block, Linear, Sites
from iq_export.observe.token_stats import TokenStats

# Tokens within this factor of the median token are like all others: none of them has left, and a
# lifecycle has ended where its tokens are back there.
_CALM = 8.0
# Who leaves is an order of magnitude away, as a group.
_ORDER = 10.0
# Between the group and the others is a gap of at least this factor, but for a tenth of the group's
# number on either side of it: tokens in between are few, not none.
_GAP = 2.0
_STRAGGLERS = 10
# A birth at least doubles the residual's largest value of its tokens; what was loud all along is
# none.
_BIRTH_GROWTH = 2.0
# The block that takes away at least this share of the spike is its death.
_DEATH_SHARE = 0.25
# Sinks of a block are clamped where they alone stretch the down-projection's range.
_CLAMP_EXCESS = 1.5
# Position 0 is forced into the set if it spikes in at least this share of the windows.
_FIRST_RATE = 0.95
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
    last block in which its tokens still stand out: the birth itself, if the norm that the stream
    passes behind it leaves too little. A spike that nobody cancels has `death` None and ends at the
    last block. `separable`: whether at every site of detection all of its tokens have a
    larger down-projection input than all others, so that `threshold` finds them at run time.
    `stays`: whether they still stand out behind `end`, which is the last block then (not kept in a
    bundle, where what is inserted is named).
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
    separable: bool = True
    stays: bool = False

    def same(self, other: Lifecycle) -> bool:
        """Whether it is that lifecycle, of the same tokens: one may have been read from a file."""
        mine, its = (self.birth, self.end, self.channel), (other.birth, other.end, other.channel)
        return mine == its and np.array_equal(self.members, other.members)

    @property
    def insert_blocks(self) -> range:
        """Blocks whose norms read a residual that carries the spike of all members."""
        return range(self.birth + 1, self.end + 1)

    def behind(self, block: int) -> bool:
        """Whether the spike, once born, stands in the residual behind the MLP of `block`."""
        return block < self.end or self.stays

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
            first = sites.blocks[start]
            inside = [*first.mlp.outputs, *_after(first)]
            for block in sites.blocks[start + 1 : min(end + 1, self.end + 1)]:
                inside += [*block.attention.linears, *block.mlp.inputs, *block.mlp.widening]
                inside += block.mlp.outputs if block.index < end else ()
                inside += _after(block) * (block.index < end and self.behind(block.index))
            scopes.append(({linear.node for linear in inside}, found))
        return scopes

    def scope(self, sites: Sites) -> set[str]:
        """Node names of the products whose inputs may carry the spike of any member."""
        return {node for nodes, _ in self.scopes(sites) for node in nodes}

    def common_tokens(self, stats: TokenStats, most: int = 5) -> list[tuple[int, int, int]]:
        """The most frequent members: `(token id, times at position 0, times elsewhere)`; none where
        rows are no tokens."""
        counts: Counter[int] = Counter(t for t in stats.token[self.members].tolist() if t >= 0)
        first = Counter(stats.token[i].item() for i in self.members if stats.position[i] == 0)
        return [(t, first[t], n - first[t]) for t, n in counts.most_common(most)]


def leaving(sizes: np.ndarray, typical: float | None = None) -> np.ndarray:
    """Int `[n]`: who leaves the others, by the gap in log magnitude. `sizes`: `[n]`, not negative.

    0 is who does not; groups one above the other are numbered from 1, by the width of their gap.

    `typical` is the size of the others, their median by default. A group leaves if its smallest is
    not calm (_CALM times that), half of it an order of magnitude away and a gap below it,
    stragglers aside. A tail without a gap leaves nobody.
    """
    found = np.zeros(sizes.size, np.int64)
    order = np.argsort(-sizes, kind="stable")
    usual = float(np.median(sizes)) if typical is None else typical
    level = np.log(np.maximum(sizes[order], 1e-30) / max(usual, 1e-30))
    while level.size > 1:
        size = np.arange(1, level.size)  # of the group, if the cut is behind its last
        spared = size // _STRAGGLERS
        inside, outside = level[size - 1 - spared], level[np.minimum(size + spared, level.size - 1)]
        possible = (inside > np.log(_CALM)) & (level[size // 2] > np.log(_ORDER))
        gap = np.where(possible, inside - outside, 0.0)
        best = int(gap.argmax())
        if gap[best] < np.log(_GAP):
            break
        around = slice(size[best] - spared[best], size[best] + spared[best] + 1)
        cut = around.start + int(
            (level[around.start - 1 : around.stop - 1] - level[around]).argmax()
        )
        found[order[:cut]] = found.max() + 1
        order, level = order[cut:], level[cut:]
    return found


def discover(stats: TokenStats) -> list[Lifecycle]:
    """Find all lifecycles; an empty list if nothing spikes.

    Per block, the tokens that leave the others and whose residual has grown are a birth. Births of
    different tokens that share channel and death are one lifecycle. If most tokens spike, the
    median is the spike itself and there is no lifecycle by construction.
    """
    found: list[Lifecycle] = []
    # The least that each token had since it last carried a spike: what has not grown is not born.
    least = np.zeros(stats.token.size) if stats.embedded is None else stats.embedded
    for block, residual in enumerate(stats.residual_max):
        carrying = np.zeros(residual.size, bool)
        for life in found:
            if block <= life.end:
                carrying[life.members] |= (
                    stats.residual_channel[block, life.members] == life.channel
                )
        free = np.flatnonzero(~carrying)
        group = np.zeros(residual.size, np.int64)
        group[free] = leaving(residual[free], float(np.median(residual))) if free.size else 0
        born = np.flatnonzero((group > 0) & (residual > _BIRTH_GROWTH * least))
        for members in _by_channel(stats, block, born):
            for together in _by_group(stats, block, members, group[members]):
                _add_birth(found, stats, block, together)
        least = np.minimum(least, residual)
        for life in found:
            if block == life.end:
                least[life.members] = residual[life.members]
    return found


def everyone_spikes(stats: TokenStats) -> list[int]:
    """Blocks at which most tokens spike, so that none can be told from the others.

    The median token's down-projection input there leaves that of a calm block, the lower quartile
    of all, and what it writes or takes away changes the median token's residual.
    """
    median = np.median(stats.down_max, axis=1)
    calm = float(np.quantile(median, 0.25, method="lower"))
    residual = np.log(np.maximum(np.median(stats.residual_max, axis=1), 1e-30))
    changed = np.abs(np.diff(residual, prepend=-np.inf)) > np.log(_BIRTH_GROWTH)
    return np.flatnonzero((leaving(median, calm) > 0) & changed).tolist()


def _by_channel(stats: TokenStats, block: int, born: np.ndarray) -> list[np.ndarray]:
    """Tokens born at one block, apart where they carry the spike on channels that end apart."""
    if not born.size:
        return []
    channels = stats.residual_channel[block, born]
    (main, most), *rest = Counter(channels.tolist()).most_common()
    whole = _follow(stats, [(block, born[channels == main])], main)
    groups = [born[channels == main]]
    for channel, number in rest:
        own = born[channels == channel]
        alone = _follow(stats, [(block, own)], channel)
        same = (alone.death, alone.end) == (whole.death, whole.end)
        if same or number * _STRAGGLERS < most:
            groups[0] = np.union1d(groups[0], own)
        else:
            groups.append(own)
    return groups


def _by_group(
    stats: TokenStats, block: int, members: np.ndarray, group: np.ndarray
) -> list[np.ndarray]:
    """All together, unless a lower group would keep those above it from being found at run time."""
    found: list[np.ndarray] = []
    for number in np.unique(group):
        own = members[group == number]
        together = np.union1d(found[-1], own) if found else own
        if found and (_told(stats, block, together) or not _told(stats, block, found[-1])):
            found[-1] = together
        else:
            found.append(own)
    return found


def _told(stats: TokenStats, block: int, members: np.ndarray) -> bool:
    """Whether a threshold at `block` tells `members`, or most of them, from all others."""
    seen = _seen(stats, block, members, members[:0])
    down = stats.down_max[block]
    return bool(down[seen].min() > np.delete(down, seen).max(initial=0))


def _mode(values: np.ndarray) -> int:
    return Counter(values.tolist()).most_common(1)[0][0]


def _add_birth(found: list[Lifecycle], stats: TokenStats, block: int, members: np.ndarray) -> None:
    """A lifecycle of its own, or later members of one that lives."""
    channel = _mode(stats.residual_channel[block, members])
    fresh = members
    for number, life in enumerate(found):
        if life.channel != channel or not life.birth < block <= life.end:
            continue
        # Beside a spike that lives, who only drifts away from the others is no birth.
        before = stats.residual_max[block - 1, members]
        fresh = members[stats.residual_max[block, members] > _BIRTH_GROWTH * before]
        if not fresh.size:
            return
        alone = _follow(stats, [(block, fresh)], channel)
        if alone.death == life.death:
            seen = _seen(stats, block, fresh, life.members)
            joined = _follow(stats, [*life.detections, (block, seen)], channel)
            if _tells_apart(stats, joined):
                found[number] = joined
                return
    life = _follow(stats, [(block, _seen(stats, block, fresh, fresh[:0]))], channel)
    overtaken = life.death is None and life.end == block + 1 < len(stats.down_max) - 1
    if not overtaken:  # it stays
        found.append(life)


def _seen(stats: TokenStats, block: int, members: np.ndarray, caught: np.ndarray) -> np.ndarray:
    """The `members` that a threshold on the down-projection's input finds, if it is most of them.

    Few whose input is no larger than that of other tokens would keep all of them from being found;
    they stay what they are. Those `caught` before count neither way.
    """
    down = stats.down_max[block]
    others = float(np.delete(down, np.union1d(members, caught)).max(initial=1e-30))
    order = members[np.argsort(-down[members], kind="stable")]
    size = np.arange(members.size - members.size // _STRAGGLERS, members.size + 1)
    below = np.maximum(np.append(down[order], 0)[size], others)
    gap = down[order[size - 1]] / below
    best = gap.size - 1 if gap[-1] >= _SITE_GAP else int(gap.argmax())
    return np.sort(order[: size[best]]) if gap[best] > 1 else members


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
    written = _carried(stats.residual_max, stats.residual_channel, members, channel)
    carried = _carried(*stats.onward, members, channel)
    typical = np.median(stats.onward[0], axis=1)
    calm = np.flatnonzero(carried[birth:] < _CALM * typical[birth:])
    # The same channel of the same tokens may spike again later: only the first life counts.
    end = birth + int(calm[0]) if calm.size else blocks - 1
    # The first drop is that of a norm that the stream passes.
    drops = np.append(written[birth], carried[birth:end]) - carried[birth : end + 1]
    death: int | None = None
    if drops.max() > _DEATH_SHARE * max(written[birth], carried[birth : end + 1].max()):
        death = birth + int(drops.argmax())
    starts = stats.starts
    clamp: list[int] = []
    detected: list[EarlySite] = []
    separable = True
    found = members[:0]
    for (block, group), until in zip(births, [*(b for b, _ in births[1:]), end + 1], strict=True):
        threshold = threshold_between(stats.down_max[block], group, found)
        found = np.union1d(found, group)
        others = np.delete(stats.down_max[block], found)
        separable &= bool(others.max(initial=0) < threshold)
        clamp += _stretched(stats, found, range(block, until))
        force = _share(starts, found) >= _FIRST_RATE
        detected.append(EarlySite(block, threshold, force, group))
    *early, definitive = detected
    return Lifecycle(
        birth=birth,
        death=death,
        end=end,
        stays=not calm.size,
        channel=channel,
        threshold=definitive.threshold,
        force_first=definitive.force_first,
        clamp_blocks=tuple(clamp),
        members=members,
        down_peak=float(stats.down_max[births[0][0] : birth + 1, members].max()),
        down_median=float(np.median(stats.down_max[birth])),
        residual_peak=float(written[birth : end + 1].max()),
        first_rate=_share(starts, members),
        early=tuple(early),
        separable=separable,
    )


def _share(starts: np.ndarray, members: np.ndarray) -> float:
    """Of first tokens, those that are among `members`."""
    return float(np.isin(starts, members).mean()) if starts.size else 0.0


def _carried(
    sizes: np.ndarray, channels: np.ndarray, members: np.ndarray, channel: int
) -> np.ndarray:
    """Per block, what the median of `members` has on `channel`, where that is its largest."""
    on_channel = channels[:, members] == channel
    return np.median(np.where(on_channel, sizes[:, members], 0.0), axis=1)


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

    A decode step sees one token, so the deployed threshold is a constant. What an earlier site has
    `caught` is neither.
    """
    semantic = np.ones(down_max.size, bool)
    semantic[members] = False
    if caught is not None:
        semantic[caught] = False
    top = float(down_max[semantic].max()) if semantic.any() else 0.0
    bottom = float(down_max[members].min())
    return float(np.sqrt(max(top, 1e-6) * bottom)) if top < bottom else bottom


def _after(block: Block) -> list[Linear]:
    """The products of the branches behind the MLP."""
    return [linear for branch in block.after for linear in branch.linears]
