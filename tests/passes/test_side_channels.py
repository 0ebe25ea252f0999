"""A side path keeps the function and takes its channels out of what is quantized."""

from __future__ import annotations

import numpy as np

from iq_export.graph import io
from iq_export.observe.walk import walk
from iq_export.passes.rotate import rotate
from iq_export.passes.side_channels import side_channels
from iq_export.progress import Progress
from iq_export.run.ort import CausalLM
from tests.planted import Planted, logits

CHANNELS = np.array([0, 5])


def test_same_function_with_sinks_and_rotation(spiky: Planted) -> None:
    model = spiky.load_inserted()
    downs = [block.mlp.output for block in spiky.sites.blocks]
    assert side_channels(model, {down.node: (down, CHANNELS) for down in downs})
    rotate(model, {down.node: (down, 32) for down in downs})
    path = spiky.path.with_name("side.onnx")
    io.save(model, path)
    rows = [window.ids for window in spiky.windows[:2]]
    exact, found = logits(CausalLM(spiky.inserted), rows), logits(CausalLM(path), rows)
    np.testing.assert_allclose(found, exact, atol=1e-4 * np.ptp(exact))


def test_the_quantized_product_sees_zeros(calm: Planted) -> None:
    model = calm.load()
    down = calm.sites.blocks[0].mlp.output
    side_channels(model, {down.node: (down, CHANNELS)})
    path = calm.path.with_name("side.onnx")
    io.save(model, path)
    name = f"{down.node}/side_mask.out"
    _, values = next(
        walk(path, [name, down.input], calm.windows[:1], progress=Progress(quiet=True))
    )
    assert not values[name][:, CHANNELS].any()
    others = np.delete(np.arange(down.in_features), CHANNELS)
    np.testing.assert_array_equal(values[name][:, others], values[down.input][:, others])
    weight = io.load(path).graph.initializers[down.weight].const_value.numpy()
    assert not weight[CHANNELS].any()


def test_nothing_to_carry(calm: Planted) -> None:
    model = calm.load()
    count = len(list(model.graph))
    assert side_channels(model, {}) is False
    assert len(list(model.graph)) == count
