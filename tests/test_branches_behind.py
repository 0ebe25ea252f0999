"""A third branch behind the MLP, and a constant factor on the whole stream behind each block."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from iq_export.passes.fold_rotation import rotate_stream
from iq_export.passes.scale_residual import scale_residual
from iq_export.run.ort import CausalLM
from iq_export.sinks.templates import norm_outputs
from tests import planted
from tests.planted import Decoder, Spike
from tests.test_structures import quantized_error

BEHIND = Decoder(after=8, factor=0.75)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> planted.Planted:
    return planted.observe(BEHIND, tmp_path_factory.mktemp("behind"))


def test_the_branch_belongs_to_its_block(data: planted.Planted) -> None:
    sites = data.sites
    assert sites.refused == () and len(sites.linears) == 9 * BEHIND.blocks
    first, block = sites.blocks[:2]
    (behind,) = block.after
    assert (behind.stream, behind.norm) == (block.mlp.residual, None)
    assert [x.node for x in behind.linears] == [
        "layers.1/after/gate_proj",
        "layers.1/after/out_proj",
    ]
    assert block.residual == behind.residual == "layers.1/Add_3/out"
    assert (
        block.attention.stream == "layers.0/factor/out" and first.residual == "layers.0/Add_3/out"
    )


def test_it_reads_the_spike_from_its_birth_to_its_death(data: planted.Planted) -> None:
    (life,) = data.lifecycles
    assert (life.birth, life.death, life.end) == (1, 3, 3)
    behind = [f"layers.{i}/Add_2/out" for i in range(BEHIND.blocks)]
    read = norm_outputs(data.sites, life)
    assert [name for name in read if name in behind] == behind[1:3]
    gates = {f"layers.{i}/after/gate_proj" for i in range(BEHIND.blocks)}
    assert life.scope(data.sites) & gates == {f"layers.{i}/after/gate_proj" for i in (1, 2)}


def test_the_spike_is_taken_out(data: planted.Planted) -> None:
    rows = [window.ids for window in data.windows[:6]]
    expected = planted.logits(CausalLM(data.path), rows)
    for chunk in (None, 7):
        found = planted.logits(CausalLM(data.inserted), rows, chunk=chunk)
        assert np.abs(found - expected).max() < 1e-2 * (expected.max() - expected.min())
    nodes = {node.name: node for node in data.load_inserted().graph}
    inserted = [
        nodes[f"layers.{i}/after/gate_proj"].inputs[0].producer().op_type == "SinkClampInsert"
        for i in range(BEHIND.blocks)
    ]
    assert inserted == [False, True, True, False]


def test_the_quantized_graph_is_the_model(tmp_path: Path) -> None:
    """A spike that is not taken out reaches the branch behind the last MLP too."""
    decoder = replace(BEHIND, spikes=(Spike(1, None),))
    error = quantized_error(decoder, tmp_path, 0.1)
    assert error < 1e-2 and error < 0.05 * quantized_error(decoder, tmp_path, 0.0)


def test_the_stream_is_divided_exactly(data: planted.Planted) -> None:
    model, rows = data.load(), [data.windows[0].ids]
    assert scale_residual(model, data.sites, 3)
    found = planted.logits(CausalLM(data.save_beside(model, "scaled.onnx")), rows)
    np.testing.assert_array_equal(found, planted.logits(CausalLM(data.path), rows))


def test_a_stream_that_is_multiplied_can_be_rotated(tmp_path: Path) -> None:
    made = planted.observe(replace(BEHIND, after=0), tmp_path)
    model, rows = made.load(), [made.windows[0].ids]
    assert rotate_stream(model, made.sites) is None
    expected = planted.logits(CausalLM(made.path), rows)
    found = planted.logits(CausalLM(made.save_beside(model, "rotated.onnx")), rows)
    assert np.abs(found - expected).max() < 1e-5 * (expected.max() - expected.min())
