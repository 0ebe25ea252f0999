"""Progressive detection: tokens born at different blocks on one channel are one lifecycle."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from iq_export.passes.insert_sinks import index_name, index_scopes
from iq_export.run.ort import CausalLM
from tests import planted
from tests.planted import DELIMITER, Planted, logits

EARLY, LATE, DEATH = 1, 2, 4


@pytest.fixture(scope="module")
def rows(staggered: Planted) -> list[list[int]]:
    return [window.ids for window in planted.windows(staggered.decoder, count=4, seed=9)]


def indices(data: Planted, rows: list[list[int]]) -> dict[str, np.ndarray]:
    """Both sink indices `[batch, seq]` of the inserted graph."""
    model = data.load_inserted()
    names = [f"{index_name(0)}.{EARLY}", index_name(0)]
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[name] for name in names)
    session = CausalLM(data.save_beside(model, "both.onnx"), extra_outputs=names)
    ids = np.array(rows)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return session.forward(ids, np.ones_like(ids), positions.copy()).extras


def test_one_lifecycle_with_two_sites(staggered: Planted) -> None:
    (life,) = staggered.lifecycles
    assert (life.birth, life.death, life.clamp_blocks) == (LATE, DEATH, (EARLY, LATE, DEATH))
    (early,) = life.early
    assert (early.block, early.force_first, life.force_first) == (EARLY, True, True)
    assert (staggered.stats.position[early.members] == 0).all()
    (_, late) = life.detections[-1]
    assert (staggered.stats.token[late] == DELIMITER).all()
    np.testing.assert_array_equal(np.union1d(early.members, late), life.members)


def test_early_sinks_are_frozen_and_the_rest_join(
    staggered: Planted, rows: list[list[int]]
) -> None:
    early, union = indices(staggered, rows).values()
    delimiter = np.array(rows) == DELIMITER
    first = np.zeros_like(delimiter)
    first[:, 0] = True
    np.testing.assert_array_equal(early > 0, first)
    np.testing.assert_array_equal(union > 0, first | delimiter)
    np.testing.assert_array_equal(union[first], early[first])


def test_blocks_between_use_the_early_index_only(staggered: Planted) -> None:
    model = staggered.load_inserted()
    (sinks,) = staggered.sinks
    readers = {
        node.inputs[0].name: node.inputs[1].name
        for node in model.graph
        if node.op_type == "SinkClampInsert"
    }
    (early,) = sinks.early
    blocks = staggered.sites.blocks
    between = {blocks[LATE].attention.input, blocks[LATE].mlp.input}
    assert set(early.norms) == between
    assert {readers[name] for name in between} == {f"{index_name(0)}.{EARLY}"}
    assert readers[blocks[EARLY].mlp.output.input] == f"{index_name(0)}.{EARLY}"
    later = {readers[name] for name in (*sinks.norms, blocks[LATE].mlp.output.input)}
    assert later == {index_name(0)}


def test_scopes_part_the_blocks(staggered: Planted) -> None:
    """Ranges leave a token out only where it is a sink already."""
    (sinks,) = staggered.sinks
    early, late = index_scopes(0, sinks, staggered.sites).values()
    assert not early & late
    assert early | late == sinks.lifecycle.scope(staggered.sites)
    assert "layers.1/mlp/down_proj" in early and "layers.2/mlp/gate_proj" in early
    assert "layers.2/mlp/down_proj" in late and "layers.1/mlp/gate_proj" not in early


def test_only_standard_ops_join_the_sites(staggered: Planted) -> None:
    """So that the plugin needs no new op."""
    model = staggered.load_inserted()
    before = {node.name for node in staggered.load().graph}
    new = [node for node in model.graph if node.name not in before]
    assert {node.op_type for node in new if node.domain == "iq"} == {
        "SinkDetect", "SinkClampInsert", "SinkRestore",
    }  # fmt: skip
    union = next(node for node in new if node.outputs[0].name == index_name(0))
    assert (union.op_type, union.outputs[0].dtype) == ("Where", ir.DataType.INT32)


def test_semantic_rows_are_those_of_the_untouched_graph(
    staggered: Planted, rows: list[list[int]]
) -> None:
    semantic = np.array(rows) != DELIMITER
    semantic[:, 0] = False
    exact, ours = (logits(CausalLM(p), rows) for p in (staggered.path, staggered.inserted))
    assert np.abs(ours - exact)[semantic].max() < 0.01 * np.ptp(exact)
