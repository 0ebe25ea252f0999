"""Walk a graph block by block, each block on what the blocks before it leave in their final form.

Calibration that sees what the deployed graph will see: the residual stream that enters a block
comes from the quantized blocks in front of it. Every window passes twice per block: once to
observe it as it is, once through its quantized form to get the next block's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from iq_export.graph.sites import Sites
from iq_export.observe.samples import Sample
from iq_export.observe.segments import Segment, segments
from iq_export.observe.walk import Carried, Piece, Values, checked, cut, named


@dataclass
class BlockWalk:
    """A walk over the blocks of `model`; call `observe` and `advance` once per block, in turn.

    `indices`: names of the int32 `[batch, seq]` sink indices; one is carried from the block that
    computes it. Memory: one residual row per calibration token, and the weights of one block.
    """

    model: ir.Model
    sites: Sites
    windows: Sequence[Sample]
    indices: Sequence[str]
    providers: Sequence[str]
    block: int = 0
    carried: list[Carried] = field(default_factory=list)
    _pieces: list[Segment] = field(default_factory=list)

    def __post_init__(self) -> None:
        ends = [block.residual for block in self.sites.blocks]
        self._pieces = segments(self.model.graph, at=ends)
        self.carried = [{} for _ in self.windows]

    def observe(self, names: Sequence[str]) -> Iterator[tuple[int, Values]]:
        """`(window number, values)` of `names` in the current block, and of the indices there."""
        passed = [name for name in names if name in self._pieces[self.block].carried]
        wanted = [name for name in dict.fromkeys(names) if name not in passed]
        wanted += [name for name in self._indices_made() if name not in wanted]
        for number, found in self._run(self._cut(wanted), wanted):
            here = {name: self.carried[number][name] for name in passed}
            values = {**self._indices_known(number), **here, **found}
            yield number, {name: checked(name, value, number) for name, value in values.items()}

    def advance(self, change: Callable[[ir.Model], object]) -> None:
        """Carry what the block gives after `change`, and go on to the next one."""
        piece = self._pieces[self.block]
        made = [name for name in piece.kept if name in piece.made]
        wanted = list(dict.fromkeys([*made, *self._indices_made()]))
        part = self._cut(wanted)
        change(part)
        for number, found in self._run(part, wanted):
            now = {**self.carried[number], **found}
            self.carried[number] = {n: now[n] for n in (*piece.kept, *self.indices) if n in now}
            for name in made:
                checked(name, found[name], number)
        self.block += 1

    def _run(self, part: ir.Model, names: Sequence[str]) -> Iterator[tuple[int, Carried]]:
        with Piece(part, names, self.providers, named(self.model)) as runner:
            for number, window in enumerate(self.windows):
                yield number, runner.run(window, self.carried[number])

    def _cut(self, names: Sequence[str]) -> ir.Model:
        return cut(self.model, self._pieces[self.block].carried, names)

    def _indices_made(self) -> list[str]:
        return [name for name in self.indices if name in self._pieces[self.block].made]

    def _indices_known(self, number: int) -> Carried:
        return {n: v for n, v in self.carried[number].items() if n in self.indices}
