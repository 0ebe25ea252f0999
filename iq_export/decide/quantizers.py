"""Choose every activation's range and round every weight, one block behind the other.

Every block sees what the quantized blocks before it give. An expert that fewer than FEWEST_TOKENS
reach is calibrated on all tokens of its block, as if these had chosen it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from iq_export import parallel
from iq_export.checkpoint import Checkpoint
from iq_export.decide.codes import CodeFile, CodeStore
from iq_export.decide.job import Job
from iq_export.decide.search import choose_clip, unit_rows
from iq_export.decisions import Decisions
from iq_export.errors import GraphError
from iq_export.formats.base import ActivationFormat, Codes
from iq_export.formats.gptq import Curvature, Gram
from iq_export.formats.int8_activations import INT8
from iq_export.formats.rounding import Rounding
from iq_export.graph.sites import Block, Linear, Sites
from iq_export.observe.block_walk import BlockWalk
from iq_export.observe.everyone import for_everyone
from iq_export.observe.ranges import (
    FEWEST_TOKENS,
    TensorStats,
    rows_per_window,
    sampled_rows,
)
from iq_export.observe.samples import Sample
from iq_export.observe.walk import Carried
from iq_export.passes.insert_sinks import index_scopes
from iq_export.passes.order import INSERTED, PREPARED
from iq_export.passes.quantize import QuantizePlan, quantize
from iq_export.progress import Progress
from iq_export.recipe import Recipe
from iq_export.sinks.templates import SinkTemplates

# Shares of the way, as factors, from the full range to that of least error (docs/design.md). MLPs
# write the spikes: what is clipped in front of them costs more than its squared error says. Without
# a rotation a spike is one channel's, and clipping it hurts no other.
_ATTENTION_CLIP, _UNROTATED_DOWN_CLIP = 1.0, 0.5


@dataclass(frozen=True)
class Quantizer:
    """One activation quantizer: `before` is the traced tensor, `after` the one that is quantized.

    `clip` is the kept share of the semantic absmax, `output_error` the relative squared error it
    causes on the sampled outputs of its products.
    """

    name: str
    linears: tuple[str, ...]  # the products' nodes
    scale: float
    clip: float
    output_error: float
    before: TensorStats
    after: TensorStats
    format: ActivationFormat = INT8


@dataclass(frozen=True)
class _Finished:
    """What a block gave: its quantizers, the codes of its weights, and how many of its experts see
    few tokens."""

    quantizers: dict[str, Quantizer]
    codes: dict[str, CodeFile]
    rare: int = 0


@dataclass(frozen=True)
class Rare:
    """Of `experts` in all, `rare` were reached by fewer than FEWEST_TOKENS."""

    rare: int
    experts: int

    def note(self) -> str | None:
        """What to say of them; None if there are none."""
        if not self.rare:
            return None
        return (
            f"{self.rare} of {self.experts} experts are chosen by fewer than {FEWEST_TOKENS} "
            "calibration tokens: they are calibrated on all tokens of their block; with more "
            "--samples there are fewer of these"
        )


def calibrate_blocks(
    model: ir.Model,
    sites: Sites,
    before: Mapping[str, TensorStats],
    sinks: Sequence[SinkTemplates],
    recipe: Recipe,
    windows: Sequence[Sample],
    codes: CodeStore,
    *,
    seed: int,
    providers: Sequence[str],
    progress: Progress,
    kept: Checkpoint,
) -> tuple[dict[str, Quantizer], Rare]:
    """Ranges on the graph with the sink ops in it, over semantic tokens; clips by output error.

    `before`: statistics of the traced graph by a product's input. The weights are rounded on the
    way, into `codes`. `model` is changed where it has experts, and is not to be used any more.

    Raises GraphError for an activation that is zero throughout.
    """
    nodes = {node.name: node for node in model.graph}
    readers: dict[str, list[Linear]] = {}
    for linear in sites.linears:
        readers.setdefault(str(nodes[linear.node].inputs[0].name), []).append(linear)
    widths = {name: linears[0].in_features for name, linears in readers.items()}
    per_window = rows_per_window(len(windows))
    scopes = {
        name: scope
        for number, templates in enumerate(sinks)
        for name, scope in index_scopes(number, templates, sites).items()
    }
    taken = {
        name: sites.rows[linears[0].input]
        for name, linears in readers.items()
        if linears[0].input in sites.rows
    }
    hiding = {
        name: [index for index, scope in scopes.items() if linears[0].node in scope]
        for name, linears in readers.items()
    }
    walk = BlockWalk(model, sites, windows, list(scopes), providers)
    found, rare = _taken(kept, walk, codes)
    for block in sites.blocks[walk.block :]:
        inside = {x.node for branch in block.branches for x in branch.linears}
        names = [name for name, linears in readers.items() if linears[0].node in inside]
        here = [linear for name in names for linear in readers[name]]
        with _computed(nodes, here) as weights:
            look = _Look(walk, widths, taken, hiding, recipe, seed, per_window)
            stats, grams = look.at({name: name for name in names})
            few = [name for name in names if name in taken and stats[name].tokens < FEWEST_TOKENS]
            if few:
                of_all = {name: for_everyone(model, name, taken[name]) for name in few}
                seen, squares = look.at(of_all, everyone=True)
                stats |= seen
                grams |= squares
            for name in names:
                linears, tensor = readers[name], stats[name]
                if recipe.activations is not None:
                    read = [weights[linear.node] for linear in linears]
                    strength = _clip_strength(linears[0], block, recipe)
                    found[name] = _quantizer(
                        name, linears, read, tensor, before, recipe.rounding, strength
                    )
                assert recipe.weights is not None
                together = np.concatenate([weights[linear.node] for linear in linears], axis=1)
                if recipe.gptq:
                    curvature = Curvature(grams.pop(name).total())
                    rounded = recipe.weights.compensate(together, curvature)
                else:
                    rounded = recipe.weights.round(together, (tensor.rows**2).mean(0))
                ends = np.cumsum([linear.out_features for linear in linears])[:-1]
                apart = (np.split(each, ends, axis=-1) for each in rounded)
                for linear, *its in zip(linears, *apart, strict=True):
                    codes.add(linear.weight, *map(np.ascontiguousarray, its))
                tensor.rows = tensor.rows[:0].copy()  # all that they were for is decided
        plan = QuantizePlan(
            tuple(here),
            recipe.rounding,
            {name: found[name].scale for name in names if name in found},
            codes=codes,
        )
        walk.advance(partial(quantize, plan=plan))
        its = {name: found[name] for name in names if name in found}
        carried = walk.carried if walk.block < len(sites.blocks) else None
        experts = len({taken[name] for name in few})
        rare += experts
        _keep(kept, codes, block.index, here, its, carried, rare=experts)
        progress.update(block.index + 1, len(sites.blocks))
    return found, Rare(rare, len(set(taken.values())))


@dataclass(frozen=True)
class _Look:
    """What is summed up of the current block of `walk`: `taken` names what numbers an expert's
    tokens, and `hiding` the indices of the sinks that a value's ranges leave out, both by value."""

    walk: BlockWalk
    widths: Mapping[str, int]
    taken: Mapping[str, str]
    hiding: Mapping[str, Sequence[str]]
    recipe: Recipe
    seed: int
    per_window: int

    def at(
        self, read: Mapping[str, str], *, everyone: bool = False
    ) -> tuple[dict[str, TensorStats], dict[str, Gram]]:
        """Statistics and, for GPTQ, Hessians of the values of `read` (name -> where it is read), of
        an expert's tokens or of `everyone`."""
        stats = {name: TensorStats.empty(self.widths[name]) for name in read}
        compensated = read if self.recipe.gptq else []
        grams = {name: Gram(self.widths[name]) for name in compensated}
        taken = {} if everyone else self.taken
        wanted = [*read.values(), *(taken[name] for name in read if name in taken)]
        for number, values in self.walk.observe(wanted):
            for name, place in read.items():
                value = values[place]
                masks = [values[index] > 0 for index in self.hiding[name]]
                if masks and name in taken:
                    masks = [mask[values[taken[name]]] for mask in masks]
                sunk = np.any(masks, axis=0) if masks else np.zeros(len(value), bool)
                sample = sampled_rows(len(value), self.per_window, self.seed, number)
                stats[name].add(value, sunk, sample, number)
                if self.recipe.gptq:
                    rows = value[~sunk] if sunk.any() else value
                    rows = unit_rows(rows) if self.recipe.activations is None else rows
                    grams[name].add(rows)
        return stats, grams


