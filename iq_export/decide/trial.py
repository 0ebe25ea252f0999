"""Measure a graph with any of its activation quantizers switched off, in one session."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np

from iq_export.errors import GraphError
from iq_export.graph.edit import copied
from iq_export.observe.loss import kl, log_softmax, token_losses
from iq_export.observe.samples import Window
from iq_export.observe.walk import Graph, loaded, named, walk, window_feeds
from iq_export.passes.switches import switch_name
from iq_export.progress import Progress
from iq_export.run.ort import model_session

# What one quantizer does shows in few tokens, since all else is equal; the loss needs more.
_HARM_WINDOWS, _HARM_LENGTH, _HARM_STRIDE = 2, 256, 2
_LOSS_WINDOWS = 16


@dataclass(frozen=True)
class Reference:
    """The untouched graph on some calibration windows: what every trial is compared with.

    `windows` for the loss, `losses` in nats per predicted token of each; `short` for the harm of
    single quantizers, `log_probabilities` float32 `[rows, vocab]` of each.
    """

    windows: list[Window]
    losses: np.ndarray
    short: list[Window]
    log_probabilities: list[np.ndarray]

    @classmethod
    def of(
        cls, traced: Graph, windows: Sequence[Window], *, providers: Sequence[str],
        progress: Progress,
    ) -> Reference:  # fmt: skip
        """Run `traced` over the first of `windows`."""
        chosen = list(windows[:_LOSS_WINDOWS])
        short = [replace(w, ids=w.ids[:_HARM_LENGTH]) for w in windows[:_HARM_WINDOWS]]
        options = _Options(providers=providers, progress=progress)
        exact = [log_softmax(rows[::_HARM_STRIDE]) for rows in _logits(traced, short, options)]
        return cls(chosen, _losses(chosen, _logits(traced, chosen, options)), short, exact)

    def ratio(
        self, graph: Graph, *, providers: Sequence[str], progress: Progress
    ) -> tuple[float, float]:
        """Perplexity of `graph` over the untouched one's, and its standard error over windows."""
        options = _Options(providers=providers, progress=progress)
        more = _losses(self.windows, _logits(graph, self.windows, options)) - self.losses
        ratio = float(np.exp(more.mean()))
        return ratio, ratio * float(more.std(ddof=1) / np.sqrt(more.size)) if more.size > 1 else 0.0


class _Options(TypedDict):
    providers: Sequence[str]
    progress: Progress


def _logits(graph: Graph, windows: Sequence[Window], options: _Options) -> Iterator[np.ndarray]:
    return (values["logits"] for _, values in walk(graph, ["logits"], windows, **options))


class Trial:
    """The switchable `graph` (see passes/switches.py), as a whole in one session, beside its
    reference."""

    def __init__(
        self,
        graph: Graph,
        activations: Sequence[str],
        reference: Reference,
        *,
        providers: Sequence[str],
    ) -> None:
        self._session = model_session(copied(loaded(graph)), providers, named(graph))
        self._activations = tuple(activations)
        self._reference = reference

    def harm(self, activation: str) -> float:
        """KL(untouched || graph) in nats per token if only `activation` is quantized."""
        total, rows = 0.0, 0
        reference = self._reference
        for window, exact in zip(reference.short, reference.log_probabilities, strict=True):
            found = log_softmax(self._run(window, {activation})[::_HARM_STRIDE])
            total += float(kl(exact, found).sum())
            rows += len(exact)
        return total / rows

    def ratio(self, skipped: Collection[str] = ()) -> float:
        """Perplexity over the untouched graph's, all quantized but the activations `skipped`."""
        on = set(self._activations) - set(skipped)
        windows = self._reference.windows
        losses = _losses(windows, (self._run(window, on) for window in windows))
        return float(np.exp((losses - self._reference.losses).mean()))

    def _run(self, window: Window, on: Collection[str]) -> np.ndarray:
        switches = {switch_name(name): np.array(name in on) for name in self._activations}
        (logits,) = self._session.run(["logits"], window_feeds(self._session, window, switches))
        if not np.isfinite(logits).all():
            raise GraphError("A partly quantized graph gives NaN or Inf: its ranges are too small.")
        return logits[0]


def _losses(windows: Sequence[Window], logits: Iterator[np.ndarray]) -> np.ndarray:
    """Mean negative log-likelihood of every window, in nats per predicted token."""
    found = []
    for window, rows in zip(windows, logits, strict=True):
        targets = np.asarray(window.ids[1:])
        found.append(float(token_losses(rows[:-1], targets).mean()))
    return np.asarray(found)
