"""Perplexity of a causal LM over token windows, one window in memory at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from iq_export.errors import DataError, GraphError
from iq_export.observe.loss import log_softmax, token_losses

if TYPE_CHECKING:
    from iq_export.calibrate.data import Window
    from iq_export.progress import Progress
    from iq_export.run.ort import CausalLM


@dataclass(frozen=True)
class Perplexity:
    """`value` = exp(nll / tokens); `nll` is the summed negative log-likelihood in nats."""

    value: float
    nll: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Scored:
    """One window's predictions of ids[1:].

    `nll` [length-1] in nats, `top1` [length-1] the likeliest token, `sample` [rows, vocab] float32
    log-probabilities at the positions that were asked for.
    """

    nll: np.ndarray
    top1: np.ndarray
    sample: np.ndarray


def perplexity(
    model: CausalLM, windows: Sequence[Window], *, progress: Progress | None = None
) -> Perplexity:
    """Perplexity of `windows`, each scored on its own from an empty cache.

    Every token but a window's first is predicted, so a BOS is never predicted. Raises GraphError if
    a logit is NaN or infinite, naming the window; DataError if there are no windows.
    """
    if not windows:
        raise DataError("there is no window to evaluate")
    begin = time.perf_counter()
    nll, tokens = 0.0, 0
    for number, scored in enumerate(score(model, windows), start=1):
        nll += float(scored.nll.sum())
        tokens += scored.nll.size
        if progress is not None:
            progress.update(number, len(windows))
    return Perplexity(exp_or_inf(nll / tokens), nll, tokens, time.perf_counter() - begin)


def exp_or_inf(value: float) -> float:
    """exp(value), inf where a float cannot hold it: a broken graph still gets a table row."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def score(
    model: CausalLM, windows: Sequence[Window], sample_rows: Sequence[int] = ()
) -> Iterator[Scored]:
    """Score windows one by one; `sample_rows` are positions whose log-probabilities are kept."""
    for number, window in enumerate(windows):
        logits = _logits(model, window)
        bad = ~np.isfinite(logits).all(axis=-1)
        if bad.any():
            raise GraphError(
                f"logits of window {number} are NaN or infinite from token {int(bad.argmax())} on "
                f"({'with' if window.bos else 'without'} BOS)"
            )
        yield _score_window(logits[:-1], np.asarray(window.ids[1:]), sample_rows)


def _logits(model: CausalLM, window: Window) -> np.ndarray:
    """Logits [length, vocab] float32 of one unpadded window."""
    ids = np.asarray([window.ids], np.int64)
    positions = np.arange(ids.shape[1], dtype=np.int64)[None]
    return model.forward(ids, np.ones_like(ids), positions, need_present=False).logits[0]


def _score_window(logits: np.ndarray, targets: np.ndarray, sample_rows: Sequence[int]) -> Scored:
    sample = log_softmax(logits[list(sample_rows)], np.float64).astype(np.float32)
    return Scored(token_losses(logits, targets, np.float64), logits.argmax(axis=-1), sample)
