"""How large each token is in the inputs of the products: ranges with and without any set of tokens
follow from one walk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iq_export.graph.sites import Sites
from iq_export.observe.samples import Sample
from iq_export.observe.walk import Observer, Values


@dataclass(frozen=True)
class TokenSizes:
    """Of one value, float32 `[tokens]` each: the largest magnitude and the mean square of every
    token, over its channels; 0 of those that did not choose the expert whose value it is."""

    absmax: np.ndarray
    square: np.ndarray


class ProductObserver(Observer):
    """`sizes` of every value that a product of a block reads, by name; columns as in TokenStats."""

    def __init__(self, sites: Sites, windows: Sequence[Sample]) -> None:
        its = list(dict.fromkeys(linear.input for linear in sites.linears))
        self._rows = sites.rows
        self.names = list(dict.fromkeys([*its, *self._rows.values()]))
        self.of = range(len(windows))
        self._starts = np.concatenate([[0], np.cumsum([w.rows for w in windows])])
        count = int(self._starts[-1])
        self.sizes = {
            name: TokenSizes(np.zeros(count, np.float32), np.zeros(count, np.float32))
            for name in its
        }

    def add(self, number: int, values: Values) -> None:
        every = np.arange(self._starts[number], self._starts[number + 1])
        for name, value in values.items():
            if name not in self.sizes:
                continue
            found = self.sizes[name]
            columns = every[values[self._rows[name]]] if name in self._rows else every
            found.absmax[columns] = np.maximum(value.max(1), -value.min(1)) + 0.0
            found.square[columns] = np.einsum("ij,ij->i", value, value) / value.shape[1]
