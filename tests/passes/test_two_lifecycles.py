"""Two lifecycles that overlap: position 0 from block 1 to 3, a delimiter from block 2 to 4."""

from __future__ import annotations

import numpy as np
import pytest

from iq_export.passes.insert_sinks import index_name
from iq_export.run.ort import CausalLM, left_pad
from tests import planted
from tests.planted import DELIMITER, Decoder, Planted, Spike, logits

DECODER = Decoder(
    blocks=5,
    spikes=(Spike(1, 3), Spike(2, 4, channel=9, marker=2, token=DELIMITER)),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted.observe(DECODER, tmp_path_factory.mktemp("two"))


def test_both_are_found_and_replaced(data: Planted) -> None:
    found = [(x.birth, x.death, x.channel, x.force_first) for x in data.lifecycles]
    assert found == [(1, 3, 5, True), (2, 4, 9, False)]
    assert [decision.replaced for decision in data.decisions] == [True, True]
    assert [sinks.count for sinks in data.sinks] == [1, 1]


def test_each_has_its_own_index(data: Planted) -> None:
    model = data.load_inserted()
    names = [index_name(number) for number in (0, 1)]
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[name] for name in names)
    indexed = CausalLM(data.save_beside(model, "indexed.onnx"), extra_outputs=names)
    rows = [window.ids for window in planted.windows(DECODER, count=3, length=30, seed=8)]
    rows[1] = rows[1][:9]
    ids, mask, positions = left_pad(rows, pad_id=DELIMITER)
    found = indexed.forward(ids, mask, positions).extras
    np.testing.assert_array_equal(found[names[0]] > 0, (positions == 0) & (mask == 1))
    np.testing.assert_array_equal(found[names[1]] > 0, (ids == DELIMITER) & (mask == 1))


def test_a_norm_that_both_pass_has_two_inserts_in_a_row(data: Planted) -> None:
    nodes = {node.name: node for node in data.load_inserted().graph}
    reader = nodes["layers.3/self_attn/q_proj"]
    first = reader.inputs[0].producer()
    second = first.inputs[0].producer()
    assert (first.op_type, second.op_type) == ("SinkClampInsert", "SinkClampInsert")
    assert {first.inputs[1].name, second.inputs[1].name} == {index_name(0), index_name(1)}
    assert second.inputs[0].producer().op_type == "RMSNormalization"


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_logits_at_semantic_rows(data: Planted, chunk: int | None) -> None:
    ids = planted.windows(DECODER, count=1, length=64, seed=8)[0].ids
    semantic = np.array([p > 0 and token != DELIMITER for p, token in enumerate(ids)])
    exact = logits(CausalLM(data.path), [ids])[0][semantic]
    found = logits(CausalLM(data.inserted), [ids], chunk=chunk)[0][semantic]
    assert np.abs(found - exact).max() < 0.02 * np.ptp(exact)
