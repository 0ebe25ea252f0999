"""The forms with keys and values: the same function through chunks, cache, pads and decoding."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from iq_export.decide.restore import with_restore
from iq_export.graph import io
from iq_export.passes.insert_sinks import index_name, insert_sinks
from iq_export.progress import Progress
from iq_export.run.ort import CausalLM
from iq_export.sinks.templates import KV, NORM_AND_KV, SinkTemplates
from tests.passes.test_insert_sinks import rows, sink_nodes
from tests.planted import CPU, DELIMITER, Planted, logits


@dataclass(frozen=True)
class Inserted:
    data: Planted
    form: str
    sinks: SinkTemplates
    model: CausalLM


def insert(data: Planted, form: str) -> Inserted:
    (sinks,) = (replace(s, form=form) for s in data.sinks)
    name = f"inserted.{form}.onnx"
    for _ in range(2):
        model = data.load()
        insert_sinks(model, data.sites, [sinks])
        path = data.save_beside(model, name)
        (sinks,) = with_restore(
            data.path, path, data.sites, [sinks], data.stats, data.windows, providers=CPU,
            progress=Progress(quiet=True),
        )  # fmt: skip
    return Inserted(data, form, sinks, CausalLM(path))


@pytest.fixture(scope="module", params=[KV, NORM_AND_KV])
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["spiky", "delimited"])
def inserted(request: pytest.FixtureRequest, form: str) -> Inserted:
    return insert(request.getfixturevalue(request.param), form)


def test_every_site_has_its_op(inserted: Inserted) -> None:
    sites, life = inserted.data.sites, inserted.sinks.lifecycle
    model = io.load(inserted.model.path)
    attended = [sites.blocks[block].attention.attention for block in life.insert_blocks]
    names = {node.name for node in sink_nodes(model)}
    expected = {f"iq/sinks.0/clamp.{b}" for b in life.clamp_blocks}
    expected |= {f"iq/sinks.0/insert.{name}" for name in inserted.sinks.norms}
    for site in attended:
        assert site is not None
        expected |= {f"iq/sinks.0/attend.{site.key}", f"iq/sinks.0/attend.{site.value}"}
    if inserted.form == KV:
        expected.add(f"iq/sinks.0/set.{life.end}")
    assert names == expected
    assert len(sink_nodes(model, "SinkRestore")) == (inserted.form != KV)


def test_logits_are_those_of_the_untouched_graph(inserted: Inserted) -> None:
    """At semantic rows, but for the templates: keys of a delimiter turn with its position."""
    data = inserted.data
    (ids,) = rows(data)[-1:]
    semantic = np.array([p > 0 and token != DELIMITER for p, token in enumerate(ids)])
    exact, ours = (
        logits(model, [ids])[0][semantic] for model in (CausalLM(data.path), inserted.model)
    )
    assert 0 < np.abs(ours - exact).max() < 0.02 * np.ptp(exact)


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_chunks_and_decode_steps_agree_with_one_pass(inserted: Inserted, chunk: int) -> None:
    """The cache carries the templates."""
    ids = rows(inserted.data)[-1:]
    once, chunked = (logits(inserted.model, ids, chunk=size) for size in (None, chunk))
    np.testing.assert_allclose(chunked, once, atol=1e-4)


def test_padding_changes_nothing(inserted: Inserted) -> None:
    batch = rows(inserted.data)
    together, chunked = (logits(inserted.model, batch, chunk=size) for size in (None, 7))
    assert np.isfinite(together).all()
    for number, row in enumerate(batch):
        alone = logits(inserted.model, [row])[0]
        for found in (together, chunked):
            np.testing.assert_allclose(found[number, -len(row) :], alone, atol=1e-4)


def test_the_cache_holds_the_templates_and_pads_are_untouched(inserted: Inserted) -> None:
    """Two rows: one starts at column 0 of the cache, one behind three pads."""
    data, sinks = inserted.data, inserted.sinks
    ids = rows(data, (12,))[0]
    ids = [token if token != DELIMITER else 0 for token in ids]
    mask = np.ones((2, 15), np.int64)
    mask[1, :3] = mask[0, 12:] = 0
    tokens = np.full((2, 15), DELIMITER)
    tokens[0, :12], tokens[1, 3:] = ids, ids
    positions = np.zeros((2, 15), np.int64)
    positions[0, :12] = positions[1, 3:] = np.arange(12)
    step, exact = (
        model.forward(tokens, mask, positions) for model in (inserted.model, CausalLM(data.path))
    )
    block = sinks.lifecycle.end
    site = data.sites.blocks[block].attention.attention
    assert site is not None and site.heads is not None and sinks.key_values is not None
    for kind, name in enumerate((site.key, site.value)):
        templates = sinks.key_values.rows[name].reshape(sinks.count, site.heads, -1)
        for row, column in ((0, 0), (1, 3)):
            cached = step.present[2 * block + kind][row, :, column]
            assert min(np.abs(cached - t).max() for t in templates) == 0
    early = 2 * sinks.lifecycle.birth
    np.testing.assert_array_equal(step.present[early], exact.present[early])
    pads = step.present[2 * block + 1][1, :, :3]
    assert not any(np.allclose(pads[:, i], t) for t in templates for i in range(3))


def test_residual_is_set_after_death(delimited: Planted) -> None:
    """In the kv form a sink's row is its template, whatever the token was."""
    found = insert(delimited, KV)
    model = io.load(found.model.path)
    life = found.sinks.lifecycle
    node = next(n for n in sink_nodes(model) if n.name == f"iq/sinks.0/set.{life.end}")
    assert node.inputs[1].name == index_name(0)
    model.graph.outputs.append(node.outputs[0])
    path = delimited.save_beside(model, "set.onnx")
    name = node.outputs[0].name
    batch = [[5, 1, DELIMITER, 2], [9, DELIMITER, 3, 3]]
    ids = np.array(batch)
    step = CausalLM(path, extra_outputs=[name]).forward(
        ids, np.ones_like(ids), np.tile(np.arange(4), (2, 1))
    )
    residual = step.extras[name]
    np.testing.assert_array_equal(residual[0, 0], residual[1, 0])
    np.testing.assert_array_equal(residual[0, 2], residual[1, 1])
    assert found.sinks.key_values is not None
    assert {tuple(r) for r in found.sinks.key_values.residual} == {
        tuple(residual[0, 0]), tuple(residual[0, 2]),
    }  # fmt: skip
