"""Measure one graph: perplexity and agreement with fp32 on texts, accuracy on multiple choice.

The reference's likeliest tokens and a sample of its log-probabilities are kept on disk, so one
graph is in memory at a time and no graph needs to be run again for another one's sake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from iq_export.errors import GraphError
from iq_export.evaluate.perplexity import exp_or_inf, score
from iq_export.observe.loss import kl, log_softmax, nll
from iq_export.observe.samples import Window
from iq_export.progress import Progress
from iq_export.run.ort import Step, left_pad
from tools.compare.data import Item, Request

# Positions per window whose full distributions are compared.
_SAMPLE_ROWS = 8
# Logits of one batch of choices: 64 M x 4 bytes.
_BATCH_LOGITS = 64 << 20


class Model(Protocol):
    """What is measured: `iq_export.run.ort.CausalLM`, or one behind a prefix."""

    vocab_size: int

    def forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        *,
        need_present: bool = True,
    ) -> Step: ...


@dataclass(frozen=True)
class Reference:
    """fp32 on one text: `top1` `[windows, length - 1]`, `sample` `[windows, rows, vocab]`."""

    top1: np.ndarray
    sample: np.ndarray

    def save(self, path: Path) -> None:
        np.savez(path, top1=self.top1, sample=self.sample)

    @classmethod
    def load(cls, path: Path) -> Reference:
        with np.load(path) as arrays:
            return cls(arrays["top1"], arrays["sample"])


def measure_text(
    model: Any, windows: Sequence[Window], reference: Reference | None, progress: Progress
) -> tuple[dict[str, Any], Reference | None]:
    """Perplexity, mean KL(fp32 || graph) in nats and top-1 agreement; None without a reference.

    Also returns what a reference keeps. Logits that are not finite give `error` instead.
    """
    rows = np.linspace(0, len(windows[0].ids) - 2, _SAMPLE_ROWS, dtype=int).tolist()
    losses, top1, samples = [], [], []
    divergence, agreement = [], []
    try:
        for number, window in enumerate(windows):
            scored = score(_logits(model, window), window, number, rows)
            losses.append(scored.nll)
            top1.append(scored.top1)
            if reference is None:
                samples.append(scored.sample)
            else:
                exact = reference.sample[number].astype(np.float64)
                divergence.append(kl(exact, scored.sample).mean())
                agreement.append(np.mean(scored.top1 == reference.top1[number]))
            progress.update(number + 1, len(windows))
    except GraphError as error:
        return {"error": str(error)}, None
    result = {
        "perplexity": exp_or_inf(float(np.concatenate(losses).mean())),
        "kl": float(np.mean(divergence)) if reference else None,
        "top1": float(np.mean(agreement)) if reference else None,
        "tokens": int(sum(map(len, losses))),
        "window_nll": [float(window.mean()) for window in losses],
    }
    kept = None if reference else Reference(np.stack(top1), np.stack(samples))
    return result, kept


def _logits(model: Model, window: Window) -> np.ndarray:
    """Logits `[length, vocab]` of one unpadded window."""
    ids, mask, positions = left_pad([window.ids], pad_id=0)
    found: np.ndarray = model.forward(ids, mask, positions, need_present=False).logits[0]
    return found


def measure_task(
    model: Model, questions: Sequence[Item], requests: Sequence[Request], progress: Progress
) -> dict[str, Any]:
    """The chosen answer of every item: the likeliest by log-likelihood per character.

    This is lm-eval's `acc_norm`. A choice whose score is not a number is never chosen.
    """
    totals = np.full((len(questions), max(len(q.choices) for q in questions)), -np.inf)
    order = sorted(range(len(requests)), key=lambda n: -_length(requests[n]))
    done = 0
    for batch in _batches(order, requests, max(1, _BATCH_LOGITS // model.vocab_size)):
        for number, total in zip(batch, _log_likelihoods(model, requests, batch), strict=True):
            request = requests[number]
            text = questions[request.item].choices[request.choice]
            totals[request.item, request.choice] = total / max(1, len(text))
        done += len(batch)
        progress.update(done, len(requests))
    broken = np.isnan(totals).any(axis=1)
    chosen = np.where(np.isnan(totals), -np.inf, totals).argmax(axis=1)
    return {
        "chosen": chosen.tolist(),
        "gold": [question.gold for question in questions],
        "not_finite": int(broken.sum()),
    }


def _length(request: Request) -> int:
    return len(request.context) + len(request.continuation)


def _batches(order: Sequence[int], requests: Sequence[Request], tokens: int) -> list[list[int]]:
    """Split `order` (longest first) so that each padded batch stays under `tokens`."""
    found: list[list[int]] = []
    for number in order:
        if found and _length(requests[found[-1][0]]) * (len(found[-1]) + 1) <= tokens:
            found[-1].append(number)
        else:
            found.append([number])
    return found


def _log_likelihoods(
    model: Model, requests: Sequence[Request], batch: Sequence[int]
) -> list[float]:
    """Summed log-probability of each continuation, in nats. The last token is never fed."""
    rows = [(requests[n].context + requests[n].continuation)[:-1] for n in batch]
    ids, mask, positions = left_pad(rows, pad_id=0)
    logits = model.forward(ids, mask, positions, need_present=False).logits
    totals = []
    for row, number in enumerate(batch):
        target = np.asarray(requests[number].continuation)
        found = log_softmax(logits[row, -len(target) :], np.float64)
        totals.append(-float(nll(found, target).sum()))
    return totals


def describe(results: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """What a row adds in comparison to fp32: ratios, accuracy, flips and the paired interval."""
    from tools.compare.statistics import accuracy, flips, paired_interval

    found: dict[str, Any] = {}
    for name, text in results["texts"].items():
        exact = reference["texts"][name]
        found[name] = dict(text)
        found[name].pop("window_nll", None)
        if "error" not in text:
            found[name]["ratio"] = text["perplexity"] / exact["perplexity"]
    for name, task in results["tasks"].items():
        exact = reference["tasks"][name]
        difference, low, high = paired_interval(task["chosen"], exact["chosen"], task["gold"])
        found[name] = {
            "accuracy": accuracy(task["chosen"], task["gold"]),
            "flips": flips(task["chosen"], exact["chosen"]),
            "difference": difference,
            "low": low,
            "high": high,
            "items": len(task["gold"]),
            "not_finite": task["not_finite"],
        }
    return found
