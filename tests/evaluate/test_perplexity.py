"""Perplexity against a direct computation, and what a broken graph looks like."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from iq_export.calibrate.data import Window
from iq_export.errors import DataError, GraphError
from iq_export.evaluate.perplexity import exp_or_inf, perplexity, score

VOCAB = 11


@dataclass
class Step:
    logits: np.ndarray


class Table:
    """A "language model" whose logits depend on the current token only."""

    def __init__(self, scale: float = 1.0) -> None:
        self.table = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)) * scale

    def forward(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, **_: bool) -> Step:
        assert mask.shape == ids.shape == positions.shape
        assert positions[0, -1] == ids.shape[1] - 1
        return Step(self.table[ids].astype(np.float32))


def test_perplexity_equals_the_definition() -> None:
    model = Table()
    windows = [Window([1, 2, 3, 4], True), Window([5] * 100, False)]
    expected = []
    for window in windows:
        for current, following in zip(window.ids[:-1], window.ids[1:], strict=True):
            row = model.table[current].astype(np.float32)
            expected.append(-math.log(np.exp(row)[following] / np.exp(row).sum()))
    measured = perplexity(model, windows)
    assert measured.tokens == len(expected) == 102
    assert measured.nll == pytest.approx(sum(expected), rel=1e-5)
    assert measured.value == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


def test_large_logits_do_not_overflow() -> None:
    assert np.isfinite(perplexity(Table(scale=100.0), [Window([1, 2, 3], False)]).value)
    assert exp_or_inf(1e4) == math.inf


def test_not_a_number_names_the_window() -> None:
    model = Table()
    model.table[7, 2] = np.nan
    windows = [Window([1, 2, 3], True), Window([1, 7, 3], False)]
    with pytest.raises(GraphError, match=r"window 1 .* from token 1 on .without BOS"):
        perplexity(model, windows)


def test_no_windows() -> None:
    with pytest.raises(DataError):
        perplexity(Table(), [])


def test_sampled_rows_are_log_probabilities() -> None:
    scored = next(score(Table(), [Window([1, 2, 3, 4], False)], sample_rows=[0, 2]))
    assert scored.sample.shape == (2, VOCAB)
    np.testing.assert_allclose(np.exp(scored.sample).sum(axis=-1), 1, rtol=1e-6)
    assert scored.top1.shape == (3,)