@contextmanager
def _computed(
    nodes: Mapping[str | None, ir.Node], linears: Sequence[Linear]
) -> Iterator[dict[str, np.ndarray]]:
    """What the products multiply with in this graph, whatever passes have called it, by node:
    computed once, and what the graph has until the block ends."""
    read: dict[str, tuple[ir.Value, ir.TensorProtocol]] = {}
    for linear in linears:
        value = nodes[linear.node].inputs[1]
        assert value is not None and value.const_value is not None
        read[linear.node] = value, value.const_value
    arrays = {node: tensor.numpy() for node, (_, tensor) in read.items()}
    for node, (value, _) in read.items():
        value.const_value = ir.Tensor(arrays[node], name=value.name)
    try:
        yield arrays
    finally:
        for value, tensor in read.values():
            value.const_value = tensor


def _taken(kept: Checkpoint, walk: BlockWalk, codes: CodeStore) -> tuple[dict[str, Quantizer], int]:
    """The quantizers of the blocks that an interrupted run finished, and how many experts in these
    were rare; the walk is behind them."""
    count = 0
    while _block(count) in kept:
        count += 1
    every = len(walk.sites.blocks)
    goes_on = (n for n in range(1, count + 1) if n == every or _behind(n) in kept)
    count = max(goes_on, default=0)
    if count:
        kept.say_taken(f"{count} of {every} blocks")
    found: dict[str, Quantizer] = {}
    rare = 0
    for number in range(count):
        finished = kept.get(_block(number), _Finished)
        found |= finished.quantizers
        rare += finished.rare
        codes.take(finished.codes)
    walk.block = count
    if 0 < count < every:
        walk.carried = kept.get(_behind(count), list[Carried])
    return found, rare


