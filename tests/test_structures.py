"""Parallel branches and branches with a norm behind them alone: found, inserted, quantized."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from iq_export.decide.job import Calibration
from iq_export.graph import io
from iq_export.graph.sites import find_sites
from iq_export.passes.fold_rotation import rotate_stream
from iq_export.passes.insert_sinks import insert_sinks
from iq_export.passes.scale_residual import scale_residual
from iq_export.pipeline import rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.run.ort import CausalLM
from tests import planted
from tests.planted import Decoder, Spike

KINDS = {
    "sum": Decoder(parallel="sum"),
    "chain": Decoder(parallel="chain"),
    "bare": Decoder(bare=True, post_norms=True),
    "bare chain": Decoder(bare=True, post_norms=True, parallel="chain"),
}


@pytest.fixture(scope="module", params=KINDS)
def data(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> planted.Planted:
    return planted.observe(KINDS[request.param], tmp_path_factory.mktemp(request.param))


def test_every_product_is_found(data: planted.Planted) -> None:
    sites, decoder = data.sites, data.decoder
    assert sites.refused == ()
    assert [block.index for block in sites.blocks] == list(range(decoder.blocks))
    assert len({x.node for x in sites.linears}) == 7 * decoder.blocks
    block = sites.blocks[1]
    at, ends = "layers.1", ("layers.1/Add", "layers.1/Add_2")
    attention, mlp = block.attention, block.mlp
    assert (attention.kind, mlp.kind) == ("attention", "mlp")
    assert mlp.linear_path == 1 and attention.attention is not None
    assert mlp.residual == f"{at}/Add_2/out"
    if decoder.bare:
        assert (attention.norm, mlp.norm, sites.norms) == (None, None, [])
        assert (attention.input, mlp.input) == (attention.stream, mlp.stream)
        assert mlp.added == f"{at}/mlp/post_norm/out"
        if not decoder.parallel:
            assert (attention.residual, mlp.stream) == (f"{at}/Add/out", f"{at}/Add/out")
            assert (attention.adds, mlp.adds) == (ends[:1], ends[1:])
            return
        assert [len(linears) for linears in sites.bare.values()] == [5] * decoder.blocks
    assert attention.stream == mlp.stream == "layers.0/Add_2/out"
    assert attention.residual == mlp.residual
    assert attention.adds == ends
    assert mlp.adds == (ends if decoder.parallel == "sum" else ends[1:])
    norms = [norm for norm in sites.norms if norm.node.startswith(at)]
    if decoder.bare:
        return
    assert [len(norm.linears) for norm in norms] == ([5] if decoder.parallel == "sum" else [3, 2])


def test_the_spike_is_found_and_taken_out(data: planted.Planted) -> None:
    """Rows of other tokens, and those of the sink after its death, are what they were."""
    (life,) = data.lifecycles
    assert (life.birth, life.death) == (1, 3)
    assert len(data.sinks) == 1
    rows = [window.ids for window in data.windows[:6]]
    expected = planted.logits(CausalLM(data.path), rows)
    spread = expected.max() - expected.min()
    for chunk in (None, 7):
        found = planted.logits(CausalLM(data.inserted), rows, chunk=chunk)
        error = np.abs(found - expected) / spread
        assert error.max() < 1e-2 and error[:, 1:].max() < 5e-3


def test_a_token_of_which_products_read_more_than_its_spike_is_left_alone(tmp_path: Path) -> None:
    """No norm makes the spike all that is read of a sink: weights that hardly hear it read the
    token's own content, which no template has."""
    made = planted.observe(replace(KINDS["bare"], heard=0.01), tmp_path)
    (decision,) = made.decisions
    assert (decision.lifecycle.birth, decision.replaced) == (1, False)
    assert "above the limit" in decision.reason


def test_no_product_reads_the_spike(data: planted.Planted) -> None:
    """In the rewritten graph no row of a product's input stands out between birth and death."""
    model = data.load_inserted()
    nodes = {node.name: node for node in model.graph}
    blocks = data.sites.blocks[2:4]
    read = {nodes[x.node].inputs[0] for block in blocks for x in block.attention.inputs}
    assert all(value.producer().op_type == "SinkClampInsert" for value in read)
    stream = nodes[blocks[0].mlp.adds[-1]].inputs
    assert not any(value.producer().op_type == "SinkClampInsert" for value in stream)


