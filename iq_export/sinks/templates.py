"""The constant vectors of a lifecycle's sinks, and where the graph reads and writes them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from iq_export.graph.sites import Sites
from iq_export.sinks.lifecycle import EarlySite, Lifecycle

# Fewer tokens per template would describe the calibration text, not the model. A template is only
# added where fewer explain the sinks too badly, so one below this is kept, and announced.
TOKENS_PER_TEMPLATE = 8


@dataclass(frozen=True)
class EarlyTemplates:
    """The same K templates at an early site, float32 `[K, features]` each, as in SinkTemplates."""

    site: EarlySite
    threshold: float
    detection: np.ndarray
    norms: dict[str, np.ndarray]


# What replaces a sink's rows in the persistence phase: `norm` the templates
# after each norm, `kv` keys and values at the attention products and zeros after the norms,
# `norm+kv` templates at both, where quantizers cannot hold a sink's row.
NORM, KV, NORM_AND_KV = "norm", "kv", "norm+kv"


@dataclass(frozen=True)
class KeyValueTemplates:
    """What the kv form writes; every array is float32 `[K, features]`, all heads together.

    `rows`: name of this step's keys (after the rotary embedding) or values -> template. `residual`:
    mean untouched residual after the last block. `deviation`, `deviation_max`: name -> mean and
    largest relative deviation of held-out sinks, as in SinkTemplates.
    """

    rows: dict[str, np.ndarray]
    residual: np.ndarray
    deviation: dict[str, float]
    deviation_max: dict[str, float]


@dataclass
class SinkTemplates:
    """Templates of one lifecycle; every array is float32 `[K, features]`.

    `detection`: mean down-projection input at the birth block, what a row is matched against.
    `norms`: norm output name -> template. `restore`: mean difference between the untouched and the
    clamped residual after the last block, zero until it is measured. `deviation`: norm output
    name -> mean relative deviation `|y_t - T_k| / |T_k|` of held-out sinks in the traced graph, a
    fraction, k as the graph matches them; `template_spread[k]`: the same of template k's own
    tokens, averaged over all norms. `assignment`: k of every member, as the graph matches it.
    `agreement`: share of held-out sinks whose match is also nearest after the norms. `early`: one
    for each early site. `form`: NORM, KV or NORM_AND_KV. `key_values` is None if the attention of a
    block is no single op, so that only the norm form is possible.
    """

    lifecycle: Lifecycle
    threshold: float
    detection: np.ndarray
    norms: dict[str, np.ndarray]
    deviation: dict[str, float]
    deviation_max: dict[str, float]
    template_spread: list[float]
    assignment: np.ndarray
    restore: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    agreement: float = 1.0
    early: tuple[EarlyTemplates, ...] = ()
    key_values: KeyValueTemplates | None = None
    form: str = NORM
    untouched: np.ndarray | None = None  # all members' residual after the last block, if kept

    @property
    def count(self) -> int:
        return self.detection.shape[0]

    @property
    def mean_deviation(self) -> float:
        """The lifecycle's figure: the worst site's mean relative deviation."""
        return max(self.deviation.values(), default=0.0)

    def is_constant(self, limit: float) -> bool:
        return self.mean_deviation <= limit

    @property
    def thin(self) -> list[int]:
        """Numbers of the templates that rest on few tokens, from 0."""
        tokens = np.bincount(self.assignment, minlength=self.count)
        return np.flatnonzero(tokens < TOKENS_PER_TEMPLATE).tolist()


def norm_outputs(sites: Sites, lifecycle: Lifecycle) -> list[str]:
    """What products read of the spiking residual of all members, in graph order: outputs of norms,
    or the stream itself where none stands in front. Of a lifecycle that ends in its own block, in
    a norm that the stream passes, that norm's output."""
    birth = sites.blocks[lifecycle.birth].mlp
    if not lifecycle.insert_blocks and birth.onward != birth.residual:
        return [birth.onward]
    last = [branch.input for branch in sites.blocks[lifecycle.end].after]
    found = _norms_of(sites, lifecycle.birth + 1, lifecycle.end)
    return [*found, *last] if lifecycle.behind(lifecycle.end) else found


def early_norm_outputs(sites: Sites, lifecycle: Lifecycle) -> list[list[str]]:
    """Per early site, the same of the blocks between it and the next site."""
    starts = [site.block for site in lifecycle.early]
    ends = [*starts[1:], lifecycle.birth]
    return [_norms_of(sites, start + 1, end) for start, end in zip(starts, ends, strict=False)]


def _norms_of(sites: Sites, first: int, last: int) -> list[str]:
    """What the branches read from behind the MLP of block `first - 1` to that of block `last`, with
    this one; each once."""
    found = [branch.input for branch in sites.blocks[first - 1].after]
    for block in sites.blocks[first : last + 1]:
        found += [block.attention.input, block.mlp.input]
        found += [branch.input for branch in block.after if block.index < last]
    return list(dict.fromkeys(found))


def key_value_sizes(sites: Sites, lifecycle: Lifecycle) -> dict[str, int]:
    """Keys and values of all blocks that the spike passes, name -> features per token.

    Empty if the attention of one of them is no single op.
    """
    found = [sites.blocks[block].attention.attention for block in lifecycle.insert_blocks]
    sizes: dict[str, int] = {}
    for site in found:
        if site is None:
            return {}
        sizes |= {site.key: site.key_features, site.value: site.value_features}
    return sizes
