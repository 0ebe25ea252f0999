"""What every step of deciding reads; none changes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import onnx_ir as ir

from iq_export.checkpoint import Checkpoint
from iq_export.decisions import Decisions
from iq_export.graph.sites import Sites
from iq_export.observe.samples import Sample
from iq_export.observe.token_stats import TokenStats
from iq_export.passes.order import Lowered, lower
from iq_export.progress import Progress

# Windows whose tokens are looked at again once sinks are inserted, and those on which the forms of
# insertion are compared; the loss is paired, so few suffice.
OBSERVED_WINDOWS, FORM_WINDOWS = 4, 4


class Run(TypedDict):
    """How every observation runs."""

    providers: tuple[str, ...]
    progress: Progress


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on. `windows` measure ranges; `probes` are short ones that only add first
    tokens, since most sinks stand at position 0. `heldout` only tells how well sinks are found and
    matched on text that nothing was made from. `insertion` is of `--insertion`. With a finite
    `budget` (perplexity over the traced graph's) as few products as possible stay in half precision
    to keep within it."""

    windows: Sequence[Sample]
    probes: Sequence[Sample]
    max_relative_deviation: float
    seed: int
    providers: tuple[str, ...]
    heldout: Sequence[Sample] = ()
    insertion: str = "auto"
    budget: float = math.inf

    @property
    def all(self) -> list[Sample]:
        return [*self.windows, *self.probes]


@dataclass(frozen=True)
class Job:
    """What every step reads: the traced graph in memory, which no step changes."""

    base: Lowered
    data: Calibration
    stats: TokenStats
    options: Run
    work: Path
    kept: Checkpoint

    @property
    def sites(self) -> Sites:
        return self.base.sites

    @property
    def traced(self) -> ir.Model:
        return self.base.model

    def at(self, stage: str, chosen: Decisions) -> ir.Model:
        return lower(self.base, chosen, stage).model
