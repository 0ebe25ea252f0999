"""Outlier tokens in front: find them, keep their KV in full precision, run a graph behind them.

The idea and the rule for choosing the tokens are PrefixQuant's (arXiv 2410.05265): a token is an
outlier if the largest input of a down-projection exceeds 64 times the median token's; as many are
taken as a window has outliers on average in the worst block, the most frequent ones that do not
stand at position 0, and the BOS behind them. Their keys and values are computed once, in full
precision, and stand in the KV cache of every sequence: the spikes meet no quantized product.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iq_export.run.ort import CausalLM, Step

ALPHA = 64.0
# One kind of outlier token that is in fewer windows than this is not worth a place.
_LEAST_RATE = 0.1


@dataclass(frozen=True)
class Prefix:
    """`ids` of the tokens; `past` key and value of every layer, `[1, kv_heads, tokens, head_dim]`
    float32; `logits` `[vocab]` of the last one; `bos` its id if that is what it is."""

    ids: list[int]
    past: list[np.ndarray]
    logits: np.ndarray
    bos: int | None

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {f"past.{n}": array for n, array in enumerate(self.past)}
        bos = -1 if self.bos is None else self.bos
        np.savez(path, ids=np.asarray(self.ids), logits=self.logits, bos=bos, **arrays)

    @classmethod
    def load(cls, path: Path) -> Prefix:
        with np.load(path) as arrays:
            past = [arrays[f"past.{n}"] for n in range(len(arrays.files) - 3)]
            bos = int(arrays["bos"])
            return cls(arrays["ids"].tolist(), past, arrays["logits"], None if bos < 0 else bos)


def choose_tokens(
    maxima: np.ndarray, window: np.ndarray, position: np.ndarray, token: np.ndarray, bos: int | None
) -> list[int]:
    """Ids of the prefix. `maxima` `[blocks, tokens]`: max |down-projection input|; the others
    `[tokens]`: where each column comes from. Without a BOS the most frequent first token is used.
    """
    windows = int(window.max()) + 1
    counts = np.zeros((maxima.shape[0], windows))
    later: Counter[int] = Counter()
    first: Counter[int] = Counter()
    for number in range(windows):
        inside = window == number
        median = np.median(maxima[:, inside], axis=1, keepdims=True)
        spiking = maxima[:, inside] > ALPHA * median
        counts[:, number] = spiking.sum(axis=1)
        for found, wanted in ((first, position[inside] == 0), (later, position[inside] > 0)):
            for column in np.flatnonzero(wanted):
                found[int(token[inside][column])] += int(spiking[:, column].sum())
    most = math.ceil(counts.mean(axis=1).max())
    later = +later  # drop tokens that never spike
    if len(later) == 1 and later.most_common(1)[0][1] < _LEAST_RATE * windows:
        later.clear()
    chosen = [found for found, _ in later.most_common(most)]
    start = bos if bos is not None else first.most_common(1)[0][0]
    return [*chosen, start] if most else []


def make_prefix(model: CausalLM, ids: Sequence[int], bos: int | None) -> Prefix:
    """Run the tokens once, in the graph's own precision."""
    row = np.asarray([list(ids)], np.int64)
    positions = np.arange(row.shape[1], dtype=np.int64)[None]
    step = model.forward(row, np.ones_like(row), positions)
    last = bos if ids[-1] == bos else None
    return Prefix(list(ids), list(step.present), step.logits[0, -1], last)


class PrefixedLM:
    """A graph behind a prefix, with the interface of the graph itself.

    A sequence that starts with the BOS that the prefix ends with is run without its own: two of
    them would be another text. What the BOS predicts is the prefix's last logits.
    """

    def __init__(self, model: CausalLM, prefix: Prefix) -> None:
        self.model, self.prefix = model, prefix
        self.vocab_size = model.vocab_size

    def forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        *,
        need_present: bool = False,
    ) -> Step:
        """As `CausalLM.forward` from an empty cache: the rows may be left-padded."""
        count = len(self.prefix.ids)
        ids, mask = input_ids.copy(), attention_mask.copy()
        positions = position_ids + count
        starts = np.flatnonzero((position_ids == 0) & (attention_mask == 1))
        # Where a row starts with the BOS, that place becomes a pad.
        row, column = np.unravel_index(starts, ids.shape)
        dropped = np.zeros(len(ids), bool)
        if self.prefix.bos is not None:
            dropped[row] = ids[row, column] == self.prefix.bos
        own = dict(zip(row.tolist(), column.tolist(), strict=True))
        for number in np.flatnonzero(dropped):
            mask[number, own[number]] = 0
            positions[number] -= 1
        positions = np.where(mask == 1, positions, 0)
        skipped = int((mask.sum(axis=0) == 0).argmin())  # columns that no row needs
        past = [np.repeat(array, len(ids), axis=0) for array in self.prefix.past]
        ahead = np.ones((len(ids), count), mask.dtype)
        step = self.model.forward(
            ids[:, skipped:],
            np.concatenate([ahead, mask[:, skipped:]], axis=1),
            positions[:, skipped:],
            past,
            need_present=need_present,
        )
        width = step.logits.shape[-1]
        logits = np.concatenate(
            [np.zeros((len(ids), skipped, width), np.float32), step.logits], axis=1
        )
        for number in np.flatnonzero(dropped):
            logits[number, own[number]] = self.prefix.logits
        return Step(logits=logits, present=step.present)
