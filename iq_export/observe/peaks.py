"""How large the products of queries and keys become: they are inside `Attention`, where no tap is.

Half precision has to hold the scores, `scale * q.k`: a backend may keep them in half between the
product and the softmax, even where it accumulates in float32. What q.k is before the scale matters
where the scale is applied behind the product (ONNX Runtime); TensorRT's ONNX parser multiplies
queries and keys by the scale's root first.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from iq_export.graph.attention import Attended, attentions
from iq_export.observe.walk import Observer, Values


class PeakObserver(Observer):
    """The largest `|q.k|` of every `Attention` node, before its scale: `peaks`, by node.

    Over all pairs of tokens of the first `windows` windows, those that the mask hides too. Where
    the lengths alone tell that it is below `limit`, it is the product of the lengths.
    """

    def __init__(self, model: ir.Model, windows: int, limit: float) -> None:
        self.sites = attentions(model)
        self.names = [name for site in self.sites for name in (site.query, site.key)]
        self.of = range(windows)
        self.peaks = {site.node: 0.0 for site in self.sites}
        self._limit = limit

    def add(self, number: int, values: Values) -> None:
        for site in self.sites:
            if site.query in values and site.key in values:
                peak = product_peak(site, values, self._limit)
                self.peaks[site.node] = max(self.peaks[site.node], peak)


def product_peak(site: Attended, values: Mapping[str, np.ndarray], limit: float) -> float:
    """As `PeakObserver.peaks`, of one window; `values[name]` is `[seq, heads * head_dim]`."""
    query, key = (_by_head(values[name], site.head_dim) for name in (site.query, site.key))
    key = np.repeat(key, site.heads // key.shape[0], axis=0)
    longest = (np.linalg.norm(x, axis=2).max(axis=1, initial=0) for x in (query, key))
    bound = float(np.prod(list(longest), axis=0).max())
    if not bound >= limit:  # NaN as well
        return bound
    return max(float(np.abs(q @ k.T).max(initial=0)) for q, k in zip(query, key, strict=True))


def _by_head(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """`[seq, heads * head_dim]` as float32 `[heads, seq, head_dim]`."""
    split = rows.reshape(rows.shape[0], -1, head_dim)
    return split.transpose(1, 0, 2).astype(np.float32, copy=False)
