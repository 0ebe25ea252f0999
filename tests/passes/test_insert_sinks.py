"""Insertion on the planted models: the same function whatever the chunks, pads and lengths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime import InferenceSession

from iq_export.errors import GraphError
from iq_export.graph import io
from iq_export.passes.insert_sinks import index_name, insert_sinks, set_restore
from iq_export.run.ort import CausalLM, left_pad
from tests import planted
from tests.planted import DELIMITER, Planted, logits

# Rows of one calibration-like window, short ones, and one longer than anything calibrated.
LENGTHS = (1, 2, 5, 23, 40, 64)


def rows(data: Planted, lengths: tuple[int, ...] = LENGTHS, seed: int = 5) -> list[list[int]]:
    longest = planted.windows(data.decoder, count=len(lengths), length=64, seed=seed)
    return [window.ids[:length] for window, length in zip(longest, lengths, strict=True)]


@pytest.fixture(scope="module", params=["spiky", "delimited", "staggered"])
def data(request: pytest.FixtureRequest) -> Planted:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def inserted(data: Planted) -> CausalLM:
    return CausalLM(data.inserted)


def sink_nodes(model: ir.Model, kind: str = "SinkClampInsert") -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == kind]


def test_every_site_has_its_op(data: Planted) -> None:
    model = data.load_inserted()
    (sinks,) = data.sinks
    life = sinks.lifecycle
    assert len(sink_nodes(model, "SinkRestore")) == 1
    names = {node.name for node in sink_nodes(model)}
    norms = [*sinks.norms, *(name for site in sinks.early for name in site.norms)]
    assert names == {f"iq/sinks.0/clamp.{b}" for b in life.clamp_blocks} | {
        f"iq/sinks.0/insert.{name}" for name in norms
    }
    detected = [node.inputs[0].name for node in sink_nodes(model, "SinkDetect")]
    births = [block for block, _ in life.detections]
    assert births == sorted({spike.birth for spike in data.decoder.spikes})
    assert detected == [data.sites.blocks[block].mlp.output.input for block in births]
    restored = sink_nodes(model, "SinkRestore")[0].inputs[0]
    assert restored.name == data.sites.blocks[life.end].mlp.residual


def test_all_readers_of_a_site_read_the_op(data: Planted) -> None:
    for node in sink_nodes(data.load_inserted()):
        readers = {user.op_type for user in node.inputs[0].consumers()}
        assert readers <= {"SinkClampInsert", "SinkDetect"}
        assert all(user.op_type == "MatMul" for user in node.outputs[0].consumers())


def test_logits_are_those_of_the_untouched_graph(data: Planted, inserted: CausalLM) -> None:
    """But for the templates' deviation (below 1 %) at semantic rows."""
    (ids,) = rows(data)[-1:]
    semantic = np.array([p > 0 and token != DELIMITER for p, token in enumerate(ids)])
    exact, ours = (logits(model, [ids])[0][semantic] for model in (CausalLM(data.path), inserted))
    assert 0 < np.abs(ours - exact).max() < 0.01 * np.ptp(exact)


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_chunks_and_decode_steps_agree_with_one_pass(
    data: Planted, inserted: CausalLM, chunk: int
) -> None:
    ids = rows(data)[-1:]
    once, chunked = logits(inserted, ids), logits(inserted, ids, chunk=chunk)
    np.testing.assert_allclose(chunked, once, atol=1e-4)


def test_left_padding_changes_nothing(data: Planted, inserted: CausalLM) -> None:
    batch = rows(data)
    together = logits(inserted, batch)
    assert np.isfinite(together).all()
    for number, row in enumerate(batch):
        alone = logits(inserted, [row])[0]
        np.testing.assert_allclose(together[number, -len(row) :], alone, atol=1e-4)


def test_padded_batch_in_chunks(data: Planted, inserted: CausalLM) -> None:
    """Chunks that hold nothing but pads of one row, and pads beside the first token."""
    batch = rows(data)
    once, chunked = logits(inserted, batch), logits(inserted, batch, chunk=7)
    for number, row in enumerate(batch):
        real = slice(len(once[number]) - len(row), None)
        np.testing.assert_allclose(chunked[number, real], once[number, real], atol=1e-4)


def with_index(data: Planted) -> CausalLM:
    """The inserted graph that also gives every sink index, the frozen one as `index_name(0)`."""
    model = data.load_inserted()
    indices = list({node.inputs[1].name: node.inputs[1] for node in sink_nodes(model)}.values())
    model.graph.outputs.extend(indices)
    names = [value.name for value in indices]
    assert index_name(0) in names
    return CausalLM(data.save_beside(model, "indexed.onnx"), extra_outputs=names)


def test_index_names_the_sinks_and_no_pads(data: Planted) -> None:
    ids, mask, positions = left_pad(rows(data), pad_id=DELIMITER)
    found = with_index(data).forward(ids, mask, positions).extras[index_name(0)]
    assert found.dtype == np.int32
    special = ids == DELIMITER if len(data.decoder.spikes) > 1 else np.zeros(ids.shape, bool)
    expected = ((positions == 0) | special) & (mask == 1)
    np.testing.assert_array_equal(found > 0, expected)


def test_two_templates_tell_the_two_kinds_apart(delimited: Planted) -> None:
    ids, mask, positions = left_pad(rows(delimited)[-1:], pad_id=0)
    found = with_index(delimited).forward(ids, mask, positions).extras[index_name(0)][0]
    assert found[0] > 0
    assert set(found[ids[0] == DELIMITER]) == {3 - found[0]}


