"""The baselines of the table: what people would do without this compiler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import matmul_nbits_quantizer

from iq_export.baselines import baselines
from iq_export.decide.job import Calibration
from iq_export.decisions import Decisions
from iq_export.graph import io
from iq_export.graph.sites import Sites, find_sites
from iq_export.pipeline import rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.run.ort import CausalLM
from iq_export.saved_decisions import Recalled
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
    ((label, model),) = baselines(done).items()
    path = tmp_path / "baseline.onnx"
    io.save(model, path)
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


def test_matmul_nbits_is_what_its_quantizer_makes(tmp_path: Path) -> None:
    """Of ONNX Runtime, of the whole file."""
    traced = planted.save(replace(planted.NO_SPIKES, blocks=1), tmp_path)
    sites = find_sites(io.load(traced))
    chosen = Decisions(load_recipe("w4a16"), "fp32")
    ((label, model),) = baselines(Recalled(chosen, sites, traced, {})).items()
    assert "MatMulNBits" in label
    io.save(model, tmp_path / "ours.onnx")
    whole = onnx.load(traced)
    for size in (64, 128):
        others = [x.node for x in sites.linears if (64 if x.in_features % 128 else 128) != size]
        left = [n.name for n in whole.graph.node if n.op_type == "MatMul"]
        left = [name for name in left if name in others or name not in _products(sites)]
        quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
            whole, block_size=size, is_symmetric=True, nodes_to_exclude=left
        )
        quantizer.process()
        whole = quantizer.model.model
    onnx.save(whole, tmp_path / "theirs.onnx")
    rows = [window.ids for window in planted.windows(planted.NO_SPIKES, count=2)]
    ours, theirs = (logits(CausalLM(tmp_path / f"{n}.onnx"), rows) for n in ("ours", "theirs"))
    assert np.array_equal(ours, theirs)


def _products(sites: Sites) -> set[str]:
    return {linear.node for linear in sites.linears}
