"""A graph whose quantizers can be switched measures what the quantized graphs themselves do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from iq_export.decide.trial import Reference, Trial
from iq_export.formats.int8_activations import INT8
from iq_export.formats.rounding import Rounding
from iq_export.graph import io
from iq_export.graph.sites import find_sites
from iq_export.observe.token_stats import observe_tokens
from iq_export.passes.quantize import QuantizePlan, quantize
from iq_export.passes.switches import add_switches
from iq_export.progress import Progress
from tests import planted
from tests.planted import CPU, Planted

QUIET = {"providers": CPU, "progress": Progress(quiet=True)}


@pytest.fixture(scope="module")
def soft(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A model that is not sure of itself: where it is, rounding changes nothing that it says."""
    folder = tmp_path_factory.mktemp("soft")
    values = planted.weights(planted.NO_SPIKES)
    values["norm.weight"] *= 0.1
    path = planted.save(planted.NO_SPIKES, folder, values)
    data = planted.windows(planted.NO_SPIKES, count=4)
    sites = find_sites(io.load(path))
    stats = observe_tokens(path, sites, data, **QUIET)
    return Planted(planted.NO_SPIKES, path, sites, data, stats, [], [], [], path)


@pytest.fixture(scope="module")
def scales(soft: Planted) -> dict[str, float]:
    """Coarse, so that every quantizer shows."""
    return dict.fromkeys(dict.fromkeys(linear.input for linear in soft.sites.linears), 1.0)


@pytest.fixture(scope="module")
def reference(soft: Planted) -> Reference:
    return Reference.of(soft.path, soft.windows, **QUIET)


@pytest.fixture(scope="module")
def trial(soft: Planted, scales: dict[str, float], reference: Reference) -> Trial:
    model = soft.load()
    quantize(model, QuantizePlan(tuple(soft.sites.linears), Rounding(None, INT8), scales))
    add_switches(model, list(scales))
    path = soft.path.parent / "switches" / "switched.onnx"
    path.parent.mkdir()
    io.save(model, path)
    return Trial(path, list(scales), reference, providers=CPU)


def plain(soft: Planted, scales: dict[str, float], folder: Path) -> Path:
    """The graph with only these quantizers; float weights, so that no product becomes integer."""
    model = soft.load()
    quantize(model, QuantizePlan(tuple(soft.sites.linears), Rounding(None, INT8), scales))
    io.save(model, folder / "plain.onnx")
    return folder / "plain.onnx"


@pytest.mark.parametrize("left", [0, 3, 16])
def test_switched_off_is_left_out(
    soft: Planted, scales: dict[str, float], reference: Reference, trial: Trial,
    tmp_path: Path, left: int,
) -> None:  # fmt: skip
    skipped = list(scales)[:left]
    kept = {name: scale for name, scale in scales.items() if name not in skipped}
    exact, error = reference.ratio(plain(soft, kept, tmp_path), **QUIET)
    assert trial.ratio(skipped) == pytest.approx(exact, rel=1e-3)
    assert (error > 0) == (left < 16)


def test_untouched_graph_costs_nothing(soft: Planted, reference: Reference) -> None:
    assert reference.ratio(soft.path, **QUIET) == (1.0, 0.0)
    assert reference.losses.shape == (4,)


def test_harm_is_a_divergence(scales: dict[str, float], trial: Trial) -> None:
    harms = np.array([trial.harm(name) for name in scales])
    assert (harms > 1e-4).all()
    assert harms.max() > 2 * harms.min()


def test_a_graph_that_is_tried_is_not_changed(
    soft: Planted, scales: dict[str, float], reference: Reference
) -> None:
    """It may be tried again, or written: what a session makes of it is a copy's."""
    model = soft.load()
    quantize(model, QuantizePlan(tuple(soft.sites.linears), Rounding(None, INT8), scales))
    before = ir.to_proto(model).SerializeToString()
    Trial(model, [], reference, providers=CPU)
    reference.ratio(model, **QUIET)
    assert ir.to_proto(model).SerializeToString() == before
