"""What is measured on held-out text: found, matched, and against the order of appearance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iq_export.decide.matching import MatchQuality, measure, sink_warnings, summarise
from iq_export.observe.token_stats import observe_tokens
from iq_export.passes.insert_sinks import index_name
from iq_export.progress import Progress
from tests import planted
from tests.planted import CPU, DELIMITER, Planted

QUIET = {"providers": CPU, "progress": Progress(quiet=True)}


@pytest.fixture(scope="module", params=["delimited", "staggered"])
def data(request: pytest.FixtureRequest) -> Planted:
    return request.getfixturevalue(request.param)


def quality(data: Planted, windows: list) -> MatchQuality:
    stats = observe_tokens(data.path, data.sites, windows, **QUIET)
    (found,) = measure(
        data.path, data.inserted, [index_name(0)], data.sites, data.sinks, stats, windows,
        **QUIET,
    )  # fmt: skip
    return found


def test_all_sinks_are_found_and_matched(data: Planted) -> None:
    windows = planted.windows(data.decoder, count=10, seed=77)
    found = quality(data, windows)
    delimiters = sum(window.ids.count(DELIMITER) for window in windows)
    assert found.tokens == 400
    assert found.sinks == found.detected == found.both == delimiters
    assert (found.precision, found.recall, found.agreement) == (1, 1, 1)
    assert sorted(found.template_tokens) == [10, delimiters]
    assert found.unmatched == []


def test_a_template_without_sinks_is_reported(data: Planted) -> None:
    windows = planted.windows(replace(data.decoder, spikes=data.decoder.spikes[:1]), seed=77)
    plain = [w for w in windows if DELIMITER not in w.ids]
    found = quality(data, plain)
    assert (found.sinks, found.recall, found.precision) == (0, None, None)
    assert len(found.unmatched) == 1
    (warning,) = sink_warnings(data.sinks, [found])
    assert "matches no sink among" in warning and "held-out tokens" in warning


def test_a_template_that_rests_on_few_tokens_is_announced(data: Planted) -> None:
    (sinks,) = data.sinks
    few = replace(sinks, assignment=np.array([0] * 20 + [1] * 3))
    (warning,) = sink_warnings([few], [])
    assert "template 2" in warning and "rests on 3 tokens, fewer than 8" in warning
    assert sink_warnings(data.sinks, []) == []


def test_order_of_appearance(delimited: Planted) -> None:
    """Two sinks in a window: the paper gives the first the first template, whatever it is."""
    (sinks,) = delimited.sinks
    stats = delimited.stats
    windows = stats.window < 6
    index = np.zeros(stats.token.size, np.int64)
    starts = np.flatnonzero(stats.position == 0)
    # Windows 0-3: one of each kind, the first kind first; 4: reversed; 5: three sinks.
    for number, start in enumerate(starts[:6]):
        index[start], index[start + 9] = (1, 2) if number != 4 else (2, 1)
    index[starts[5] + 3] = 2
    found = summarise(sinks, index, np.flatnonzero(index), stats, None)
    assert windows.any()
    assert (found.order_windows, found.order_differs) == (5, 1)


def test_one_template_has_no_order(spiky: Planted) -> None:
    (sinks,) = spiky.sinks
    index = (spiky.stats.position == 0).astype(np.int64)
    found = summarise(sinks, index, np.flatnonzero(index), spiky.stats, 1.0)
    assert (found.order_windows, found.order_differs) == (0, 0)


def test_missed_and_wrong_sinks_count(spiky: Planted) -> None:
    (sinks,) = spiky.sinks
    index = np.zeros(spiky.stats.token.size, np.int64)
    index[[0, 5, 6]] = 1
    found = summarise(sinks, index, np.array([0, 5, 7, 9]), spiky.stats, None)
    assert (found.sinks, found.detected, found.both) == (3, 2, 1)  # position 0 is forced
    assert (found.precision, found.recall) == (0.5, pytest.approx(1 / 3))
