"""Which attentions scale their query, since half precision cannot hold q.k before its scale."""

from __future__ import annotations

from collections.abc import Mapping

from iq_export.decide.job import Job
from iq_export.errors import GraphError
from iq_export.evaluate.final_check import block_parts, scores_overflow
from iq_export.graph.attention import attentions
from iq_export.graph.half import HALF_MAX


def loud_attentions(job: Job, peaks: Mapping[str, float]) -> dict[str, float]:
    """`Attention` nodes whose q.k, at most `peaks`, half precision may not hold before its scale
    -> the largest.

    Raises GraphError for one whose scores it cannot hold either.
    """
    nodes = {attended.node: attended for attended in attentions(job.traced)}
    for node, peak in peaks.items():
        if peak * nodes[node].scale > HALF_MAX:
            raise GraphError(scores_overflow(node, peak, nodes[node].scale, block_parts(job.sites)))
    return {node: peak for node, peak in peaks.items() if 2 * peak > HALF_MAX}


def loud_note(loud: Mapping[str, float]) -> str:
    """The sentence for `loud_attentions` that there are."""
    node = max(loud, key=lambda name: loud[name])
    return (
        f"half precision cannot hold the products of queries and keys in {len(loud)} attentions "
        f"before their scale (up to {loud[node]:.4g} in {node}): the power of two in the scale is "
        "applied to the query, exactly"
    )
