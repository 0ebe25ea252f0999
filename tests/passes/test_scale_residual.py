"""A stream over 2^n gives the same logits; half precision then holds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from iq_export.errors import GraphError
from iq_export.graph import io
from iq_export.graph.edit import constant
from iq_export.graph.sites import Sites, find_sites
from iq_export.passes.scale_residual import scale_residual
from iq_export.run.ort import CausalLM
from tests import planted
from tests.planted import CPU, Decoder, logits

KINDS = {"plain": planted.Decoder(), "post_norms": planted.Decoder(post_norms=True)}


@pytest.fixture(params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Decoder, Path]:
    return KINDS[request.param], planted.save(KINDS[request.param], tmp_path)


def loaded(path: Path) -> tuple[ir.Model, Sites]:
    model = io.load(path)
    return model, find_sites(model)


def peaks(path: Path, names: list[str], rows: list[list[int]]) -> np.ndarray:
    """Largest magnitude of each value over `rows`."""
    from iq_export.observe.samples import Window
    from iq_export.observe.walk import walk
    from iq_export.progress import Progress

    runs = walk(path, names, [Window(row, False) for row in rows], providers=CPU,
        progress=Progress(quiet=True),
    )  # fmt: skip
    return np.max([[np.abs(values[name]).max() for name in names] for _, values in runs], axis=0)


@pytest.mark.parametrize("exponent", [1, 5])
def test_logits_are_equal_to_the_bit_and_the_stream_is_smaller(
    saved: tuple[Decoder, Path], exponent: int
) -> None:
    decoder, path = saved
    rows = [window.ids for window in planted.windows(decoder, count=3)]
    model, sites = loaded(path)
    before = len(model.graph)
    assert scale_residual(model, sites, exponent)
    assert len(model.graph) == before + 1  # the embedding is a sum here: one Mul
    scaled = path.with_name("scaled.onnx")
    io.save(model, scaled)
    assert np.array_equal(logits(CausalLM(path), rows), logits(CausalLM(scaled), rows))
    names = [b.residual for block in sites.blocks for b in block.branches]
    ratio = peaks(path, names, rows) / peaks(scaled, names, rows)
    assert (ratio == 2**exponent).all()


def test_nothing_to_do(saved: tuple[Decoder, Path]) -> None:
    model, sites = loaded(saved[1])
    before = [node.name for node in model.graph]
    assert not scale_residual(model, sites, 0)
    assert [node.name for node in model.graph] == before


def test_an_embedding_that_is_scaled_already_takes_the_factor(tmp_path: Path) -> None:
    """sqrt(hidden) times the embedding, as some models have it: no node is added."""
    decoder = replace(planted.NO_SPIKES, positions=0)
    path = planted.save(decoder, tmp_path)
    model, _ = loaded(path)
    graph = model.graph
    embed = next(node for node in graph if node.name == "embed_tokens")
    times = ir.node("Mul", [embed.outputs[0], constant(graph, "times", np.array(8.0, np.float32))])
    times.name, times.outputs[0].name = "embed_scale", "embed_scale/out"
    for consumer, position in list(embed.outputs[0].uses()):
        if consumer is not times:
            consumer.replace_input_with(position, times.outputs[0])
    graph.insert_after(embed, times)
    whole = tmp_path / "whole.onnx"
    io.save(model, whole)
    model, sites = loaded(whole)
    before = len(model.graph)
    scale_residual(model, sites, 3)
    assert len(model.graph) == before
    io.save(model, tmp_path / "scaled.onnx")
    rows = [window.ids for window in planted.windows(decoder, count=2)]
    exact, found = (logits(CausalLM(tmp_path / n), rows) for n in ("whole.onnx", "scaled.onnx"))
    assert np.array_equal(exact, found)


def test_a_stream_that_something_else_reads_is_refused(saved: tuple[Decoder, Path]) -> None:
    model, sites = loaded(saved[1])
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.append(values[sites.blocks[1].mlp.residual])
    with pytest.raises(GraphError, match=r"'layers\.1/Add_2/out' .*output of the graph"):
        scale_residual(model, sites, 1)
    model, sites = loaded(saved[1])
    values = {value.name: value for node in model.graph for value in node.outputs}
    reader = ir.node("Tanh", [values[sites.blocks[0].mlp.residual]], name="reader")
    model.graph.append(reader)
    with pytest.raises(GraphError, match=r"node 'reader' \(Tanh\) reads it"):
        scale_residual(model, sites, 1)