def noisy(model: ir.Model, sites: dict[str, str], seed: int) -> ir.Model:
    """Add noise to the rows in the new graph input `noise_rows` (bool [batch, seq]) of every value
    in `sites` (value name -> op type that reads it, "" for all)."""
    graph = model.graph
    rng = np.random.default_rng(seed)
    spot = ir.Value(
        name="noise_rows", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape(["batch", "seq"])
    )
    graph.inputs.append(spot)
    last = ir.Value(name="test.last", const_value=ir.tensor(np.array([-1]), name="test.last"))
    graph.register_initializer(last)
    column = ir.node("Unsqueeze", [spot, last], name="test/column")
    column.outputs[0].name = "test.column"
    graph.insert_before(graph[0], column)
    values = {value.name: value for node in graph for value in node.outputs}
    for name, reader in sites.items():
        value = values[name]
        noise = 100 * rng.normal(size=int(value.shape[-1])).astype(np.float32)
        constant = ir.Value(name=f"test.{name}", const_value=ir.tensor(noise, name=f"test.{name}"))
        graph.register_initializer(constant)
        add = ir.node("Add", [value, constant], name=f"test/add.{name}")
        pick = ir.node("Where", [column.outputs[0], add.outputs[0], value], name=f"test/{name}")
        add.outputs[0].name, pick.outputs[0].name = f"test.add.{name}", f"test.noisy.{name}"
        for user, position in list(value.uses()):
            if user not in (add, pick) and reader in ("", user.op_type):
                user.replace_input_with(position, pick.outputs[0])
        graph.insert_after(value.producer(), [add, pick])
    return model


def test_insertion_is_no_no_op(data: Planted) -> None:
    """In every window each site replaces a row; noise over the sink rows just before each op leaves
    the logits as they were, and the same noise changes those of the untouched graph."""
    sites = [node.inputs[0].name for node in sink_nodes(data.load_inserted())]
    touched = noisy(data.load_inserted(), dict.fromkeys(sites, "SinkClampInsert"), seed=0)
    untouched = noisy(data.load(), dict.fromkeys(sites, ""), seed=0)
    outputs = [node.outputs[0] for node in sink_nodes(touched)]
    inputs = [node.inputs[0] for node in sink_nodes(touched)]
    indices = [node.inputs[1].name for node in sink_nodes(touched)]
    touched.graph.outputs.extend([*outputs, *inputs])
    sessions = {
        name: InferenceSession(data.save_beside(model, f"{name}.noisy.onnx"))
        for name, model in {"inserted": touched, "untouched": untouched}.items()
    }
    indexed = with_index(data)
    for window in data.windows[:6]:
        ids = np.array([window.ids])
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.shape[1])[None],
        }
        found = indexed.forward(*feeds.values()).extras
        sinks = np.all([index > 0 for index in found.values()], axis=0)  # known to every site
        past = {f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}": value
                for i, value in enumerate(indexed.empty_past(1))}  # fmt: skip

        def run(name: str, noise: bool, also: tuple[str, ...] = ()) -> list[np.ndarray]:
            mask = sinks & noise  # noqa: B023 - called within the loop only
            feed = feeds | past | {"noise_rows": mask}  # noqa: B023
            return sessions[name].run(["logits", *also], feed)

        names = tuple(value.name for value in (*inputs, *outputs))
        quiet, *values = run("inserted", False, names)
        np.testing.assert_array_equal(run("inserted", True)[0], quiet)
        assert np.abs(run("untouched", True)[0] - run("untouched", False)[0])[~sinks].max() > 0.1
        half = len(inputs)
        for index, before, after in zip(indices, values[:half], values[half:], strict=True):
            changed = (before != after).any(-1)
            np.testing.assert_array_equal(changed, found[index] > 0)


def test_no_sinks_no_change(calm: Planted) -> None:
    model = calm.load()
    before = [node.name for node in model.graph]
    assert insert_sinks(model, calm.sites, []) is False
    assert [node.name for node in model.graph] == before
    assert not model.functions


def test_graph_without_positions_is_refused(spiky: Planted) -> None:
    model = spiky.load()
    model.graph.inputs[2].name = "positions"
    with pytest.raises(GraphError, match="position_ids"):
        insert_sinks(model, spiky.sites, spiky.sinks)


def test_templates_are_attributes(delimited: Planted) -> None:
    """A plugin gets them as fields: row-major, with their shape and its namespace."""
    (sinks,) = delimited.sinks
    model = io.load(delimited.inserted)
    for node in sink_nodes(model):
        attributes = {name: value.value for name, value in node.attributes.items()}
        width = int(node.inputs[0].shape[-1])
        assert list(attributes["template_shape"]) == [sinks.count, width]
        assert len(attributes["templates"]) == sinks.count * width
        assert attributes["plugin_namespace"] == "iq"
        assert attributes["plugin_version"] == "1"
    name, rows_ = next(iter(sinks.norms.items()))
    node = next(n for n in sink_nodes(model) if n.inputs[0].name == name)
    np.testing.assert_array_equal(
        np.float32(node.attributes["templates"].as_floats()), rows_.ravel()
    )


def test_restore_is_set_on_a_rewritten_graph(delimited: Planted) -> None:
    model = delimited.load_inserted()
    (sinks,) = delimited.sinks
    restore = np.arange(2 * 64, dtype=np.float32).reshape(2, 64)
    set_restore(model, [replace(sinks, restore=restore)])
    (node,) = sink_nodes(model, "SinkRestore")
    assert node.attributes["templates"].as_floats() == tuple(restore.ravel())
    assert list(node.attributes["template_shape"].as_ints()) == [2, 64]
