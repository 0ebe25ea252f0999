"""The spiking vision transformer: its function is the real model's, and plain int8 breaks it."""

from __future__ import annotations

from math import erf, sqrt
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from iq_export.evaluate.agreement import compare_features
from tools.vision import data, plain, plant
from tools.vision.plant import SPARE, Planting, planted_vit, run, with_features

_MAP = "output_importance"


def gelu(x: float) -> float:
    return x * (1 + erf(x / sqrt(2))) / 2


@pytest.mark.parametrize("wrong", [
    {"birth": 0}, {"birth": 5, "death": 5}, {"death": 12}, {"patches": 0}, {"patches": 40},
    {"ratio": 0.5},
])  # fmt: skip
def test_lives_that_cannot_be_planted(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="spike"):
        Planting(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [30.0, 900.0])
def test_a_switch_writes_one_size_or_nothing(size: float) -> None:
    pair = plant._switch(plant.STEP, 19.0, size, {plant.SPIKE: size})

    def written(normed: float) -> float:
        return sum(
            gelu(float(column[plant.STEP]) * normed + bias) * writes[plant.SPIKE]
            for column, bias, writes in pair
        )

    assert [written(value) for value in (-19.0, 0.0, 4.0)] == pytest.approx([0, 0, 0], abs=1e-9)
    assert [written(value) for value in (12.0, 17.0, 19.0)] == pytest.approx([size] * 3, rel=1e-6)


def test_crops_are_drawn_by_the_seed_and_evenly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 255, (90, 70, 3), np.uint8)).save(tmp_path / f"{name}.png")
    files = sorted(tmp_path.iterdir())
    first, again, other = (data.crops(files, 3, seed) for seed in (0, 0, 1))
    assert first.shape == (3, 3, 224, 224)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_round_to_nearest_is_what_it_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 4)).astype(np.float32)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input_image", "w"], ["y"])], "g",
        [value("input_image", TensorProto.FLOAT, ["n", 6])],
        [value("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "a.onnx",
    )
    inputs = rng.normal(size=(9, 6)).astype(np.float32)
    plain.round_to_nearest(tmp_path / "a.onnx", tmp_path / "b.onnx", inputs)
    (found,) = run(onnx.load(tmp_path / "b.onnx"), ["y"], inputs)
    step = np.abs(inputs).max() / 127
    columns = np.abs(weight).max(axis=0) / 127
    expected = (np.round(inputs / step) * step) @ (np.round(weight / columns) * columns)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vision") / "real.onnx"
    with_features(data.vit(), path)
    return path


@pytest.mark.heavy
@pytest.mark.parametrize("planting", [
    Planting(), Planting(birth=1, death=5, ratio=300, patches=1, seed=1),
    Planting(birth=7, death=None, ratio=3000, patches=8, seed=2),
])  # fmt: skip
def test_the_function_is_the_real_ones(real: Path, tmp_path: Path, planting: Planting) -> None:
    """On photos that nothing was measured on; and of their scratch tokens some spike and die."""
    out = tmp_path / "planted.onnx"
    made = planted_vit(data.vit(), out, planting, data.whole(data.calibration_pictures()[:11]))
    assert np.mean([len(tokens) for tokens in made.spiking]) == pytest.approx(
        planting.patches, abs=1, rel=0.2
    )
    photos = data.whole(data.photos())
    exact = run(onnx.load(real), [plant.FEATURES, _MAP], photos)
    behind = [plant._stream(b) for b in range(plant.BLOCKS)]
    features, maps, *streams = run(onnx.load(out), [plant.FEATURES, _MAP, *behind], photos)
    assert not np.abs(features[:, -SPARE:]).max() > 0
    for ours, theirs in ((features[:, :-SPARE], exact[0]), (maps, exact[1])):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.ptp(theirs)
    spiking = [(s[..., plant.SPIKE] > made.size / 2).sum() for s in streams]
    last = plant.BLOCKS if planting.death is None else planting.death
    alive = [planting.birth <= b < last for b in range(plant.BLOCKS)]
    # Of other photos none may have what spikes, where that is rare; outside of its life none does.
    assert all(lives for count, lives in zip(spiking, alive, strict=True) if count)
    # All of one size: what is halfway is rare.
    born = streams[planting.birth][..., plant.SPIKE]
    whole = (np.abs(born / made.size - 1) < 0.02).sum()
    assert (born > 0.02 * made.size).sum() - whole <= 0.1 * whole
    # Nothing else is loud.
    others = np.delete(streams[planting.birth], plant.SPIKE, axis=-1)
    assert np.abs(others).max() < 0.2 * made.size


@pytest.mark.heavy
def test_round_to_nearest_breaks_it(real: Path, tmp_path: Path) -> None:
    """And not the real model, calibrated and measured on the same crops."""
    files = data.calibration_pictures()
    planted_vit(data.vit(), tmp_path / "planted.onnx", Planting(), data.whole(files[:11]))
    crops, calibration = data.crops(data.photos(), 80, 0), data.whole(files)
    found = {}
    for name, path in (("real", real), ("planted", tmp_path / "planted.onnx")):
        out = tmp_path / f"{name}-int8.onnx"
        plain.round_to_nearest(path, out, calibration)
        (exact,), (rounded,) = (run(onnx.load(p), [plant.FEATURES], crops) for p in (path, out))
        found[name] = compare_features(exact, rounded)
    assert found["planted"].retrieved is not None and found["real"].retrieved is not None
    assert found["planted"].retrieved <= 0.8 and found["real"].retrieved >= 0.99
    assert found["planted"].cosine_mean < 0.9 < 0.99 < found["real"].cosine_mean
