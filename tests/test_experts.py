"""Mixtures of experts: found, spikes taken out, few tokens, quantized."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from iq_export.decide.job import Calibration
from iq_export.graph import io
from iq_export.observe.everyone import for_everyone
from iq_export.observe.walk import walk
from iq_export.passes.fold_rotation import rotate_stream
from iq_export.passes.scale_residual import scale_residual
from iq_export.pipeline import Rewrite, rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.run.ort import CausalLM
from tests import planted
from tests.planted import Decoder, Spike

KINDS = {
    "experts": Decoder(experts=4),
    "shared": Decoder(experts=4, shared=True),
    "sum": Decoder(experts=4, parallel="sum"),
    "norm behind": Decoder(experts=4, post_norms=True),
}


@pytest.fixture(scope="module", params=KINDS)
def data(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> planted.Planted:
    return planted.observe(KINDS[request.param], tmp_path_factory.mktemp("experts"))


def test_every_product_is_found(data: planted.Planted) -> None:
    sites, decoder = data.sites, data.decoder
    assert sites.refused == ()
    assert len(sites.blocks) == decoder.blocks
    routes = decoder.experts + decoder.shared
    assert len({x.node for x in sites.linears}) == (4 + 3 * routes) * decoder.blocks
    mlp = sites.blocks[1].mlp
    assert [route.linear_path for route in mlp.routes] == [1] * routes
    assert [route.rows is None for route in mlp.routes].count(True) == decoder.shared
    assert [x.node for x in mlp.routers] == ["layers.1/mlp/gate"]
    assert mlp.straight is not decoder.post_norms
    assert mlp.inner_features == decoder.features * (2 if decoder.shared else 1)


def test_the_spike_is_found_and_taken_out(data: planted.Planted) -> None:
    """Rows of other tokens, and those of the sink after its death, are what they were."""
    (life,) = data.lifecycles
    assert (life.birth, life.death) == (1, 3)
    assert len(data.sinks) == 1
    rows = [window.ids for window in data.windows[:6]]
    expected = planted.logits(CausalLM(data.path), rows)
    spread = expected.max() - expected.min()
    for chunk in (None, 7, 1):
        found = planted.logits(CausalLM(data.inserted), rows, chunk=chunk)
        error = np.abs(found - expected) / spread
        assert error.max() < 1e-2 and error[:, 1:].max() < 5e-3


def test_every_expert_clamps_its_own_sinks(data: planted.Planted) -> None:
    nodes = {node.name: node for node in data.load_inserted().graph}
    for output in data.sites.blocks[1].mlp.outputs:
        clamp = nodes[output.node].inputs[0].producer()
        assert clamp.op_type == "SinkClampInsert"
        assert clamp.inputs[0].name == output.input


def test_the_stream_is_divided_exactly(data: planted.Planted) -> None:
    model = data.load()
    assert scale_residual(model, data.sites, 3)
    assert planted.changed(data, model, "scaled.onnx") == 0


def test_the_stream_is_rotated_with_the_routers(data: planted.Planted) -> None:
    model = data.load()
    refusal = rotate_stream(model, data.sites)
    assert (refusal is not None) is data.decoder.post_norms
    assert planted.changed(data, model, "rotated.onnx") < 1e-5


def test_what_an_expert_makes_of_all_tokens(data: planted.Planted) -> None:
    """Its own tokens' rows are among them, and the norm's output is what it reads."""
    model, mlp = data.load(), data.sites.blocks[1].mlp
    route = mlp.routes[0]
    assert route.rows is not None
    every = for_everyone(model, route.output.input, route.rows)
    assert for_everyone(model, route.output.input, route.rows) == every
    names = [route.rows, route.output.input, every]
    for _, values in walk(
        model, names, data.windows[:2], providers=planted.CPU, progress=Progress(quiet=True)
    ):
        own, all_rows = values[route.output.input], values[every]
        assert len(all_rows) == 40 > len(own) > 0
        np.testing.assert_allclose(all_rows[values[route.rows]], own, rtol=1e-5)


def rewritten(decoder: Decoder, folder: Path, recipe: str = "w8a8", dtype: str = "fp32") -> Rewrite:
    path, windows = planted.save(decoder, folder), planted.windows(decoder)
    work = folder / "work"
    work.mkdir()
    given = Calibration(
        windows=windows[4:10], probes=windows[10:14], max_relative_deviation=0.1, seed=0,
        providers=planted.CPU,
    )  # fmt: skip
    return rewrite(path, work, load_recipe(recipe), dtype, given, Progress(quiet=True))


def error_of(done: Rewrite, decoder: Decoder) -> float:
    """The worst position's squared error, as a share of the logits' variance."""
    rows = [window.ids for window in planted.windows(decoder)[:4]]
    expected = planted.logits(CausalLM(done.traced), rows)
    found = planted.logits(CausalLM(done.quantized), rows)
    return float((((found - expected) ** 2).mean((0, 2)) / expected.var()).max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_quantized_graph_is_the_model(kind: str, tmp_path: Path) -> None:
    decoder = replace(KINDS[kind], spikes=(Spike(1, None),))
    done = rewritten(decoder, tmp_path)
    assert len(done.sinks) == 1 and done.recall == 1
    quantized = {node for quantizer in done.quantizers.values() for node in quantizer.linears}
    assert quantized == {linear.node for linear in done.sites.linears}
    # Behind a norm small rows count as much as large ones.
    assert error_of(done, decoder) < (5e-2 if decoder.post_norms else 1e-2)


def test_the_half_graph_is_the_model(tmp_path: Path) -> None:
    """Nothing in it is there for detection alone."""
    decoder = replace(KINDS["shared"], spikes=())
    done = rewritten(decoder, tmp_path, "fp16", "fp16")
    assert error_of(done, decoder) < 1e-4
    assert all(
        any(value.uses() or value.is_graph_output() for value in node.outputs)
        for node in io.load(done.quantized).graph
    )


def test_experts_that_few_tokens_choose(tmp_path: Path) -> None:
    """They are calibrated as if all tokens had chosen them, and that is said."""
    decoder = replace(KINDS["experts"], spikes=(), silent=2)
    done = rewritten(decoder, tmp_path)
    (note,) = (said for said in done.warnings if "experts" in said)
    assert note.startswith("8 of 16 experts are chosen by fewer than 100 calibration tokens")
    assert error_of(done, decoder) < 2e-2
    found = {q.linears: q.after for q in done.quantizers.values()}
    tokens = 6 * 40
    for route in done.sites.blocks[0].mlp.routes[2:]:
        gate = found[tuple(x.node for x in route.inputs)]
        down = found[(route.output.node,)]
        assert gate.tokens == down.tokens == tokens and down.absmax > 0


def test_weights_alone_of_an_expert_that_no_token_chooses(tmp_path: Path) -> None:
    decoder = replace(KINDS["experts"], spikes=(), silent=1)
    done = rewritten(decoder, tmp_path, "w4a16")
    assert error_of(done, decoder) < 0.2


def test_chunks_and_padding_change_nothing(data: planted.Planted) -> None:
    """Tokens of all rows go to their experts together."""
    rows = [data.windows[0].ids, data.windows[1].ids[:23], data.windows[2].ids[:1]]
    model = CausalLM(data.path)
    together = planted.logits(model, rows)
    for row, found in zip(rows, together, strict=True):
        alone = planted.logits(model, [row], chunk=5)
        np.testing.assert_allclose(found[-len(row) :], alone[0], atol=1e-3)