def _keep(
    kept: Checkpoint,
    codes: CodeStore,
    number: int,
    linears: Sequence[Linear],
    quantizers: dict[str, Quantizer],
    carried: list[Carried] | None = None,
    rare: int = 0,
) -> None:
    """Keep what block `number` gave, and what is `carried` on behind it: no other's."""
    written = codes.files(linear.weight for linear in linears)
    values: dict[str, object] = {}
    if carried is not None:
        values[_behind(number + 1)] = carried
    values[_block(number)] = _Finished(quantizers, written, rare)
    kept.put(
        values,
        files=[codes.folder / file.name for file in written.values()],
        drop=_behind(number),
    )


def _block(number: int) -> str:
    return f"block {number}"


def _behind(count: int) -> str:
    return f"behind {count} blocks"


def _clip_strength(linear: Linear, block: Block, recipe: Recipe) -> float:
    if linear in block.attention.linears:
        return _ATTENTION_CLIP
    bare = linear in block.mlp.outputs and recipe.rotation is None
    assert recipe.activations is not None
    return _UNROTATED_DOWN_CLIP if bare else recipe.activations.mlp_clip


def _quantizer(
    name: str,
    linears: Sequence[Linear],
    weights: Sequence[np.ndarray],
    tensor: TensorStats,
    before: Mapping[str, TensorStats],
    rounding: Rounding,
    strength: float,
) -> Quantizer:
    if tensor.absmax_semantic <= 0:
        raise GraphError(
            f"Tensor {name!r} is zero for every calibration token, so it has no range; use a "
            "calibration text that resembles the model's use."
        )
    assert rounding.activations is not None
    clip, error = choose_clip(tensor.rows, tensor.absmax_semantic, weights, rounding, strength)
    scale = rounding.activations.scale(clip * tensor.absmax_semantic)
    nodes = tuple(linear.node for linear in linears)
    return Quantizer(
        name, nodes, scale, clip, error, before[linears[0].input], tensor, rounding.activations
    )


def _round_weights(
    job: Job, chosen: Decisions, power: Mapping[str, np.ndarray], codes: CodeStore
) -> None:
    """To the nearest, into `codes`; `power`: the mean square of every channel of a product's input,
    by its name."""
    format_, kept, progress = chosen.recipe.weights, job.kept, job.options["progress"]
    assert format_ is not None
    nodes = {node.name: node for node in job.at(PREPARED, chosen).graph}

    def rounded(linear: Linear) -> Codes:
        weight = nodes[linear.node].inputs[1].const_value.numpy()
        return format_.round(weight, power[linear.input])

    there = sum(_block(block.index) in kept for block in job.sites.blocks)
    if there:
        kept.say_taken(f"{there} of {len(job.sites.blocks)} blocks")
    for block in job.sites.blocks:
        linears = [linear for branch in block.branches for linear in branch.linears]
        if _block(block.index) in kept:
            codes.take(kept.get(_block(block.index), _Finished).codes)
        else:
            for linear, its in zip(linears, parallel.each(rounded, linears), strict=True):
                codes.add(linear.weight, *its)
            _keep(kept, codes, block.index, linears, {})
        progress.update(block.index + 1, len(job.sites.blocks))


def calibrate_quantizers(
    job: Job,
    chosen: Decisions,
    before: Mapping[str, TensorStats],
    power: Mapping[str, np.ndarray],
    store: CodeStore,
) -> tuple[Decisions, dict[str, Quantizer], str | None]:
    """Ranges of activations and codes of weights; and what to say of experts that few tokens
    choose."""
    recipe, options = chosen.recipe, job.options
    if recipe.weights is None:
        return chosen, {}, None
    if not recipe.calibrates:
        with options["progress"].step("Round weights"):
            _round_weights(job, chosen, power, store)
        return replace(chosen, codes=store), {}, None
    with options["progress"].step("Calibrate quantizers"):
        quantizers, rare = calibrate_blocks(
            job.at(INSERTED, chosen), job.sites, before, chosen.sinks, recipe,
            job.data.windows, store, seed=job.data.seed, kept=job.kept, **options,
        )  # fmt: skip
    activations = {name: q.scale for name, q in quantizers.items()}
    return replace(chosen, activations=activations, codes=store), quantizers, rare.note()
