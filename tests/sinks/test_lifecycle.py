"""Births and deaths are read from statistics; most cases are drawn by hand, one is a real graph."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from iq_export.observe.token_stats import TokenStats
from iq_export.sinks.lifecycle import Lifecycle, discover, everyone_spikes, threshold_between
from tests.planted import DELIMITER, Planted

BLOCKS, WINDOWS, LENGTH = 8, 20, 10
TOKENS = WINDOWS * LENGTH
FIRST = np.arange(0, TOKENS, LENGTH)


@dataclass(frozen=True)
class Drawn:
    """A spike to draw: the down-projection input peaks at `birth` and `death`, the residual carries
    `size` on `channel` from `birth` until the block before `death`."""

    birth: int
    death: int | None
    members: np.ndarray
    channel: int = 3
    size: float = 1000.0
    peak: float = 500.0


def stats_with(*spikes: Drawn) -> TokenStats:
    """Quiet tokens (down-projection input 1, residual 3 on channel 0) with spikes drawn in."""
    rng = np.random.default_rng(0)
    shape = (BLOCKS, TOKENS)
    down = rng.uniform(0.8, 1.2, shape).astype(np.float32)
    residual = rng.uniform(2.5, 3.5, shape).astype(np.float32)
    channel = np.zeros(shape, np.int32)
    for spike in spikes:
        end = BLOCKS if spike.death is None else spike.death
        down[spike.birth, spike.members] = spike.peak
        if spike.death is not None:
            down[spike.death, spike.members] = spike.peak
        residual[spike.birth : end, spike.members] = spike.size
        channel[spike.birth : end, spike.members] = spike.channel
    return TokenStats(
        down_max=down,
        residual_max=residual,
        residual_channel=channel,
        window=np.repeat(np.arange(WINDOWS), LENGTH),
        position=np.tile(np.arange(LENGTH), WINDOWS),
        token=np.arange(TOKENS) % 17,
    )


def only(found: list[Lifecycle]) -> Lifecycle:
    assert len(found) == 1
    return found[0]


def test_birth_death_end_channel_and_threshold() -> None:
    life = only(discover(stats_with(Drawn(birth=2, death=6, members=FIRST))))
    assert (life.birth, life.death, life.end, life.channel) == (2, 6, 6, 3)
    np.testing.assert_array_equal(life.members, FIRST)
    assert life.down_peak == 500
    assert life.down_median == pytest.approx(1, abs=0.1)
    assert life.residual_peak == 1000
    assert life.threshold == pytest.approx(np.sqrt(500 * 1.2), rel=0.01)
    assert list(life.insert_blocks) == [3, 4, 5, 6]
    assert life.clamp_blocks == (2, 6)
    assert life.force_first
    assert life.first_rate == 1


def test_no_spikes_no_lifecycles() -> None:
    assert discover(stats_with()) == []


@pytest.mark.parametrize("size", [30, 100, 1000, 30_000])
@pytest.mark.parametrize("peak", [1.0, 3.0, 61.0, 500.0])
def test_the_residual_decides_what_spikes(size: float, peak: float) -> None:
    """Whatever the down-projection's input is; that only tells whether a threshold finds it."""
    life = only(discover(stats_with(Drawn(2, 6, FIRST, size=size, peak=peak))))
    assert (life.birth, life.death, life.channel) == (2, 6, 3)
    np.testing.assert_array_equal(life.members, FIRST)
    assert life.separable == (peak > 1)


@pytest.mark.parametrize("times", [3.0, 8.0])
def test_moderately_louder_tokens_are_no_spike(times: float) -> None:
    assert discover(stats_with(Drawn(2, 6, FIRST, size=3 * times))) == []


def test_a_tail_without_a_gap_is_no_spike() -> None:
    """Every loudness up to 30 times the median: nobody leaves the others."""
    stats = stats_with()
    tail = np.arange(40)
    stats.residual_max[2:6, tail] = np.geomspace(4, 90, 40)
    assert discover(stats) == []


