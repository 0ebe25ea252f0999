"""An encoder of pictures goes through the pipeline: spikes on any patch, no position, no cache."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from iq_export.baselines import round_to_nearest
from iq_export.decide.job import Calibration
from iq_export.graph import io
from iq_export.observe.outputs import Output, cosines
from iq_export.observe.signals import whole_windows
from iq_export.observe.walk import walk
from iq_export.passes.order import INSERTED
from iq_export.pipeline import Rewrite, rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from tests import seeing
from tests.planted import CPU

QUIET = Progress(quiet=True)
UNSEEN = seeing.windows(8, seed=7)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Rewrite:
    folder = tmp_path_factory.mktemp("seeing")
    path = seeing.save(seeing.SPIKY, folder)
    data = Calibration(
        windows=seeing.windows(), probes=[], max_relative_deviation=0.1, seed=0, providers=CPU,
        heldout=seeing.windows(4, seed=3), insertion="norm", budget=math.inf,
    )  # fmt: skip
    work = folder / "work"
    work.mkdir()
    return rewrite(path, work, load_recipe("w8a8"), "fp16", data, QUIET)


def features(graph: Path | ir.Model) -> np.ndarray:
    """`[rows, features]` of all unseen windows."""
    model = io.load(graph) if isinstance(graph, Path) else graph
    output = Output.of(model.graph)
    runs = walk(model, [output.name], UNSEEN, progress=QUIET, raw=True)
    return np.concatenate([output.rows(values[output.name]) for _, values in runs])


def test_marked_patches_are_the_sinks(done: Rewrite) -> None:
    (life,) = [found.lifecycle for found in done.decisions]
    marked = np.concatenate([seeing.marked_rows(each.values) for each in seeing.windows()])
    assert np.array_equal(life.members, np.flatnonzero(marked))
    assert (life.birth, life.death) == (1, 3) and not life.force_first
    assert life.first_rate == 0 and life.common_tokens(done.stats) == []
    assert done.recall == 1.0 and len(done.sinks) == 1
    (quality,) = done.matching
    assert quality.precision == quality.recall == 1.0


def test_insertion_changes_little_and_saves_int8(done: Rewrite) -> None:
    exact = features(done.traced)
    inserted, shipped = features(done.graph(INSERTED)), features(done.quantized)
    plain = features(round_to_nearest(done))
    rows = np.concatenate([~seeing.marked_rows(each.values) for each in UNSEEN])

    def cosine(found: np.ndarray) -> float:
        return float(cosines(exact[rows], found[rows]).mean())

    assert cosine(inserted) > 0.9999
    assert cosine(shipped) > 0.99
    assert 1 - cosine(plain) > 5 * (1 - cosine(shipped))


def test_the_finished_file_is_compared_by_features(done: Rewrite) -> None:
    assert done.check is not None and done.check.cosine is not None
    assert done.check.tokens == 4 * seeing.SIDE**2
    record = done.check.to_dict()
    assert record["squared_error"] < 0.01 < record["squared_error_of_mean"]
    assert "kl" not in record and "cosine" in done.check.sentence()


def test_the_convolution_is_int8_per_channel(done: Rewrite) -> None:
    graph = io.load(done.quantized).graph
    conv = next(node for node in graph if node.op_type == "Conv")
    pixels, weight = (value.producer() for value in conv.inputs[:2])
    assert pixels.op_type == weight.op_type == "DequantizeLinear"
    assert weight.attributes["axis"].as_int() == 0
    codes, scales = (value.const_value.numpy() for value in weight.inputs[:2])
    assert codes.dtype == np.int8 and scales.shape == (seeing.SPIKY.hidden,)
    before = io.load(done.traced).graph.initializers["patch.weight"].const_value.numpy()
    back = codes * scales.astype(np.float32)[:, None, None, None]
    assert np.abs(back - before).max() <= 0.51 * scales.max()


def test_nothing_spikes_in_a_calm_one(tmp_path: Path) -> None:
    path = seeing.save(seeing.CALM, tmp_path)
    (tmp_path / "work").mkdir()
    data = Calibration(seeing.windows(4), [], 0.1, 0, CPU)
    found = rewrite(path, tmp_path / "work", load_recipe("w8a8"), "fp32", data, QUIET)
    assert found.decisions == [] and found.check is not None and found.check.lost < 0.01


def test_rows_are_those_of_the_stream(tmp_path: Path) -> None:
    path = seeing.save(seeing.CALM, tmp_path, name="picture")
    (window,) = whole_windows(path, seeing.pictures(1))
    assert window.rows == seeing.SIDE**2 and (window.tokens == -1).all()
    assert window.beginning(1) is window
