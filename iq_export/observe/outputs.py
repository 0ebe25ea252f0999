"""By what graphs of one model are compared: predictions by their divergence, features by their
squared error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from iq_export.graph.interface import Interface, Role
from iq_export.observe.loss import chunks, kl, log_softmax

_TINY = 1e-30


@dataclass(frozen=True)
class Output:
    """The output of a graph that is compared, and whether it `predicts`, as logits do. `measure` is
    what `errors` are, for people."""

    name: str
    predicts: bool

    @classmethod
    def of(cls, graph: ir.Graph) -> Output:
        """Raises GraphError if a graph gives nothing that can be compared."""
        found = Interface.of_graph(graph).result
        return cls(found.name, found.role is Role.LOGITS)

    @property
    def measure(self) -> str:
        return "KL" if self.predicts else "squared error"

    def rows(self, value: np.ndarray) -> np.ndarray:
        """What one window gave, with its batch axis of 1, as float32 `[rows, features]`: a value
        without rows, or with more axes, is one row."""
        found = value[0].astype(np.float32, copy=False)
        return found if found.ndim == 2 else found.reshape(1, -1)

    def errors(self, exact: np.ndarray, found: np.ndarray) -> np.ndarray:
        """float64 `[rows]`, of rows as `rows` gives them: KL(exact || found) in nats, or the
        squared error as a fraction of the exact row's square."""
        if not self.predicts:
            return _squares(found - exact) / np.maximum(_squares(exact), _TINY)
        return np.concatenate([
            kl(log_softmax(exact[some]), log_softmax(found[some])) for some in chunks(len(exact))
        ])  # fmt: skip

    def error_of_mean(self, exact: Sequence[np.ndarray]) -> float:
        """The mean of `errors` if the same is said of every row: the mean of all that is exact."""
        count = sum(len(rows) for rows in exact)
        if not self.predicts:
            mean = sum(rows.sum(axis=0, dtype=np.float64) for rows in exact) / count
            alone = (self.errors(rows, np.broadcast_to(mean, rows.shape)) for rows in exact)
            return sum(float(each.sum()) for each in alone) / count
        logs = [log_softmax(rows) for rows in exact]
        likely = sum(np.exp(p).sum(axis=0, dtype=np.float64) for p in logs) / count
        log_mean = np.log(np.maximum(likely, _TINY)).astype(np.float32)
        return sum(float(kl(p, log_mean).sum()) for p in logs) / count


def cosines(exact: np.ndarray, found: np.ndarray) -> np.ndarray:
    """float64 `[rows]`: of the angle between each two rows."""
    product = np.einsum("ij,ij->i", exact, found, dtype=np.float64)
    size = np.sqrt(_squares(exact) * _squares(found))
    return np.asarray(product / np.maximum(size, _TINY))


def _squares(rows: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
