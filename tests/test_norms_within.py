"""Norms that stand in the residual stream itself, behind its additions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from iq_export.decide.job import Calibration
from iq_export.passes.scale_residual import scale_residual
from iq_export.pipeline import rewrite
from iq_export.progress import Progress
from iq_export.recipe import Recipe, load_recipe
from iq_export.run.ort import CausalLM
from tests import planted
from tests.planted import Decoder, Planted, Spike

Weights = dict[str, np.ndarray] | None
DECODER = Decoder(bare=True, within=True, spikes=(Spike(1, None),))


def lasting_weights() -> Weights:
    """The norm behind the birth is loud on the spike's channel, as trained ones are."""
    found = planted.weights(DECODER)
    found["layers.1.post_attention_layernorm.weight"][5] = 8
    return found


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted.observe(DECODER, tmp_path_factory.mktemp("lasting"), values=lasting_weights())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted.observe(DECODER, tmp_path_factory.mktemp("within"))


def test_every_product_is_found(data: Planted) -> None:
    sites = data.sites
    assert sites.refused == ()
    assert len({x.node for x in sites.linears}) == 7 * DECODER.blocks
    assert (sites.embedding, sites.final_norm, sites.norms) == ("embed/out", "norm", [])
    first, last = sites.blocks[0], sites.blocks[-1]
    assert (first.attention.stream, first.attention.residual) == ("embed/out", "layers.0/Add/out")
    normed = "layers.0/input_layernorm/out"
    assert first.attention.onward == first.mlp.input == first.mlp.stream == normed
    assert first.mlp.onward == "layers.0/post_attention_layernorm/out"
    assert last.mlp.residual == last.mlp.onward == "layers.3/Add_2/out"
    assert list(sites.bare) == ["embed/out"]


def test_the_next_norm_takes_a_spike_down(data: Planted) -> None:
    """It is written back in front of that norm; no product reads more of it than of other rows."""
    (life,) = data.lifecycles
    assert (life.birth, life.death, life.end, life.channel) == (1, 1, 1, 5)
    assert life.residual_peak > 100 and data.stats.onward_max.max() < 10
    nodes = data.load_inserted().graph
    kinds = [node.op_type for node in nodes if node.domain == "iq"]
    assert kinds == ["SinkDetect", "SinkClampInsert", "SinkRestore"]
    (restore,) = (node for node in nodes if node.op_type == "SinkRestore")
    (norm,) = restore.outputs[0].consumers()
    assert norm.name == "layers.1/post_attention_layernorm"


def test_what_a_norm_leaves_of_a_spike_is_inserted_for_all_that_read_it(lasting: Planted) -> None:
    """The addition too: the template is all that the norm makes of such a row."""
    (life,) = lasting.lifecycles
    assert (life.birth, life.death, life.end) == (1, 1, 2)
    nodes = {node.name: node for node in lasting.load_inserted().graph}
    row = nodes["layers.2/self_attn/q_proj"].inputs[0]
    assert row.producer().op_type == "SinkClampInsert"
    assert row in nodes["layers.2/Add"].inputs


@pytest.mark.parametrize(("which", "others"), [("data", 5e-3), ("lasting", 2e-2)])
def test_insertion_alone_changes_little(
    which: str, others: float, request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue(which)
    assert len(made.sinks) == 1
    rows = [window.ids for window in made.windows[:6]]
    expected = planted.logits(CausalLM(made.path), rows)
    for chunk in (None, 7):
        found = planted.logits(CausalLM(made.inserted), rows, chunk=chunk)
        error = np.abs(found - expected) / np.ptp(expected)
        assert error.max() < 5e-2 and error[:, 1:].max() < others


def quantized_error(folder: Path, recipe: Recipe, limit: float, weights: Weights = None) -> float:
    """The worst position's squared error, as a share of the logits' variance; `limit`: of the
    deviation of a lifecycle that is replaced."""
    path, windows = planted.save(DECODER, folder, weights), planted.windows(DECODER)
    rows, work = [window.ids for window in windows[:4]], folder / f"{limit}"
    work.mkdir()
    given = Calibration(
        windows=windows[4:10], probes=windows[10:14], max_relative_deviation=limit, seed=0,
        providers=planted.CPU,
    )  # fmt: skip
    done = rewrite(path, work, recipe, "fp32", given, Progress(quiet=True))
    assert len(done.sinks) == (1 if limit else 0)
    for sinks, insertion in zip(done.sinks, done.insertions, strict=True):
        assert ("no product reads" in insertion.reason) is not bool(sinks.lifecycle.insert_blocks)
    expected = planted.logits(CausalLM(path), rows)
    found = planted.logits(CausalLM(done.quantized), rows)
    return float((((found - expected) ** 2).mean((0, 2)) / expected.var()).max())


@pytest.mark.parametrize("name", ["w8a8", "w8a8kv8"])
def test_the_quantized_graph_is_the_model(name: str, tmp_path: Path) -> None:
    assert quantized_error(tmp_path, load_recipe(name), 0.1) < 5e-3


def test_a_quantized_graph_with_the_spike_is_not_the_model(tmp_path: Path) -> None:
    """Rounded as it is, with nothing else that holds a spike."""
    plain = replace(load_recipe("w8a8"), rotation=None, side_channels=0, smoothing=False)
    error = quantized_error(tmp_path, plain, 0.1)
    assert error < 5e-3
    assert error < 0.1 * quantized_error(tmp_path, plain, 0.0)


def test_a_lasting_spike_is_quantized(tmp_path: Path) -> None:
    recipe, weights = load_recipe("w8a8"), lasting_weights()
    error = quantized_error(tmp_path, recipe, 0.1, weights)
    assert error < 2e-2
    assert error < 0.2 * quantized_error(tmp_path, recipe, 0.0, weights)


def test_the_stream_is_divided_exactly(data: Planted) -> None:
    model = data.load()
    assert scale_residual(model, data.sites, 3)
    rows = [window.ids for window in data.windows[:3]]
    found = planted.logits(CausalLM(data.save_beside(model, "scaled.onnx")), rows)
    assert np.array_equal(found, planted.logits(CausalLM(data.path), rows))
