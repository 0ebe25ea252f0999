"""Everything that was chosen for a model, as one value: a graph is `lower(traced, decisions)`.

A measurement changes nothing here; a step is "decisions and measurements -> decisions" (`decide/`),
and a variant is tried by replacing a field and measuring what is lowered from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from iq_export.formats.base import StoredCodes
from iq_export.recipe import Recipe
from iq_export.sinks.templates import SinkTemplates


@dataclass(frozen=True)
class SmoothingChoice:
    """The best candidate's name, its factors float32 `[features]`, and its relative output error
    beside that of no smoothing."""

    name: str
    factors: np.ndarray
    error: float
    error_without: float


@dataclass(frozen=True)
class Smoothing:
    """Choices by value name: `norms[norm output]` and `paths[down-projection input]`.

    The activation is divided by the factors, the weight rows of its products multiplied.
    """

    norms: dict[str, SmoothingChoice]
    paths: dict[str, SmoothingChoice]

    def with_more(self, other: Smoothing) -> Smoothing:
        """These choices and those for other values."""
        return Smoothing(self.norms | other.norms, self.paths | other.paths)

    def factors(self, name: str) -> np.ndarray | float:
        """What the value `name` is divided by: `[features]`, or 1 where nothing was folded."""
        choice = self.norms.get(name) or self.paths.get(name)
        return 1.0 if choice is None else choice.factors


@dataclass(frozen=True)
class Decisions:
    """What the passes of `passes/order.py` apply, in the order in which they do.

    `exponent`: the residual stream is divided by `2^exponent`. `scaled_queries`: `Attention` nodes
    whose scale moves to the query. `smoothing`: factors by value name. `side`: channels that
    bypass the quantizer in front of a product (node name). `sinks`: the lifecycles that are
    replaced, each with its form, templates and thresholds. `activations`: scale by value name.
    `codes`: of rounded weights. `cache`: scale by the name of a step's keys or values. `left`:
    products (node names) that stay in float. Rotations, levelled rows and number formats follow
    from `recipe`.
    """

    recipe: Recipe
    dtype: str
    exponent: int = 0
    scaled_queries: tuple[str, ...] = ()
    smoothing: Smoothing = field(default_factory=lambda: Smoothing({}, {}))
    side: Mapping[str, np.ndarray] = field(default_factory=dict)
    sinks: tuple[SinkTemplates, ...] = ()
    activations: Mapping[str, float] = field(default_factory=dict)
    codes: Mapping[str, StoredCodes] = field(default_factory=dict)
    cache: Mapping[str, float] = field(default_factory=dict)
    left: frozenset[str] = frozenset()

    def with_activations(self, scales: Mapping[str, float]) -> Decisions:
        """These and `scales` of more values."""
        return replace(self, activations={**self.activations, **scales})

    @property
    def half(self) -> bool:
        return self.dtype == "fp16"
