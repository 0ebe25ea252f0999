"""The planted sweep: a sample by default, the whole of it where time does not matter."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from iq_export.sinks.lifecycle import discover
from tools.discovery.models import Model
from tools.discovery.score import check_planted, judge, judged, observed, summary, truth
from tools.discovery.sweep import CALM, HALF_BILLION, PER_KIND, SPIKED, sweep
from tools.discovery.table import write_tables

MODELS = sweep()
# One of every kind, not the largest ones.
SAMPLE = [model for model in MODELS[1:] if model.seed % 1000 == 3]


def test_the_sweep_is_what_it_says() -> None:
    assert len(MODELS) == 1 + PER_KIND * (len(SPIKED) + len(CALM))
    assert len({model.seed for model in MODELS}) == len(MODELS)
    assert sum(not truth(model) for model in MODELS) == PER_KIND * len(CALM) >= 200
    ratios = [life.ratio for model in MODELS for life in model.lives if model.seed < 100_000]
    assert min(ratios) >= 20 and max(ratios) > 9000
    kinds = Counter((model.layer_norm, model.gated, model.post_norms) for model in MODELS)
    assert len(kinds) >= 6 and min(kinds.values()) > 10


@pytest.mark.parametrize("model", SAMPLE, ids=lambda model: model.kind)
def test_one_of_every_kind(model: Model) -> None:
    outcome = judged(model)
    assert outcome.additional == 0
    assert not any(outcome.found), outcome


def test_the_profile_that_was_missed() -> None:
    """A spike that a factor of 64 at the down-projection does not see; numbers as measured."""
    stats = observed(HALF_BILLION)
    check_planted(HALF_BILLION, stats)
    first = stats.position == 0
    carried = np.median(stats.residual_max[:, first], axis=1)
    assert carried[1] == pytest.approx(5.6, rel=0.02)
    assert carried[2] == pytest.approx(1020, rel=0.02)
    assert carried[19] == pytest.approx(1634, rel=0.02)
    down = stats.down_max[2]
    assert np.median(down[first]) == pytest.approx(367, rel=0.02)
    assert np.median(down[first]) / np.median(down) == pytest.approx(61, rel=0.03)
    (life,) = discover(stats)
    assert judge(HALF_BILLION, [life]).right == [True]
    assert (life.birth, life.death, life.separable, life.force_first) == (2, 20, True, True)


@pytest.mark.heavy
def test_recall_and_false_alarms() -> None:
    """The bars: 98 % of the lifecycles, strictly, and not one alarm without a spike."""
    found = summary([judged(model) for model in MODELS])
    assert found["recall"] >= 0.98
    assert found["false alarms"] == 0


def test_tables_stand_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n", encoding="utf-8"
    )
    write_tables(summary([judged(SAMPLE[0])]), page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "1 of 1 planted lifecycles" in text
