"""The scales of an int8 KV cache."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from iq_export.decide.job import Job
from iq_export.decisions import Decisions
from iq_export.formats.base import CacheScale
from iq_export.observe.ranges import TensorStats, observe_ranges
from iq_export.passes.insert_sinks import index_name
from iq_export.passes.order import INSERTED


def cache_scales(job: Job, chosen: Decisions) -> dict[str, CacheScale]:
    """Of every layer's keys and values; rows of replaced sinks are read from templates instead."""
    widths: dict[str, int] = {}
    indices: dict[str, list[str]] = {}
    sinks, windows = chosen.sinks, job.data.windows
    for block in job.sites.blocks:
        site = block.attention.attention
        if site is not None:  # else the pass says so
            passing = [n for n, s in enumerate(sinks) if block.index in s.lifecycle.insert_blocks]
            widths |= {site.key: site.key_features, site.value: site.value_features}
            indices |= {x: [index_name(n) for n in passing] for x in (site.key, site.value)}

    def rows(name: str, number: int, values: Mapping[str, np.ndarray]) -> np.ndarray:
        found = np.zeros(windows[number].rows, bool)
        for index in indices[name]:
            found |= values[index] > 0
        return found

    format_ = chosen.recipe.cache
    assert format_ is not None
    scales: dict[str, CacheScale] = {}

    def scale(stats: dict[str, TensorStats]) -> None:
        for name, its in stats.items():
            scales[name] = format_.scale(its.rows, its.absmax_semantic)

    observe_ranges(
        job.at(INSERTED, chosen), widths, windows, rows,
        always=[index_name(n) for n in range(len(sinks))], seed=job.data.seed, reduce=scale,
        **job.options,
    )  # fmt: skip
    return scales