def test_few_stragglers_in_the_gap_do_not_hide_a_spike() -> None:
    """And what no threshold finds does not keep the others from being found."""
    members = np.arange(60)
    stats = stats_with(Drawn(2, 6, members))
    stats.residual_max[2:6, 100:104] = np.array([20, 40, 100, 300])
    stats.residual_channel[2:6, 100:104] = 3
    life = only(discover(stats))
    np.testing.assert_array_equal(life.members, members)
    assert life.separable


def test_what_is_loud_from_the_embedding_on_is_not_born() -> None:
    stats = stats_with(Drawn(0, None, FIRST))
    loud = np.full(TOKENS, 3.0)
    loud[FIRST] = 900
    assert discover(replace(stats, embedded=loud)) == []
    assert only(discover(replace(stats, embedded=np.full(TOKENS, 3.0)))).birth == 0


def test_what_the_others_overtake_at_once_does_not_stay() -> None:
    """Loud at one block, and at the next all others are as loud."""
    stats = stats_with(Drawn(2, None, FIRST, size=100))
    stats.residual_max[3:] = 100
    assert discover(stats) == []


def test_sizes_do_not_matter_ratios_do() -> None:
    stats = stats_with(Drawn(2, 6, FIRST))
    for factor in (1e-4, 1e4):
        scaled = replace(
            stats, down_max=stats.down_max * factor, residual_max=stats.residual_max * factor
        )
        life = only(discover(scaled))
        assert (life.birth, life.death, life.members.size) == (2, 6, WINDOWS)


def test_spikes_of_several_sizes_leave_together() -> None:
    """Groups one above the other, each with a gap below it."""
    stats = stats_with(Drawn(2, 6, FIRST, size=100), Drawn(2, 6, FIRST + 4, size=30_000))
    life = only(discover(stats))
    np.testing.assert_array_equal(life.members, np.union1d(FIRST, FIRST + 4))


def test_a_lower_group_that_no_threshold_finds_does_not_hide_the_upper_one() -> None:
    low = FIRST[:15] + 4
    stats = stats_with(Drawn(2, 6, FIRST, size=30_000), Drawn(2, 6, low, size=100, peak=1.0))
    upper, lower = discover(stats)
    np.testing.assert_array_equal(upper.members, FIRST)
    np.testing.assert_array_equal(lower.members, low)
    assert (upper.separable, lower.separable) == (True, False)
    assert upper.birth == lower.birth == 2


def test_births_of_one_block_that_die_apart_are_two_lifecycles() -> None:
    found = discover(stats_with(Drawn(2, 4, FIRST), Drawn(2, 6, FIRST + 4, channel=9)))
    assert [(life.birth, life.death, life.channel) for life in found] == [(2, 4, 3), (2, 6, 9)]


def test_blocks_at_which_everyone_spikes() -> None:
    stats = stats_with(Drawn(2, 6, np.arange(TOKENS)))
    assert everyone_spikes(stats) == [2, 6]
    assert everyone_spikes(stats_with(Drawn(2, 6, FIRST))) == []
    quiet = stats_with()
    quiet.down_max[6:] *= 30  # and nothing of it reaches the residual
    assert everyone_spikes(quiet) == []


def test_all_tokens_spiking_is_no_lifecycle() -> None:
    """Then the median token is a spike itself."""
    assert discover(stats_with(Drawn(2, 6, np.arange(TOKENS)))) == []


def test_large_input_that_writes_nothing_is_no_birth() -> None:
    """A death alone: the residual of its tokens does not grow."""
    stats = stats_with()
    stats.down_max[4, FIRST] = 500
    assert discover(stats) == []


def test_birth_at_the_first_block() -> None:
    life = only(discover(stats_with(Drawn(0, 5, FIRST))))
    assert (life.birth, life.death) == (0, 5)


