"""Run a graph block by block, so that each block is calibrated behind blocks already quantized.

Between two blocks only the residual stream and the sink indices are carried,
one window after another; masks and angles are computed again in every block. Two passes per block:
one to observe it as it is, one through its quantized form to get the next block's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from iq_export.calibrate.data import Window
from iq_export.calibrate.taps import Values, run_window, tapped_session
from iq_export.graph import io
from iq_export.graph.sites import Sites


@dataclass
class BlockWalk:
    """A walk over the blocks of the graph file `graph`; call `observe` and `advance` per block.

    `indices`: names of the int32 `[batch, seq]` sink indices; one is carried from the block that
    computes it. Memory: one residual row per calibration token.
    """

    graph: Path
    sites: Sites
    windows: Sequence[Window]
    indices: Sequence[str]
    providers: Sequence[str]
    block: int = 0
    carried: list[Values] = field(default_factory=list)

    def observe(self, names: Sequence[str]) -> Iterator[tuple[int, Values]]:
        """`(window number, values)` of `names` in the current block, and of the indices there."""
        model = self._cut()
        inside = {value.name for node in model.graph for value in node.outputs}
        wanted = [*names, *(name for name in self.indices if name in inside)]
        for number, values in self._run(model, wanted):
            yield number, {**self._indices(number), **values}

    def advance(self, change: Callable[[ir.Model], object]) -> None:
        """Carry what the block gives after `change`, and go on to the next one."""
        model = self._cut()
        inside = {value.name for node in model.graph for value in node.outputs}
        change(model)
        wanted = [self.sites.blocks[self.block].mlp.residual]
        wanted += [name for name in self.indices if name in inside]
        after = [{**self._indices(number), **v} for number, v in self._run(model, wanted)]
        self.carried = after
        self.block += 1

    def _indices(self, number: int) -> Values:
        known = self.carried[number] if self.carried else {}
        return {name: known[name] for name in self.indices if name in known}

    def _cut(self) -> ir.Model:
        """The graph with inputs for what is carried."""
        model = io.load(self.graph)
        values = {value.name: value for node in model.graph for value in node.outputs}
        for name in self.carried[0] if self.carried else {}:
            old = values[name]
            new = ir.Value(name=f"{name}.carried", type=old.type, shape=old.shape)
            for node, position in list(old.uses()):
                node.replace_input_with(position, new)
            model.graph.inputs.append(new)
        # What no later block needs must not keep the earlier ones alive.
        model.graph.outputs[:] = [values[self.sites.blocks[self.block].mlp.residual]]
        kept = _ancestors(model.graph.outputs[0])
        for name in self.indices:
            if name in values and values[name].producer() in kept:
                model.graph.outputs.append(values[name])
        RemoveUnusedNodesPass()(model)
        return model

    def _run(self, model: ir.Model, names: Sequence[str]) -> Iterator[tuple[int, Values]]:
        session = tapped_session(model, self.graph.parent, names, self.providers)
        for number, window in enumerate(self.windows):
            carried = self.carried[number] if self.carried else {}
            given = {f"{name}.carried": value[None] for name, value in carried.items()}
            yield number, run_window(session, names, window, number, self.graph.name, given)


def _ancestors(value: ir.Value) -> set[ir.Node]:
    seen: set[ir.Node] = set()
    todo = [value.producer()]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [operand.producer() for operand in node.inputs if operand is not None]
    return seen
