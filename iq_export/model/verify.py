"""Does the traced graph compute what the original model computes?

Checked after every trace, on a few tokens, left-padded, in two chunks: it costs one short pass,
and it is what allows the trace to take short cuts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LENGTHS = (12, 7)
_FIRST_CHUNK = 8
_SEED = 20

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Parity:
    """Largest absolute difference of logits, and their range (max - min) in the original."""

    max_abs_error: float
    logit_range: float

    @property
    def relative(self) -> float:
        """The error as a fraction of the range; infinite if something is not finite."""
        value = self.max_abs_error / max(self.logit_range, 1e-30)
        return value if np.isfinite(value) else float("inf")

    @property
    def holds(self) -> bool:
        """Whether the graph counts as equal to the model."""
        return self.relative <= TOLERANCE


def original_logits(model: Any, attention: str) -> list[NDArray[np.float32]]:
    """Logits `[length, vocab]` of each test row by transformers alone: unpadded, without cache."""
    import torch

    model.set_attn_implementation(attention)
    rows = []
    with torch.no_grad():
        for ids in _rows(model.config.vocab_size):
            out = model(input_ids=torch.from_numpy(ids)[None], use_cache=False)
            rows.append(out.logits[0].float().numpy())
    return rows


def compare(path: Path, reference: list[NDArray[np.float32]]) -> Parity:
    """Run the test rows through the graph as one left-padded batch, in two chunks with cache."""
    from iq_export.run.ort import CausalLM, left_pad

    graph = CausalLM(path)
    rows = _rows(graph.vocab_size)
    ids, mask, positions = left_pad([row.tolist() for row in rows], 0)
    head = graph.forward(ids[:, :_FIRST_CHUNK], mask[:, :_FIRST_CHUNK], positions[:, :_FIRST_CHUNK])
    tail = graph.forward(ids[:, _FIRST_CHUNK:], mask, positions[:, _FIRST_CHUNK:], head.present)
    logits = np.concatenate([head.logits, tail.logits], axis=1)
    errors = [float(np.abs(logits[i, -len(row) :] - row).max()) for i, row in enumerate(reference)]
    finite = bool(np.isfinite(logits).all())
    spread = max(float(row.max() - row.min()) for row in reference)
    return Parity(max(errors) if finite else float("inf"), spread)


def _rows(vocab_size: int) -> list[NDArray[np.int64]]:
    random = np.random.default_rng(_SEED)
    return [random.integers(0, vocab_size, length) for length in _LENGTHS]