def quantized_error(decoder: Decoder, folder: Path, limit: float) -> float:
    """The worst position's squared error in W8A8, as a share of the logits' variance; `limit`: of
    the deviation of a lifecycle that is replaced."""
    path, windows = planted.save(decoder, folder), planted.windows(decoder)
    rows, work = [window.ids for window in windows[:4]], folder / f"{limit}"
    work.mkdir()
    given = Calibration(
        windows=windows[4:10], probes=windows[10:14], max_relative_deviation=limit, seed=0,
        providers=planted.CPU,
    )  # fmt: skip
    done = rewrite(path, work, load_recipe("w8a8"), "fp32", given, Progress(quiet=True))
    assert len(done.sinks) == (1 if limit else 0)
    expected = planted.logits(CausalLM(path), rows)
    found = planted.logits(CausalLM(done.quantized), rows)
    return float((((found - expected) ** 2).mean((0, 2)) / expected.var()).max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_quantized_graph_is_the_model(kind: str, tmp_path: Path) -> None:
    decoder = replace(KINDS[kind], spikes=(Spike(1, None),))
    error = quantized_error(decoder, tmp_path, 0.1)
    assert error < 5e-3
    if decoder.bare:  # no norm holds the spike down
        assert error < 0.05 * quantized_error(decoder, tmp_path, 0.0)


def test_the_stream_is_divided_exactly(data: planted.Planted) -> None:
    model = data.load()
    assert scale_residual(model, data.sites, 3)
    assert planted.changed(data, model, "scaled.onnx") == 0


def test_the_stream_is_rotated_where_norms_allow_it(data: planted.Planted) -> None:
    model = data.load()
    refusal = rotate_stream(model, data.sites)
    if data.decoder.bare:
        assert refusal is not None and "reads the residual stream" in refusal.reason
    else:
        assert refusal is None
    assert planted.changed(data, model, "rotated.onnx") < 1e-5


@pytest.mark.parametrize("first", [0, 1])
def test_two_lifecycles_meet_where_products_read_the_stream(first: int, tmp_path: Path) -> None:
    """Where one ends and the other lives, rows are inserted into what the first one restored."""
    made = planted.observe(KINDS["bare"], tmp_path)
    (lives,) = made.sinks
    end = made.sites.blocks[2]
    norms = {
        n: rows
        for n, rows in lives.norms.items()
        if n not in (end.mlp.residual, "layers.3/Add/out")
    }
    ends = replace(lives, lifecycle=replace(lives.lifecycle, end=2), norms=norms)
    model, both = made.load(), [lives, lives]
    both[first] = ends
    insert_sinks(model, made.sites, both)
    nodes = {node.name: node for node in model.graph}
    insert = nodes["layers.3/self_attn/q_proj"].inputs[0].producer()
    restore = insert.inputs[0].producer()
    assert (insert.op_type, restore.op_type) == ("SinkClampInsert", "SinkRestore")
    assert restore.inputs[0].name == end.mlp.residual
    assert restore.outputs[0] in nodes["layers.3/Add"].inputs
    rows = [made.windows[0].ids]
    assert np.isfinite(planted.logits(CausalLM(made.save_beside(model, "two.onnx")), rows)).all()


def test_what_else_reads_the_sum_of_one_branch_keeps_it_from_being_parallel(
    tmp_path: Path,
) -> None:
    decoder = replace(KINDS["chain"], spikes=())
    model = io.load(planted.save(decoder, tmp_path))
    value = next(v for n in model.graph for v in n.outputs if v.name == "layers.1/Add/out")
    reader = ir.node("Tanh", [value], name="reader")
    model.graph.insert_after(value.producer(), reader)
    sites = find_sites(model)
    assert len(sites.blocks) == decoder.blocks - 1
    assert any("layers.1/Add_2" in refusal.node for refusal in sites.refused)
