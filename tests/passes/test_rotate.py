"""Rotation keeps the function and spreads what one channel carries."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iq_export.graph import io
from iq_export.observe.walk import walk
from iq_export.passes.rotate import hadamard, rotate, rotate_columns, rotate_rows
from iq_export.progress import Progress
from iq_export.run.ort import CausalLM
from tests.planted import Planted, logits


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_hadamard_is_orthonormal(size: int) -> None:
    matrix = hadamard(size)
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
    np.testing.assert_allclose(np.abs(matrix), size**-0.5, rtol=1e-6)


@pytest.mark.parametrize("size", [3, 48])
def test_hadamard_needs_a_power_of_two(size: int) -> None:
    with pytest.raises(ValueError, match=f"power of two, not {size}"):
        hadamard(size)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 4), st.integers(1, 4), st.integers(1, 8), st.integers(0, 99))
def test_rotating_both_sides_keeps_the_product(
    power: int, groups: int, columns: int, seed: int
) -> None:
    block = 2**power
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(5, block * groups)).astype(np.float32)
    weight = rng.normal(size=(block * groups, columns)).astype(np.float32)
    turned = rotate_columns(rows, block) @ rotate_rows(weight, block)
    np.testing.assert_allclose(turned, rows @ weight, atol=1e-4)


def rotated(data: Planted, path: str, block: int = 32) -> ir.Model:
    """The inserted graph rotated, saved as `path`."""
    model = data.load_inserted()
    downs = [x.mlp.output for x in data.sites.blocks]
    assert rotate(model, {down.node: (down, block) for down in downs})
    io.save(model, data.path.with_name(path))
    return io.load(data.path.with_name(path))


def test_same_function_with_sinks_in_it(spiky: Planted) -> None:
    rotated(spiky, "rotated.onnx")
    rows = [window.ids for window in spiky.windows[:3]]
    exact = logits(CausalLM(spiky.inserted), rows)
    found = logits(CausalLM(spiky.path.with_name("rotated.onnx")), rows)
    np.testing.assert_allclose(found, exact, atol=1e-4 * np.ptp(exact))


def test_one_matrix_and_one_shape_for_all(spiky: Planted) -> None:
    model = rotated(spiky, "rotated.onnx")
    new = [name for name in model.graph.initializers if name.startswith("iq.") and "." in name[3:]]
    assert sorted(new) == ["iq.hadamard.32", "iq.join.128", "iq.split.4.32"]


def test_sinks_are_clamped_before_the_rotation(spiky: Planted) -> None:
    nodes = {node.name: node for node in rotated(spiky, "rotated.onnx").graph}
    split = nodes["layers.1/mlp/down_proj/rotate_split"]
    assert split.inputs[0].producer().op_type == "SinkClampInsert"
    down = nodes["layers.1/mlp/down_proj"]
    assert down.inputs[0].producer().name == "layers.1/mlp/down_proj/rotate_join"


def test_rotation_spreads_an_outlier(calm: Planted) -> None:
    weight = calm.load().graph.initializers["layers.0.mlp.down_proj.weight"].const_value.numpy()
    rows = np.ones((1, weight.shape[0]), np.float32)
    rows[0, 3] = 100
    assert np.abs(rotate_columns(rows, 64)).max() < 25
    rotated(calm, "rotated.onnx", block=64)
    name = "layers.0/mlp/down_proj/rotate_join.out"
    path = calm.path.with_name("rotated.onnx")
    _, values = next(walk(path, [name], calm.windows[:1], progress=Progress(quiet=True)))
    _, plain = next(
        walk(calm.path, ["layers.0/mlp/Mul/out"], calm.windows[:1], progress=Progress(quiet=True))
    )
    expected = rotate_columns(plain["layers.0/mlp/Mul/out"], 64)
    np.testing.assert_allclose(values[name], expected, atol=1e-4)


def test_weight_shared_by_two_blocks_is_rotated_once_each(calm: Planted) -> None:
    model = calm.load()
    nodes = {node.name: node for node in model.graph}
    first, second = (calm.sites.blocks[i].mlp.output for i in (0, 1))
    nodes[second.node].replace_input_with(1, nodes[first.node].inputs[1])
    io.save(model, calm.path.with_name("tied.onnx"))
    rotate(model, {down.node: (down, 32) for down in (first, second)})
    io.save(model, calm.path.with_name("rotated.onnx"))
    rows = [calm.windows[0].ids]
    exact, found = (
        logits(CausalLM(calm.path.with_name(name)), rows) for name in ("tied.onnx", "rotated.onnx")
    )
    np.testing.assert_allclose(found, exact, atol=1e-4 * np.ptp(exact))


def test_nothing_to_rotate(calm: Planted) -> None:
    model = calm.load()
    count = len(list(model.graph))
    assert rotate(model, {}) is False
    assert len(list(model.graph)) == count
