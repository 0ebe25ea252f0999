"""The order of the passes: from a traced graph and decisions to the graph that ships.

This is the one place that calls them. What a pass needs and what it promises is checked when it
runs (`Step.requires`, `Step.ensures`), as in onnx/ir-py's pass infrastructure: a pass in the wrong
place stops the compile with its name, not with a wrong graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from iq_export.decisions import Decisions
from iq_export.errors import GraphError
from iq_export.graph.edit import copied
from iq_export.graph.sites import Refusal, Sites, find_sites
from iq_export.passes.fold_rotation import rotate_attention_values, rotate_stream
from iq_export.passes.fold_smoothing import fold_smoothing
from iq_export.passes.insert_sinks import insert_sinks, set_restore
from iq_export.passes.level_rows import level_rows
from iq_export.passes.own_weights import own_weights
from iq_export.passes.quantize import QuantizePlan, quantize, quantize_convolutions
from iq_export.passes.quantize_cache import quantize_cache
from iq_export.passes.rotate import rotate
from iq_export.passes.scale_query import scale_queries
from iq_export.passes.scale_residual import scale_residual
from iq_export.passes.show_inner import show_inner
from iq_export.passes.side_channels import side_channels
from iq_export.passes.to_half import to_half
from iq_export.sinks.ops import DOMAIN

# The stages at which graphs are measured: each is the one before and some passes more.
TRACED, TURNED, PREPARED, INSERTED, ROUNDED, SHIPPED = STAGES = (
    "traced", "turned", "prepared", "inserted", "rounded", "shipped",
)  # fmt: skip


@dataclass
class Lowered:
    """A graph under way: its sites, and what passes have left as it is."""

    model: ir.Model
    sites: Sites
    stage: str
    refused: tuple[Refusal, ...] = ()

    def copy(self) -> Lowered:
        """The same graph, to go on from twice; constants are shared until they are computed."""
        return Lowered(copied(self.model), self.sites, self.stage, self.refused)


@dataclass(frozen=True)
class Step:
    """A pass and the stage that it belongs to. `requires` and `ensures` give the sentence for what
    does not hold, or None."""

    name: str
    stage: str
    run: Callable[[Lowered, Decisions], object]
    requires: Callable[[Lowered, Decisions], str | None]
    ensures: Callable[[Lowered, Decisions], str | None] = lambda graph, decisions: None


def begin(traced: ir.Model) -> tuple[Lowered, list[str]]:
    """A traced graph with a weight of its own for each product, and the products that got one; of
    a mixture of experts, with the value that detection reads.

    `traced` is changed. Raises GraphError as `find_sites` does.
    """
    changed = own_weights(traced, find_sites(traced))
    show_inner(traced, find_sites(traced))
    sites = find_sites(traced)
    return Lowered(traced, sites, TRACED), changed


def lower(graph: Lowered, decisions: Decisions, until: str = SHIPPED) -> Lowered:
    """The graph at the stage `until`; `graph`, at an earlier one, is not changed.

    No weight is computed or read: all constants are lazy. Raises GraphError from a pass that cannot
    be applied, and naming the pass whose condition does not hold.
    """
    found = graph.copy()
    first, last = STAGES.index(graph.stage) + 1, STAGES.index(until)
    for step in ORDER:
        if first <= STAGES.index(step.stage) <= last:
            _check(step, "needs", step.requires(found, decisions))
            step.run(found, decisions)
            _check(step, "left", step.ensures(found, decisions))
    found.stage = until
    return found


def _check(step: Step, verb: str, problem: str | None) -> None:
    if problem is not None:
        raise GraphError(f"The pass {step.name!r} {verb} another graph: {problem}.")


def _float32(graph: Lowered, decisions: Decisions) -> str | None:
    for value in (*graph.model.graph.inputs, *graph.model.graph.outputs):
        if value.dtype == ir.DataType.FLOAT16:
            return f"{value.name} is in half precision already"
    return None


def _plain(graph: Lowered, decisions: Decisions) -> str | None:
    """Float32, with no quantizer and no sink op yet."""
    for node in graph.model.graph:
        if node.op_type == "QuantizeLinear" or node.domain == DOMAIN:
            return f"{node.name} ({node.op_type}) is there already"
    return _float32(graph, decisions)


def _unquantized(graph: Lowered, decisions: Decisions) -> str | None:
    for node in graph.model.graph:
        if node.op_type == "QuantizeLinear":
            return f"{node.name} is there already"
    return _float32(graph, decisions)


def _rounded_already(graph: Lowered, decisions: Decisions) -> str | None:
    """No quantizer yet, and codes for every weight: none is rounded here without a word."""
    if decisions.recipe.weights is not None:
        for linear in graph.sites.linears:
            if linear.node not in decisions.left and linear.weight not in decisions.codes:
                return f"the weight of {linear.node} has no codes"
    return _unquantized(graph, decisions)


def _all_inserted(graph: Lowered, decisions: Decisions) -> str | None:
    found = sum(node.op_type == "SinkDetect" for node in graph.model.graph)
    wanted = sum(1 + len(sinks.early) for sinks in decisions.sinks)
    return None if found == wanted else f"it has {found} detections of {wanted}"


def _all_rounded(graph: Lowered, decisions: Decisions) -> str | None:
    nodes = {node.name: node for node in graph.model.graph}
    for linear in graph.sites.linears:
        if linear.node in decisions.left:
            continue
        sides = {1} if decisions.recipe.weights is not None else set()
        sides |= {0} if decisions.recipe.activations is not None else set()
        for side in sides:
            value = nodes[linear.node].inputs[side]
            producer = None if value is None else value.producer()
            if producer is None or producer.op_type != "DequantizeLinear":
                return f"operand {side} of {linear.node} is not quantized"
    return None


def _all_half(graph: Lowered, decisions: Decisions) -> str | None:
    for value in (*graph.model.graph.inputs, *graph.model.graph.outputs):
        if decisions.half and value.dtype == ir.DataType.FLOAT:
            return f"{value.name} is float32"
    return None


def _fold_rotations(graph: Lowered, decisions: Decisions) -> None:
    if decisions.recipe.folded_rotation:
        refused = rotate_stream(graph.model, graph.sites)
        others = rotate_attention_values(graph.model, graph.sites)
        graph.refused += (*([refused] if refused else []), *others)


def _side_channels(graph: Lowered, decisions: Decisions) -> None:
    linears = {linear.node: linear for linear in graph.sites.linears}
    chosen = {node: (linears[node], loud) for node, loud in decisions.side.items()}
    side_channels(graph.model, chosen)


def _rotate(graph: Lowered, decisions: Decisions) -> None:
    size = decisions.recipe.rotation
    if size:
        downs = [x for block in graph.sites.blocks for x in block.mlp.outputs]
        rotate(graph.model, {d.node: (d, size) for d in downs if d.in_features % size == 0})


def _level_rows(graph: Lowered, decisions: Decisions) -> None:
    if decisions.recipe.activations is not None:
        level_rows(graph.model, graph.sites)


def _insert_sinks(graph: Lowered, decisions: Decisions) -> None:
    insert_sinks(graph.model, graph.sites, decisions.sinks)
    set_restore(graph.model, decisions.sinks)


def _quantize(graph: Lowered, decisions: Decisions) -> None:
    linears = tuple(x for x in graph.sites.linears if x.node not in decisions.left)
    rounding, scales = decisions.recipe.rounding, decisions.activations
    quantize(graph.model, QuantizePlan(linears, rounding, scales, codes=decisions.codes))
    quantize_convolutions(graph.model, graph.sites.convolutions, rounding, scales)


def _quantize_cache(graph: Lowered, decisions: Decisions) -> None:
    if decisions.recipe.cache is not None:
        quantize_cache(graph.model, graph.sites, decisions.cache, decisions.recipe.cache)


def _to_half(graph: Lowered, decisions: Decisions) -> None:
    if decisions.half:
        to_half(graph.model)


def _hide_inner(graph: Lowered, decisions: Decisions) -> None:
    """What would be there for a detection that is not."""
    if any(branch.is_mixture for branch in graph.sites.branches):
        RemoveUnusedNodesPass()(graph.model)


ORDER = (
    Step(
        "scale the stream",
        TURNED,
        lambda g, d: scale_residual(g.model, g.sites, d.exponent),
        _plain,
    ),
    Step("scale queries", TURNED, lambda g, d: scale_queries(g.model, d.scaled_queries), _plain),
    Step("fold rotations", TURNED, _fold_rotations, _plain),
    Step("level rows", TURNED, _level_rows, _plain),
    Step("smooth", PREPARED, lambda g, d: fold_smoothing(g.model, g.sites, d.smoothing), _plain),
    Step("side channels", PREPARED, _side_channels, _plain),
    Step("rotate", PREPARED, _rotate, _plain),
    Step("insert sinks", INSERTED, _insert_sinks, _plain, _all_inserted),
    Step("quantize", ROUNDED, _quantize, _rounded_already, _all_rounded),
    Step("quantize the cache", ROUNDED, _quantize_cache, _float32),
    Step("leave out what nothing reads", SHIPPED, _hide_inner, _float32),
    Step("to half", SHIPPED, _to_half, _float32, _all_half),
)
