"""What every way to the file that ships has in common: its beginning, and the check at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from iq_export.decide.job import Run
from iq_export.decisions import Decisions, Smoothing
from iq_export.errors import GraphError
from iq_export.evaluate.final_check import MOST_LOST, FinalCheck, block_parts, broken, final_check
from iq_export.graph import io
from iq_export.graph.sites import Linear, Sites
from iq_export.observe.samples import Sample
from iq_export.observe.tail import Tail
from iq_export.passes.order import INSERTED, Lowered, begin, lower
from iq_export.progress import Progress
from iq_export.recipe import Recipe
from iq_export.sinks.templates import SinkTemplates

MODEL = "model.onnx"  # as a bundle calls it


class Made:
    """What follows from `chosen`, `sites` and `traced` of a finished run."""

    chosen: Decisions
    sites: Sites
    traced: Path

    @property
    def sinks(self) -> list[SinkTemplates]:
        """The lifecycles that are replaced."""
        return list(self.chosen.sinks)

    @property
    def smoothing(self) -> Smoothing:
        return self.chosen.smoothing

    @property
    def scale_exponent(self) -> int:
        """The residual stream of what ships is divided by 2 to this power."""
        return self.chosen.exponent

    @property
    def recipe(self) -> Recipe:
        return self.chosen.recipe

    @property
    def blocks(self) -> Mapping[str, int]:
        """How many channels share a scale, by weight name, where the format has blocks."""
        return weight_blocks(self.sites, self.recipe)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The products that are quantized."""
        return tuple(x for x in self.sites.linears if x.node not in self.chosen.left)

    def base(self) -> ir.Model:
        """The traced graph as every stage begins with it, in memory, its constants lazy."""
        return begin(io.load(self.traced))[0].model

    def graph(self, stage: str) -> ir.Model:
        """The graph at a stage of `passes/order.py`, in memory, its constants lazy."""
        return lower(begin(io.load(self.traced))[0], self.chosen, stage).model

    def write(self, stage: str, path: Path) -> Path:
        """Write the graph at a stage with all its weights, for people and for tests."""
        io.save(self.graph(stage), path)
        return path


def written(lowered: Lowered, path: Path, progress: Progress) -> list[str]:
    """Save the graph that ships; notes on what was not rotated, which are said too."""
    io.save(lowered.model, path)
    notes = [f"not rotated: node {r.node}: {r.reason}" for r in lowered.refused]
    for note in notes:
        progress.note(note)
    return notes


def weight_blocks(sites: Sites, recipe: Recipe) -> dict[str, int]:
    """Weight name -> channels that share a scale, where the format has blocks.

    Raises UsageError naming a weight whose width has none.
    """
    found: dict[str, int] = {}
    for linear in sites.linears:
        if recipe.weights is not None:
            recipe.weights.check(linear.weight, linear.in_features)
            block = recipe.weights.block(linear.in_features)
            found |= {} if block is None else {linear.weight: block}
    return found


def started(traced: Path, progress: Progress) -> tuple[Lowered, list[str]]:
    """The traced graph in memory, and notes on what was changed in it; what is left as it is, is
    said. Raises GraphError as `begin` does."""
    base, shared = begin(io.load(traced))
    notes = []
    if shared:
        notes.append(
            f"{len(shared)} products share their weight with another, the first is {shared[0]}: "
            "each gets a copy of its own, since rounding and smoothing depend on what a product "
            "reads"
        )
        progress.note(notes[-1])
    for refusal in base.sites.refused:
        progress.note(f"left as it is: node {refusal.node}: {refusal.reason}")
    return base, notes


def check_file(
    base: Lowered,
    chosen: Decisions,
    path: Path,
    tail: Tail,
    windows: Sequence[Sample],
    options: Run,
) -> FinalCheck:
    """The finished file against fp32; GraphError if it has lost everything."""
    check = final_check(tail, path, windows, block_parts(base.sites), **options)
    if check.lost >= MOST_LOST:
        inserted = lower(base, chosen, INSERTED).model
        raise GraphError(broken(check, inserted, path, base.sites, windows, **options))
    options["progress"].note(check.sentence())
    return check
