"""Medians and their spread, alone and in pairs; how far logits are apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from iq_export.observe.loss import kl, log_softmax


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of `samples`."""
    low, middle, high = np.percentile(np.asarray(samples, np.float64), [25, 50, 75])
    return {"median": float(middle), "q1": float(low), "q3": float(high), "n": len(samples)}


def paired_ratio(samples: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Of `samples` / `base`, round by round: a slow moment of the machine hits both."""
    return spread([a / b for a, b in zip(samples, base, strict=True)])


def distance(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Of logits [..., vocab]: share of rows with the same likeliest token, largest difference, mean
    KL(expected || found) in nats."""
    divergence = kl(*(log_softmax(logits, np.float64) for logits in (expected, found)))
    return {
        "rows": int(divergence.size),
        "top1": float((found.argmax(-1) == expected.argmax(-1)).mean()),
        "max_abs": float(np.abs(found.astype(np.float64) - expected).max()),
        "kl": float(divergence.mean()),
    }
