"""Losses against their definitions, and that chunks change nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from iq_export.observe.loss import chunks, kl, log_softmax, nll, token_losses

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(150, 11)).astype(np.float32) * 3
OTHER = RNG.normal(size=(150, 11)).astype(np.float32) * 3
TARGETS = RNG.integers(0, 11, 150)


def test_values_are_those_of_the_definitions() -> None:
    p = np.exp(LOGITS.astype(np.float64))
    p /= p.sum(axis=-1, keepdims=True)
    q = np.exp(OTHER.astype(np.float64))
    q /= q.sum(axis=-1, keepdims=True)
    log_p, log_q = log_softmax(LOGITS, np.float64), log_softmax(OTHER, np.float64)
    np.testing.assert_allclose(log_p, np.log(p), rtol=1e-12)
    np.testing.assert_allclose(kl(log_p, log_q), (p * np.log(p / q)).sum(-1), rtol=1e-12)
    expected = [-math.log(row[target]) for row, target in zip(p, TARGETS, strict=True)]
    np.testing.assert_allclose(nll(log_p, TARGETS), expected, rtol=1e-12)
    np.testing.assert_allclose(token_losses(LOGITS, TARGETS, np.float64), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_chunks_change_no_bit(dtype: type) -> None:
    whole = nll(log_softmax(LOGITS, dtype), TARGETS)
    np.testing.assert_array_equal(token_losses(LOGITS, TARGETS, dtype), whole)
    assert [s.start for s in chunks(150)] == [0, 32, 64, 96, 128]


def test_the_type_is_that_of_the_logits_unless_told_and_sums_are_float64() -> None:
    assert log_softmax(LOGITS).dtype == np.float32
    assert log_softmax(LOGITS, np.float64).dtype == np.float64
    assert kl(log_softmax(LOGITS), log_softmax(OTHER)).dtype == np.float64
    assert token_losses(LOGITS, TARGETS).dtype == np.float64


def test_logits_are_left_alone_and_large_ones_do_not_overflow() -> None:
    large = np.array([[1e4, 0.0], [-1e4, 0.0]], np.float32)
    before = large.copy()
    np.testing.assert_array_equal(token_losses(large, np.array([0, 0])), [0, 1e4])
    np.testing.assert_array_equal(large, before)