def test_spike_that_nobody_cancels() -> None:
    life = only(discover(stats_with(Drawn(3, None, FIRST))))
    assert life.death is None
    assert life.end == BLOCKS - 1


def test_gradual_death_ends_where_the_tokens_are_calm() -> None:
    """Cancelled in two steps: the larger is the death, the later the end."""
    stats = stats_with(Drawn(1, 4, FIRST))
    stats.residual_max[4:6, FIRST] = 100
    stats.residual_channel[4:6, FIRST] = 3
    life = only(discover(stats))
    assert (life.death, life.end) == (4, 6)


def test_two_lifecycles_one_after_the_other_on_one_channel() -> None:
    found = discover(stats_with(Drawn(0, 2, FIRST), Drawn(4, 7, FIRST)))
    assert [(life.birth, life.death, life.end) for life in found] == [(0, 2, 2), (4, 7, 7)]
    assert {life.channel for life in found} == {3}


def test_two_lifecycles_at_once_on_two_channels() -> None:
    later = FIRST + 5
    found = discover(stats_with(Drawn(1, 4, FIRST), Drawn(2, 6, later, channel=9)))
    assert [(life.birth, life.death, life.channel) for life in found] == [(1, 4, 3), (2, 6, 9)]
    np.testing.assert_array_equal(found[1].members, later)


def test_growth_of_a_living_spike_is_no_second_birth() -> None:
    """Born small and tripled by the next block, as in SmolLM2's blocks 1 and 2."""
    stats = stats_with(Drawn(1, 6, FIRST, size=300))
    stats.down_max[2, FIRST] = 500
    stats.residual_max[2:6, FIRST] = 1000
    assert only(discover(stats)).birth == 1


