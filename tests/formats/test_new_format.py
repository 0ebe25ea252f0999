"""A new number format is its file, a recipe that names it and a test: nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from iq_export import recipe as recipes
from iq_export.decide.job import Calibration
from iq_export.errors import GraphError
from iq_export.formats.base import WeightFormat, find_format, known_formats, register
from iq_export.formats.int8_activations import INT8
from iq_export.formats.int8_weights import INT8_WEIGHTS
from iq_export.formats.rounding import Rounding
from iq_export.graph import io
from iq_export.passes.quantize import QuantizePlan, quantize
from iq_export.pipeline import rewrite
from iq_export.progress import Progress
from iq_export.recipe import Recipe, load_recipe
from iq_export.run.ort import CausalLM
from tests import planted
from tests.formats.power_of_two import POWER_OF_TWO
from tests.planted import logits


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(recipes, "recipe_folder", lambda: Path(__file__).parent)
    return load_recipe("power-of-two")


def test_recipe_names_it(recipe: Recipe) -> None:
    assert recipe.weights is POWER_OF_TWO
    assert Recipe.from_record(recipe.record()) == recipe
    assert not recipe.simulated


def test_compiled_model_has_it(tmp_path: Path, recipe: Recipe) -> None:
    decoder = replace(planted.NO_SPIKES, blocks=2)
    traced, work = planted.save(decoder, tmp_path), tmp_path / "work"
    work.mkdir()
    data = planted.windows(decoder, count=3)
    calibration = Calibration(
        windows=data[:2], probes=data[2:], max_relative_deviation=0.1, seed=0,
        providers=planted.CPU,
    )  # fmt: skip
    done = rewrite(traced, work, recipe, "fp16", calibration, Progress(quiet=True))
    model = io.load(done.quantized)
    for linear in done.linears:
        scales = model.graph.initializers[f"{linear.weight}.scale"].const_value.numpy()
        assert (np.frexp(scales.astype(np.float32))[0] == 0.5).all()
    rows = [window.ids for window in data]
    exact, found = (logits(CausalLM(path), rows) for path in (traced, done.quantized))
    assert 0 < ((found - exact) ** 2).sum() / (exact**2).sum() < 1e-3


def test_activations_that_no_engine_multiplies_with_it_are_simulated() -> None:
    assert Rounding(POWER_OF_TWO, INT8).simulated


def test_name_of_its_role_is_taken_once() -> None:
    assert known_formats(WeightFormat)[POWER_OF_TWO.name] is find_format(
        WeightFormat, POWER_OF_TWO.name
    )
    with pytest.raises(ValueError, match="two formats for weights"):
        register(POWER_OF_TWO)


def test_graph_of_an_older_opset_is_refused(calm: planted.Planted) -> None:
    model = calm.load()
    later = replace(INT8_WEIGHTS, opset=model.opset_imports[""] + 1)
    with pytest.raises(GraphError, match="INT8 weights need"):
        quantize(model, QuantizePlan(tuple(calm.sites.linears), Rounding(later, None)))


def test_codes_of_another_type_stay_so_in_half(calm: planted.Planted) -> None:
    """FP8 activations are a zero point of another type."""
    from iq_export.passes.to_half import to_half

    model = calm.load()
    eighth = replace(INT8, dtype=ir.DataType.FLOAT8E4M3FN)
    scales = {linear.input: 0.05 for linear in calm.sites.linears}
    quantize(model, QuantizePlan(tuple(calm.sites.linears), Rounding(None, eighth), scales))
    to_half(model)
    codes = [node.outputs[0] for node in model.graph if node.op_type == "QuantizeLinear"]
    assert codes
    assert {value.dtype for value in codes} == {ir.DataType.FLOAT8E4M3FN}
