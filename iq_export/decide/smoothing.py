"""Which smoothing factors to fold where (SmoothQuant, chosen per site by measured error), and which
channels go beside a quantizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from iq_export.decide.job import Job
from iq_export.decide.search import choose_smoothing, loudest_channels, unit_rows
from iq_export.decisions import Decisions, Smoothing, SmoothingChoice
from iq_export.formats.rounding import W8A8, Rounding
from iq_export.graph.sites import Linear, Route, Sites
from iq_export.observe.ranges import FEWEST_TOKENS, TensorStats, observe_ranges
from iq_export.observe.walk import Graph
from iq_export.sinks.lifecycle import Lifecycle


def find_smoothing(
    model: ir.Model,
    sites: Sites,
    stats: Mapping[str, TensorStats],
    *,
    rotation: int | None,
    rounding: Rounding = W8A8,
    side: int = 0,
) -> Smoothing:
    """Choose for every norm whose output only products of blocks read (and routers), in front of a
    branch or within one, and every up-projection that reaches the down-projection by an elementwise
    product, unless too few tokens do. `rotation` is the Hadamard block of the down-projection
    input, None for no rotation; `side` how many of its channels will bypass the quantizer. What
    `stats` does not have is left out: they may come piece by piece."""
    readers = {
        value.name: {node.name for node in value.consumers()}
        for node in model.graph
        for value in node.outputs
    }

    def weight(name: str) -> np.ndarray:  # one weight in memory at a time
        return model.graph.initializers[name].const_value.numpy()

    norms: dict[str, SmoothingChoice] = {}
    paths: dict[str, SmoothingChoice] = {}
    for norm in (*sites.norms, *sites.latent_norms):
        if norm.output in stats and readers[norm.output] == norm.readers:
            found = stats[norm.output]
            weights = [weight(linear.weight) for linear in norm.linears]
            norms[norm.output] = choose_smoothing(
                found.rows, found.channel_absmax, weights, rounding=rounding
            )
    for route in (route for block in sites.blocks for route in block.mlp.routes):
        down = route.output
        if route.linear_path is not None and down.input in stats and _seen(route, stats):
            found = stats[down.input]
            turned = rotation if rotation and down.in_features % rotation == 0 else None
            paths[down.input] = choose_smoothing(
                found.rows,
                found.channel_absmax,
                [weight(down.weight)],
                rotation=turned,
                rounding=rounding,
                side=side,
            )
    return Smoothing(norms, paths)


def find_side_channels(
    sites: Sites, stats: Mapping[str, TensorStats], smoothing: Smoothing, count: int
) -> dict[str, tuple[Linear, np.ndarray]]:
    """The `count` loudest channels of every down-projection's input, smoothed or not: by the
    product's node, what `passes.side_channels` takes. Where there is no eighth, no channel is; what
    `stats` does not have is left out."""
    found: dict[str, tuple[Linear, np.ndarray]] = {}
    for route in (route for block in sites.blocks for route in block.mlp.routes):
        down = route.output
        if down.input in stats and len(stats[down.input].rows) and _seen(route, stats):
            rows = stats[down.input].rows
            channels = loudest_channels(rows / smoothing.factors(down.input), count)
            if channels.size:
                found[down.node] = (down, channels)
    return found


def _seen(route: Route, stats: Mapping[str, TensorStats]) -> bool:
    """Whether enough tokens reach it to choose by: an expert's are few."""
    return route.rows is None or stats[route.output.input].tokens >= FEWEST_TOKENS


def smoothed(
    job: Job, turned: ir.Model, chosen: Decisions, taken: Sequence[Lifecycle]
) -> tuple[Decisions, dict[str, np.ndarray]]:
    """Smoothing and side channels, decided behind each piece of the graph; and the mean square of
    every channel of a product's input, smoothed, where every token counts the same."""
    recipe, found, sources = chosen.recipe, Smoothing({}, {}), job.sites.sources
    side: dict[str, np.ndarray] = {}
    power: dict[str, np.ndarray] = {}

    def decide_on(stats: dict[str, TensorStats]) -> None:
        nonlocal found
        if recipe.smoothing:
            more = find_smoothing(
                turned, job.sites, stats,
                rotation=recipe.rotation, rounding=recipe.rounding, side=recipe.side_channels,
            )  # fmt: skip
            found = found.with_more(more)
        loud = find_side_channels(job.sites, stats, found, recipe.side_channels)
        side.update((node, channels) for node, (_, channels) in loud.items())
        for name, its in stats.items() if recipe.activations is None else ():
            # Of an expert that no token chose, every channel counts the same.
            rows = its.rows if len(its.rows) else np.ones_like(its.channel_absmax)[None]
            mean = (unit_rows(rows) ** 2).mean(0)
            power[name] = mean / found.factors(sources.get(name, name)) ** 2

    _semantic_ranges(job, turned, taken, decide_on)
    return replace(chosen, smoothing=found, side=side), power


def _semantic_ranges(
    job: Job,
    graph: Graph,
    taken: Sequence[Lifecycle],
    reduce: Callable[[dict[str, TensorStats]], object],
) -> None:
    """Hand statistics of every product's input to `reduce`, piece by piece.

    Tokens of the lifecycles `taken` are not semantic where these live; those of others stay and
    must be rounded well like all else.
    """
    linears, stats = job.sites.linears, job.stats
    spiking = {linear.input: np.zeros(stats.token.size, bool) for linear in linears}
    for lifecycle in taken:
        for scope, members in lifecycle.scopes(job.sites):
            for linear in linears:
                if linear.node in scope:
                    spiking[linear.input][members] = True
    widths = {linear.input: linear.in_features for linear in linears}
    for norm in job.sites.norms:  # experts read some of its rows
        widths.setdefault(norm.output, job.sites.hidden)
        if norm.output not in spiking:
            inside = [spiking[linear.input] for linear in norm.linears]
            spiking[norm.output] = np.any(inside, axis=0)
    observe_ranges(
        graph, widths, job.data.windows, lambda name, n, _: spiking[name][stats.window == n],
        seed=job.data.seed, reduce=reduce, rows=job.sites.rows, **job.options,
    )  # fmt: skip
