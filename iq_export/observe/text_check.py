"""Is this text fit to calibrate on? Nothing here stops a compile; it says what is missing."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from iq_export.graph.interface import Role, name_of
from iq_export.observe.loss import token_losses
from iq_export.observe.samples import Window
from iq_export.observe.walk import Observer, Values

# Measured on SmolLM2, 8,192 tokens: prose, code and French have 12-30 % distinct tokens. Single
# letters and parts of a character are 2 % of prose and of code, 31 % of French, 81 % of Russian and
# 98 % of Japanese. The model's loss is 0.3-0.6 of the entropy of the token frequencies on running
# text, 1.06 on the same words in random order.
_LEAST_DISTINCT = 0.02
_MOST_COUNTED = 10_000
_MOST_FRAGMENTS = 0.5
_MOST_SURPRISE = 0.8
_SURPRISE_WINDOWS = 2
_LOGITS = name_of(Role.LOGITS)
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class _Decoder(Protocol):
    def decode(self, ids: list[int]) -> str: ...


def token_warnings(windows: Sequence[Window], tokenizer: _Decoder) -> list[str]:
    """What the tokens alone tell: too few distinct ones, or words that fall apart."""
    ids = np.concatenate([np.asarray(window.ids[window.bos :]) for window in windows])
    distinct, counts = np.unique(ids, return_counts=True)
    found = []
    if distinct.size < _LEAST_DISTINCT * min(ids.size, _MOST_COUNTED):
        top = tokenizer.decode([int(distinct[counts.argmax()])])
        found.append(
            f"the calibration text has {distinct.size} distinct tokens among {ids.size} "
            f"({top!r} alone is {counts.max() / ids.size:.0%} of it): ranges and sinks of all "
            "other tokens are not seen; give running text"
        )
    texts = [tokenizer.decode([int(token)]) for token in distinct]
    fragment = np.array([_REPLACEMENT in text for text in texts])
    if any(len(text) > 1 for text in texts):  # else it spells everything, its own language too
        fragment |= np.array([_is_letter(text) for text in texts])
    share = float(counts[fragment].sum() / ids.size)
    if share > _MOST_FRAGMENTS:
        found.append(
            f"{share:.0%} of the calibration text's tokens are single letters or parts of a "
            "character: the tokenizer hardly knows its language, so the model's words are not "
            "seen; give text in a language of the model"
        )
    return found


def _is_letter(text: str) -> bool:
    """One letter of an alphabet, of which words consist. A wide character (Chinese, Japanese,
    Korean) is a word or a syllable, and punctuation and digits stand alone in any language."""
    return len(text) == 1 and text.isalpha() and unicodedata.east_asian_width(text) not in "WF"


class SurpriseObserver(Observer):
    """How well the model predicts the first of `windows`, beside the token frequencies of all."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self.names = [_LOGITS]
        self.of = range(min(_SURPRISE_WINDOWS, len(windows)))
        self._windows, self._loss, self._tokens = windows, 0.0, 0

    def add(self, number: int, values: Values) -> None:
        targets = np.asarray(self._windows[number].ids[1:])
        self._loss += float(token_losses(values[_LOGITS][:-1], targets).sum())
        self._tokens += targets.size

    def warning(self) -> str | None:
        """Whether the model predicts the text hardly better than its token frequencies would."""
        ids = np.concatenate([np.asarray(window.ids) for window in self._windows])
        _, counts = np.unique(ids, return_counts=True)
        share = counts / ids.size
        # Few tokens make frequencies look more telling than they are (Miller and Madow).
        entropy = float(-(share * np.log(share)).sum()) + (counts.size - 1) / (2 * ids.size)
        loss = self._loss / self._tokens
        if entropy <= 0 or loss <= _MOST_SURPRISE * entropy:
            return None
        return (
            f"the model predicts the calibration text with a loss of {loss:.2f} nats per token "
            f"(perplexity {np.exp(min(loss, 99)):.3g}); its token frequencies alone have "
            f"{entropy:.2f}: to this model it is noise, so what is measured on it says little "
            "about real use; give text that the model was made for"
        )