def test_rare_first_tokens_do_not_force_position_0() -> None:
    life = only(discover(stats_with(Drawn(2, 6, FIRST[: WINDOWS // 2]))))
    assert life.first_rate == 0.5
    assert not life.force_first


def test_sinks_are_clamped_only_where_they_stretch_the_range() -> None:
    stats = stats_with(Drawn(2, 6, FIRST))
    stats.down_max[4, FIRST] = 1.3  # no more than other tokens have
    stats.down_max[5, FIRST] = 3.0
    assert only(discover(stats)).clamp_blocks == (2, 5, 6)


def test_common_tokens_count_first_and_later_places() -> None:
    stats = stats_with(Drawn(2, 6, np.sort(np.concatenate([FIRST, FIRST + 4]))))
    stats.token[FIRST], stats.token[FIRST + 4] = 1, 2
    stats.token[FIRST[0] + 4] = 1
    life = only(discover(stats))
    assert life.common_tokens(stats) == [(1, 20, 1), (2, 0, 19)]
    assert life.common_tokens(stats, most=1) == [(1, 20, 1)]


def test_threshold_lies_between_sinks_and_others() -> None:
    members = np.array([1])
    assert threshold_between(np.float32([4, 100, 1]), members) == pytest.approx(20)
    # Where they overlap no constant separates them: every sink is still found.
    assert threshold_between(np.float32([4, 3, 1]), members) == pytest.approx(3)
    assert threshold_between(np.float32([7]), np.array([0])) > 0


def test_planted_lifecycle_is_found(spiky: Planted) -> None:
    (spike,) = spiky.decoder.spikes
    life = only(spiky.lifecycles)
    assert (life.birth, life.death, life.channel) == (spike.birth, spike.death, spike.channel)
    np.testing.assert_array_equal(life.members, np.flatnonzero(spiky.stats.position == 0))
    assert life.residual_peak == pytest.approx(spike.size, rel=0.01)
    assert life.force_first


def test_planted_delimiters_are_members_wherever_they_stand(delimited: Planted) -> None:
    life = only(delimited.lifecycles)
    stats = delimited.stats
    expected = (stats.position == 0) | (stats.token == DELIMITER)
    np.testing.assert_array_equal(life.members, np.flatnonzero(expected))
    token, first, later = life.common_tokens(stats, most=1)[0]
    assert (token, first) == (DELIMITER, 0)
    assert later > 20


def test_model_without_spikes(calm: Planted) -> None:
    assert calm.lifecycles == []


def test_scope_is_where_the_spike_lives(spiky: Planted) -> None:
    """From the down-projection of the birth to the end; what comes before and after is ordinary."""
    scope = only(spiky.lifecycles).scope(spiky.sites)
    inside = {linear.node for block in spiky.sites.blocks[2:4] for branch in
              block.branches for linear in branch.linears}  # fmt: skip
    assert scope == inside | {"layers.1/mlp/down_proj"}


def test_births_of_different_tokens_are_one_lifecycle() -> None:
    """Same channel, same death: the later tokens join at the definitive site."""
    later = FIRST + 5
    life = only(discover(stats_with(Drawn(1, 6, FIRST), Drawn(3, 6, later))))
    assert (life.birth, life.death, life.end) == (3, 6, 6)
    (early,) = life.early
    assert (early.block, early.force_first) == (1, True)
    np.testing.assert_array_equal(early.members, FIRST)
    np.testing.assert_array_equal(life.members, np.union1d(FIRST, later))
    np.testing.assert_array_equal(life.detections[-1][1], later)
    assert life.clamp_blocks == (1, 3, 6)


def test_births_that_die_apart_are_two_lifecycles() -> None:
    found = discover(stats_with(Drawn(1, 4, FIRST), Drawn(2, 7, FIRST + 5)))
    assert [(life.birth, life.death, life.early) for life in found] == [(1, 4, ()), (2, 7, ())]


def test_what_spikes_less_before_the_birth_is_caught_early() -> None:
    """Its input may be small, if its tokens leave there and go on to carry the spike."""
    stats = stats_with(Drawn(3, 6, FIRST[5:]))
    stats.down_max[2, FIRST[:5]], stats.down_max[2, FIRST + 7] = 40, 18
    stats.residual_max[2:6, FIRST[:5]], stats.residual_channel[2:6, FIRST[:5]] = 1000, 3
    life = only(discover(stats))
    (early,) = life.early
    assert early.block == 2
    np.testing.assert_array_equal(early.members, FIRST[:5])
    np.testing.assert_array_equal(life.members, FIRST)
    assert not early.force_first and life.force_first


def test_an_early_site_without_a_gap_is_none() -> None:
    """No constant threshold would tell its tokens from others: they are a lifecycle of their own,
    found and not separable, and do not keep the later one from being replaced."""
    stats = stats_with(Drawn(3, 6, FIRST[5:]))
    stats.down_max[2, FIRST[:5]] = stats.down_max[2, FIRST + 7] = 40
    stats.residual_max[2:6, FIRST[:5]], stats.residual_channel[2:6, FIRST[:5]] = 1000, 3
    early, life = discover(stats)
    assert (early.birth, early.separable) == (2, False)
    np.testing.assert_array_equal(early.members, FIRST[:5])
    assert (life.birth, life.early, life.separable) == (3, (), True)
    np.testing.assert_array_equal(life.members, FIRST[5:])


def test_births_that_no_threshold_parts_stay_two_lifecycles() -> None:
    stats = stats_with(Drawn(1, 6, FIRST), Drawn(3, 6, FIRST + 5))
    stats.down_max[3, FIRST + 2] = 400
    assert [(life.birth, life.early) for life in discover(stats)] == [(1, ()), (3, ())]


def test_an_early_sink_does_not_raise_the_later_threshold() -> None:
    """Its magnitude at the definitive site says nothing: it is caught already."""
    stats = stats_with(Drawn(1, 6, FIRST), Drawn(3, 6, FIRST + 5))
    stats.down_max[3, FIRST] = 30
    life = only(discover(stats))
    assert life.threshold == pytest.approx(np.sqrt(500 * 1.2), rel=0.01)
