"""How far a rewritten graph is from the traced one: the calibration loss that decides choices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from iq_export import parallel
from iq_export.observe.loss import chunks, kl, log_softmax, nll
from iq_export.observe.outputs import Output
from iq_export.observe.samples import Sample
from iq_export.observe.walk import Graph, checked, loaded, walk
from iq_export.progress import Progress


@dataclass(frozen=True)
class Divergence:
    """Means over the predicted tokens of all windows, in nats.

    `kl`: KL(reference || graph); `kl_semantic`: the same where the predicting token is no sink;
    `nll`: the graph's negative log-likelihood, 0 where nothing is predicted. Of a graph that gives
    features these are not KL but what `Output.errors` has, over all rows.
    """

    kl: float
    kl_semantic: float
    nll: float


def divergence(
    exact: Iterable[np.ndarray],
    graph: Graph,
    windows: Sequence[Sample],
    indices: Sequence[str],
    *,
    providers: Sequence[str],
    progress: Progress,
) -> Divergence:
    """Run `graph` over `windows`, beside what the traced graph gives there, `exact`; `indices` are
    the sink indices of `graph` (0: no sink)."""
    output = Output.of(loaded(graph).graph)
    errors, losses, sinks = [], [], []
    runs = walk(
        graph, [output.name], windows, always=indices, providers=providers, progress=progress,
        raw=True,
    )  # fmt: skip
    for right, (number, values) in zip(exact, runs, strict=True):
        checked(output.name, values[output.name], number)
        found, window = output.rows(values[output.name]), windows[number]
        index = [values[name][0] > 0 for name in indices]
        if window.causal and output.predicts:
            targets = window.tokens[1:]
            cost = partial(_cost, right, found, targets)
            for error, loss in parallel.each(cost, chunks(targets.size)):
                errors.append(error)
                losses.append(loss)
            count, index = targets.size, [each[:-1] for each in index]
        else:
            errors.append(output.errors(right, found))
            losses.append(np.zeros(len(found)))
            count = len(found)
        of_rows = [each for each in index if each.size == count]  # else it has no row of its own
        sinks.append(np.any(of_rows or [np.zeros(count, bool)], axis=0))
    each, sink = np.concatenate(errors), np.concatenate(sinks)
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
