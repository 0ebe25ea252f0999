"""Folded rotations keep the function, spread a loud channel, and refuse by name."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from iq_export.graph import io
from iq_export.graph.sites import find_sites
from iq_export.observe.walk import walk
from iq_export.passes.fold_rotation import (
    block_size,
    rotate_attention_values,
    rotate_stream,
)
from iq_export.passes.scale_residual import scale_residual
from iq_export.progress import Progress
from iq_export.run.ort import CausalLM
from tests.planted import Planted, logits


def rotated(data: Planted) -> ir.Model:
    model = data.load()
    assert rotate_stream(model, data.sites) is None
    assert rotate_attention_values(model, data.sites) == []
    io.save(model, data.path.with_name("rotated.onnx"))
    return io.load(data.path.with_name("rotated.onnx"))


@pytest.mark.parametrize(("width", "size"), [(576, 64), (96, 32), (2048, 64), (24, 8), (7, 1)])
def test_block_size(width: int, size: int) -> None:
    assert block_size(width) == size


@pytest.mark.parametrize("chunk", [None, 3])
def test_same_function(spiky: Planted, chunk: int | None) -> None:
    rotated(spiky)
    rows = [spiky.windows[0].ids, spiky.windows[1].ids[:7]]
    exact = logits(CausalLM(spiky.path), rows, chunk=chunk)
    found = logits(CausalLM(spiky.path.with_name("rotated.onnx")), rows, chunk=chunk)
    np.testing.assert_allclose(found, exact, atol=1e-4 * np.ptp(exact))


def test_two_products_at_the_ends_and_nothing_else(calm: Planted) -> None:
    before = len(list(calm.load().graph))
    model = rotated(calm)
    added = [node.name for node in model.graph if "/rotate" in node.name]
    assert len(list(model.graph)) == before + 6 == before + len(added)


def test_a_loud_channel_is_spread(spiky: Planted) -> None:
    """The residual's spike stands on one channel before and on a whole block after."""
    rotated(spiky)
    name = spiky.sites.blocks[1].mlp.residual
    peaks = []
    for path in (spiky.path, spiky.path.with_name("rotated.onnx")):
        runs = walk(path, [name], spiky.windows[:1], progress=Progress(quiet=True))
        peaks.append(np.abs(next(iter(runs))[1][name]).max())
    assert peaks[1] < peaks[0] / 6  # sqrt(64) but for the rest of the row


def test_works_on_a_scaled_stream(spiky: Planted) -> None:
    model = spiky.load()
    scale_residual(model, spiky.sites, 4)
    assert rotate_stream(model, spiky.sites) is None
    path = spiky.path.with_name("scaled.onnx")
    io.save(model, path)
    rows = [spiky.windows[0].ids]
    exact, found = logits(CausalLM(spiky.path), rows), logits(CausalLM(path), rows)
    np.testing.assert_allclose(found, exact, atol=1e-4 * np.ptp(exact))


def test_bias_of_value_and_output_products(calm: Planted) -> None:
    model = calm.load()
    nodes = {node.name: node for node in model.graph}
    rng = np.random.default_rng(0)
    for name, width in (("v_proj", 32), ("o_proj", 64)):
        product = nodes[f"layers.1/self_attn/{name}"]
        bias = ir.Value(
            name=f"{name}.bias",
            const_value=ir.tensor(rng.normal(size=width).astype(np.float32)),
            type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([width]),
        )  # fmt: skip
        model.graph.register_initializer(bias)
        output = product.outputs[0]
        add = ir.node("Add", [output, bias], name=f"{name}/bias")
        add.outputs[0].name, add.outputs[0].shape = f"{name}/bias/out", output.shape
        add.outputs[0].dtype = output.dtype
        for reader, position in list(output.uses()):
            if reader is not add:
                reader.replace_input_with(position, add.outputs[0])
        model.graph.insert_after(product, add)
    biased = calm.path.with_name("biased.onnx")
    io.save(model, biased)
    turned = io.load(biased)
    sites = find_sites(turned)
    assert rotate_stream(turned, sites) is None
    assert rotate_attention_values(turned, sites) == []
    io.save(turned, calm.path.with_name("turned.onnx"))
    rows = [calm.windows[0].ids]
    exact = logits(CausalLM(biased), rows)
    found = logits(CausalLM(calm.path.with_name("turned.onnx")), rows)
    np.testing.assert_allclose(found, exact, atol=1e-4 * np.ptp(exact))


def test_layer_norm_is_refused_and_nothing_changed(calm: Planted) -> None:
    model = calm.load()
    norm = next(node for node in model.graph if node.op_type == "RMSNormalization")
    norm.op_type = "LayerNormalization"
    before = [node.name for node in model.graph]
    refusal = rotate_stream(model, calm.sites)
    assert refusal is not None
    assert refusal.node == norm.name
    assert "does not commute" in refusal.reason
    assert [node.name for node in model.graph] == before


def test_another_reader_of_the_stream_is_refused(calm: Planted) -> None:
    model = calm.load()
    stream = next(
        v for n in model.graph for v in n.outputs if v.name == calm.sites.blocks[0].mlp.residual
    )
    reader = ir.node("Abs", [stream], name="watcher")
    model.graph.insert_after(stream.producer(), reader)
    refusal = rotate_stream(model, calm.sites)
    assert refusal is not None
    assert refusal.node == "watcher"


def test_values_that_another_layer_reads_stay(calm: Planted) -> None:
    model = calm.load()
    first, second = [node for node in model.graph if node.op_type == "Attention"][:2]
    for position in (1, 2):
        second.replace_input_with(position, first.inputs[position])
    left = rotate_attention_values(model, find_sites(model))
    assert [(refusal.node[:8], "too" in refusal.reason) for refusal in left] == [
        ("layers.0", True), ("layers.1", False),
    ]  # fmt: skip
    assert "reads its values too" in left[0].reason
