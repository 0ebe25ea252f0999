"""The baselines of the table: what people would do without this compiler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from iq_export.compile import CompileOptions
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.references import write_baselines
from iq_export.rewrite import Calibration, rewrite
from iq_export.run.ort import CausalLM
from tests import planted
from tests.planted import CPU, logits


@pytest.fixture(params=["w8a8", "w4a16"])
def baseline(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path]:
    """`(label, baseline, traced)` for a recipe."""
    decoder = replace(planted.NO_SPIKES, blocks=2)
    traced = planted.save(decoder, tmp_path)
    (tmp_path / "work").mkdir()
    data = planted.windows(decoder, count=4)
    done = rewrite(
        traced, tmp_path / "work", replace(load_recipe(request.param), smoothing=False), "fp32",
        Calibration(data, [], 0.1, 0, CPU), Progress(quiet=True),
    )  # fmt: skip
    options = CompileOptions("model", tmp_path / "out", recipe=request.param, dtype="fp32")
    ((label, path),) = write_baselines(done, options).items()
    return label, path, traced


def test_baseline_is_quantized_and_runs(baseline: tuple[str, Path, Path]) -> None:
    label, path, traced = baseline
    kinds = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    if "MatMulNBits" in label:
        assert kinds.count("MatMulNBits") == 14
        sizes = {
            attribute.i
            for node in onnx.load(path, load_external_data=False).graph.node
            for attribute in node.attribute
            if attribute.name == "block_size"
        }
        assert sizes == {64, 128}
    else:
        assert label == "round-to-nearest w8a8"
        assert kinds.count("QuantizeLinear") == 8
        assert kinds.count("DequantizeLinear") == 8 + 14
    rows = [window.ids for window in planted.windows(planted.NO_SPIKES, count=2)]
    exact, found = (logits(CausalLM(p), rows) for p in (traced, path))
    assert np.corrcoef(exact.ravel(), found.ravel())[0, 1] > 0.95
