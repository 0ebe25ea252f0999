"""Which sites are smoothed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from iq_export.decide.smoothing import find_side_channels, find_smoothing
from iq_export.decisions import Smoothing
from iq_export.graph.sites import find_sites
from iq_export.observe.ranges import TensorStats, observe_ranges
from iq_export.progress import Progress
from tests.planted import CPU, Planted


@pytest.fixture(scope="module")
def stats(calm: Planted) -> dict[str, TensorStats]:
    widths = {linear.input: linear.in_features for linear in calm.sites.linears}
    return observe_ranges(
        calm.path, widths, calm.windows[:2], lambda *_: np.zeros(40, bool),
        providers=CPU, progress=Progress(quiet=True), seed=0,
    )  # fmt: skip


def test_every_norm_and_every_gated_path(calm: Planted, stats: dict[str, TensorStats]) -> None:
    found = find_smoothing(calm.load(), calm.sites, stats, rotation=None)
    blocks = calm.sites.blocks
    assert set(found.norms) == {branch.input for block in blocks for branch in block.branches}
    assert set(found.paths) == {block.mlp.output.input for block in blocks}
    assert {choice.factors.shape for choice in found.norms.values()} == {(64,)}
    assert {choice.factors.shape for choice in found.paths.values()} == {(128,)}
    for choice in (*found.norms.values(), *found.paths.values()):
        assert choice.error <= choice.error_without


def test_norm_with_another_reader_is_left(calm: Planted, stats: dict[str, TensorStats]) -> None:
    """Who else reads the norm would see the smoothed value."""
    model = calm.load()
    nodes = {node.name: node for node in model.graph}
    norm = nodes["layers.1/input_layernorm"].outputs[0]
    model.graph.append(ir.node("Abs", [norm], name="reader"))
    found = find_smoothing(model, calm.sites, stats, rotation=None)
    assert norm.name not in found.norms
    assert len(found.norms) == 7


def ungated(calm: Planted) -> ir.Model:
    """Block 0's down-projection reads an activation, not an elementwise product."""
    model = calm.load()
    nodes = {node.name: node for node in model.graph}
    product = nodes["layers.0/mlp/Mul"]
    activation = ir.node("Relu", [product.outputs[0]], name="relu")
    activation.outputs[0].name = "relu.out"
    model.graph.insert_after(product, activation)
    nodes["layers.0/mlp/down_proj"].replace_input_with(0, activation.outputs[0])
    return model


def test_ungated_mlp_has_no_path(calm: Planted, stats: dict[str, TensorStats]) -> None:
    model = ungated(calm)
    sites = find_sites(model)
    assert sites.blocks[0].mlp.linear_path is None
    found = find_smoothing(model, sites, stats | {"relu.out": stats["layers.0/mlp/Mul/out"]},
                           rotation=None)  # fmt: skip
    assert "relu.out" not in found.paths
    assert len(found.paths) == 3


def test_rotation_that_does_not_divide_is_left_out(
    calm: Planted, stats: dict[str, TensorStats]
) -> None:
    """As `rewrite` leaves out the rotation itself: 128 input features, no block of 48."""
    plain = find_smoothing(calm.load(), calm.sites, stats, rotation=None)
    found = find_smoothing(calm.load(), calm.sites, stats, rotation=48)
    for name, choice in plain.paths.items():
        np.testing.assert_array_equal(found.paths[name].factors, choice.factors)


def test_side_channels_are_the_loudest_of_the_smoothed_rows(
    calm: Planted, stats: dict[str, TensorStats]
) -> None:
    smoothing = find_smoothing(calm.load(), calm.sites, stats, rotation=None, side=4)
    found = find_side_channels(calm.sites, stats, smoothing, 4)
    assert set(found) == {block.mlp.output.node for block in calm.sites.blocks}
    for down, channels in found.values():
        smooth = stats[down.input].rows / smoothing.paths[down.input].factors
        expected = np.sort(np.argsort(-np.abs(smooth).max(0), kind="stable")[:4])
        np.testing.assert_array_equal(channels, expected)


def test_side_channels_need_no_smoothing_and_no_gate(
    calm: Planted, stats: dict[str, TensorStats]
) -> None:
    sites = find_sites(ungated(calm))
    stats = stats | {"relu.out": stats["layers.0/mlp/Mul/out"]}
    for smoothing in (
        Smoothing({}, {}),
        find_smoothing(ungated(calm), sites, stats, rotation=None, side=4),
    ):
        found = find_side_channels(sites, stats, smoothing, 4)
        assert set(found) == {block.mlp.output.node for block in sites.blocks}
        down, channels = found["layers.0/mlp/down_proj"]
        assert down.input == "relu.out"
        assert channels.size == 4
    assert not find_side_channels(sites, stats, Smoothing({}, {}), 0)
