"""How far a rewritten graph is from the traced one: the calibration loss that decides choices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from iq_export import parallel
from iq_export.observe.loss import chunks, kl, log_softmax, nll
from iq_export.observe.samples import Window
from iq_export.observe.walk import Graph, walk
from iq_export.progress import Progress


@dataclass(frozen=True)
class Divergence:
    """Means over the predicted tokens of all windows, in nats.

    `kl`: KL(reference || graph); `kl_semantic`: the same where the predicting token is no sink;
    `nll`: the graph's negative log-likelihood.
    """

    kl: float
    kl_semantic: float
    nll: float


def divergence(
    exact: Iterable[np.ndarray],
    graph: Graph,
    windows: Sequence[Window],
    indices: Sequence[str],
    *,
    providers: Sequence[str],
    progress: Progress,
) -> Divergence:
    """Run `graph` over `windows`, beside the traced graph's logits there, `exact`; `indices` are
    the sink indices of `graph` (0: no sink)."""
    divergences, losses, sinks = [], [], []
    runs = walk(graph, ["logits"], windows, always=indices, providers=providers, progress=progress)
    for right, (number, found) in zip(exact, runs, strict=True):
        targets = np.asarray(windows[number].ids[1:])
        cost = partial(_cost, right, found["logits"], targets)
        for divergent, loss in parallel.each(cost, chunks(targets.size)):
            divergences.append(divergent)
            losses.append(loss)
        sinks.append(np.any([found[name][:-1] > 0 for name in indices] or [targets < 0], axis=0))
    each, sink = np.concatenate(divergences), np.concatenate(sinks)
    semantic = each[~sink]
    return Divergence(
        float(each.mean()),
        float(semantic.mean()) if semantic.size else 0.0,
        float(np.concatenate(losses).mean()),
    )


def _cost(
    exact: np.ndarray, found: np.ndarray, targets: np.ndarray, rows: slice
) -> tuple[np.ndarray, np.ndarray]:
    """KL and negative log-likelihood of some rows of logits."""
    p, q = (log_softmax(logits[rows]) for logits in (exact, found))
    return kl(p, q), nll(q, targets[rows])
