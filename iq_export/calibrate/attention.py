"""How large the products of queries and keys become: they are inside `Attention`, where no tap is.

Half precision has to hold the scores, `scale * q.k`: a backend may keep them in half between the
product and the softmax, even where it accumulates in float32. What q.k is before the scale matters
where the scale is applied behind the product (ONNX Runtime); TensorRT's ONNX parser multiplies
queries and keys by the scale's root first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from iq_export.calibrate.data import Window
from iq_export.observe.walk import Graph, loaded, walk
from iq_export.passes.scale_query import attention_scale, query_heads
from iq_export.progress import Progress


@dataclass(frozen=True)
class Attended:
    """An `Attention` node with the names of its query and key."""

    node: str
    query: str
    key: str
    heads: int
    head_dim: int
    scale: float


def attentions(model: ir.Model) -> list[Attended]:
    """Every `Attention` node whose query has a known number of heads, in graph order."""
    found = []
    for node in model.graph:
        if node.op_type == "Attention":
            try:
                heads, head_dim = query_heads(node)
            except ValueError:
                continue
            query, key = (str(value.name) for value in node.inputs[:2] if value is not None)
            found.append(
                Attended(str(node.name), query, key, heads, head_dim, attention_scale(node))
            )
    return found


def product_peaks(
    graph: Graph,
    windows: Sequence[Window],
    limit: float,
    *,
    providers: Sequence[str],
    progress: Progress,
) -> dict[str, float]:
    """The largest `|q.k|` of every `Attention` node of `graph`, before its scale.

    Over all pairs of tokens of a window, those that the mask hides too. Where the lengths alone
    tell that it is below `limit`, it is the product of the lengths.
    """
    model = loaded(graph)
    sites = attentions(model)
    peaks = {site.node: 0.0 for site in sites}
    names = [name for site in sites for name in (site.query, site.key)]
    for _, values in walk(model, names, windows, providers=providers, progress=progress):
        for site in sites:
            if site.query not in values:
                continue
            peaks[site.node] = max(peaks[site.node], product_peak(site, values, limit))
    return peaks


def product_peak(site: Attended, values: Mapping[str, np.ndarray], limit: float) -> float:
    """As `product_peaks`, for one window; `values[name]` is `[seq, heads * head_dim]`."""
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
