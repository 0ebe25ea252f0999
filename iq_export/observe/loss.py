"""What a model's logits cost: log-probabilities, negative log-likelihood and divergence, in nats.

All of them work row by row, so that rows may come in chunks of any size: the values are the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

# Rows of which a distribution is held: 32 x 262144 x 8 bytes = 67 MB at the worst. As many chunks
# are computed at a time as `parallel.each` takes.
_ROWS = 32


def chunks(rows: int) -> Iterator[slice]:
    """Slices that cut `rows` rows of logits into pieces small enough to hold the distributions."""
    for start in range(0, rows, _ROWS):
        yield slice(start, min(start + _ROWS, rows))


def log_softmax(logits: np.ndarray, dtype: npt.DTypeLike | None = None) -> np.ndarray:
    """Natural-log probabilities `[..., vocab]`, computed in `dtype` (default: that of `logits`)."""
    values = logits.astype(dtype or logits.dtype)
    values -= values.max(axis=-1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=-1, keepdims=True))
    return values


def kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(p || q) float64 `[...]` of log-probabilities `[..., vocab]`."""
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(axis=-1, dtype=np.float64))


def nll(log_q: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log-likelihood float64 `[rows]` of `targets` `[rows]`, from log-probabilities."""
    picked = np.take_along_axis(log_q, targets[:, None], axis=-1)[:, 0]
    return -picked.astype(np.float64)


def token_losses(
    logits: np.ndarray, targets: np.ndarray, dtype: npt.DTypeLike | None = None
) -> np.ndarray:
    """`nll` of `targets` `[rows]` from logits `[rows, vocab]`, a chunk of rows at a time."""
    found = np.empty(len(targets))
    for rows in chunks(len(targets)):
        found[rows] = nll(log_softmax(logits[rows], dtype), targets[rows])
    return found
