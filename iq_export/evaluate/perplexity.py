"""Perplexity of a causal LM over token windows: one piece of the graph in memory at a time, and the
logits of one window.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from iq_export.errors import DataError, GraphError
from iq_export.observe.loss import log_softmax, token_losses
from iq_export.progress import Progress

if TYPE_CHECKING:
    from iq_export.observe.samples import Window
    from iq_export.observe.walk import Graph


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
    graph: Graph,
    windows: Sequence[Window],
    *,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of `windows`, each scored on its own from an empty cache.

    Every token but a window's first is predicted, so a BOS is never predicted. Raises GraphError if
    a logit is NaN or infinite, naming the window; DataError if there are no windows.
    """
    if not windows:
        raise DataError("there is no window to evaluate")
    begin = time.perf_counter()
    nll, tokens = 0.0, 0
    found = window_logits(graph, windows, providers=providers, progress=progress)
    for number, logits in found:
        scored = score(logits, windows[number], number)
        nll += float(scored.nll.sum())
        tokens += scored.nll.size
    return Perplexity(exp_or_inf(nll / tokens), nll, tokens, time.perf_counter() - begin)


def exp_or_inf(value: float) -> float:
    """exp(value), inf where a float cannot hold it: a broken graph still gets a table row."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def window_logits(
    graph: Graph,
    windows: Sequence[Window],
    *,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    progress: Progress | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number of each window and its logits, float32 `[length, vocab]`.

    Half values are rounded op by op (see `run.ort.open_session`). Raises GraphError for a graph
    that is no causal LM with cache or cannot be run.
    """
    # onnx-ir, which reading a report or a command line needs not.
    from iq_export.graph.interface import VOCABULARY, Interface, Role
    from iq_export.observe.walk import loaded, named, walk

    interface = Interface.of_graph(loaded(graph).graph)
    interface.check_causal_lm(named(graph))
    logits = interface.find(Role.LOGITS)
    assert logits is not None
    logits.fixed(VOCABULARY)
    found = walk(
        graph, [logits.name], windows, providers=providers,
        progress=progress or Progress(quiet=True), round_half=True, raw=True,
    )  # fmt: skip
    for number, values in found:
        yield number, values[logits.name][0].astype(np.float32, copy=False)


def score(
    logits: np.ndarray, window: Window, number: int, sample_rows: Sequence[int] = ()
) -> Scored:
    """Score the logits of a window; `sample_rows` are positions whose log-probabilities are kept.

    Raises GraphError if one is NaN or infinite, naming the window by its number.
    """
    bad = ~np.isfinite(logits).all(axis=-1)
    if bad.any():
        raise GraphError(
            f"logits of window {number} are NaN or infinite from token {int(bad.argmax())} on "
            f"({'with' if window.bos else 'without'} BOS)"
        )
    rows, targets = logits[:-1], np.asarray(window.ids[1:])
    sample = log_softmax(rows[list(sample_rows)], np.float64).astype(np.float32)
    return Scored(token_losses(rows, targets, np.float64), rows.argmax(axis=-1), sample)
