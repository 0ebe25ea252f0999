"""A walk over the blocks gives what the whole graph gives and carries a changed block on."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from iq_export.formats.rounding import W8A8
from iq_export.observe.block_walk import BlockWalk
from iq_export.observe.walk import walk
from iq_export.passes.insert_sinks import index_name
from iq_export.passes.quantize import QuantizePlan, quantize
from iq_export.progress import Progress
from tests.planted import CPU, Planted


def as_it_is(_: ir.Model) -> None:
    """No change."""


def test_same_values_as_the_whole_graph(spiky: Planted) -> None:
    windows = spiky.windows[:3]
    blocks = BlockWalk(spiky.load_inserted(), spiky.sites, windows, [index_name(0)], CPU)
    nodes = {node.name: node for node in spiky.load_inserted().graph}
    for block in spiky.sites.blocks:
        names = [
            str(nodes[linear.node].inputs[0].name)
            for branch in block.branches
            for linear in branch.linears
        ]
        names = list(dict.fromkeys(names))
        found = dict(blocks.observe(names))
        wanted = walk(spiky.inserted, names, windows, progress=Progress(quiet=True))
        for number, values in wanted:
            for name, value in values.items():
                np.testing.assert_allclose(found[number][name], value, rtol=1e-4, atol=1e-4)
        blocks.advance(as_it_is)


def test_index_is_there_from_its_block_on(spiky: Planted) -> None:
    index = index_name(0)
    blocks = BlockWalk(spiky.load_inserted(), spiky.sites, spiky.windows[:2], [index], CPU)
    known = []
    for block in spiky.sites.blocks:
        (_, values), *_ = blocks.observe([block.mlp.output.input])
        known.append(index in values)
        if known[-1]:
            assert values[index][0] == 1
            assert not values[index][1:].any()
        blocks.advance(as_it_is)
    assert known == [False, True, True, True]


def test_later_blocks_see_quantized_ones(calm: Planted) -> None:
    def coarse(model: ir.Model) -> None:
        linears = tuple(
            linear
            for branch in (calm.sites.blocks[0].attention, calm.sites.blocks[0].mlp)
            for linear in branch.linears
        )
        quantize(model, QuantizePlan(linears, W8A8, {linears[0].input: 0.5}))

    inputs = []
    for change in (as_it_is, coarse):
        blocks = BlockWalk(calm.load(), calm.sites, calm.windows[:1], [], CPU)
        blocks.advance(change)
        (_, values), *_ = blocks.observe([calm.sites.blocks[1].attention.input])
        inputs.append(values[calm.sites.blocks[1].attention.input])
    difference = np.abs(inputs[0] - inputs[1]).max()
    assert 1e-3 < difference < 2
