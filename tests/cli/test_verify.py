"""verify finds changed files and graphs that do not compute."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from iq_export.baselines import quantized_graph
from iq_export.bundle.package import Bundle, update_manifest
from iq_export.cli import main
from iq_export.cli.verify import check_steps
from iq_export.errors import GraphError
from iq_export.evaluate.final_check import finite_values
from iq_export.graph import io
from iq_export.graph.edit import recompute
from iq_export.graph.sites import find_sites
from iq_export.passes.to_half import to_half
from iq_export.run.ort import CausalLM
from tests import planted


def test_whole_bundle(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == 6
    assert main(["verify", str(bundle), "-q"]) == 0
    streams = capsys.readouterr()
    assert "6 files" in streams.out
    assert streams.err == ""


def test_changed_file(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "plan.json").write_text("[]")
    assert main(["verify", str(bundle)]) == 7
    assert "plan.json" in capsys.readouterr().err


def test_graph_that_gives_nan(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "model.onnx").write_bytes(b"nan")
    update_manifest(Bundle.open(bundle, verify=False), rehash=["model.onnx"])
    assert main(["verify", str(bundle)]) == 5
    assert "prefill" in capsys.readouterr().err


def test_nan_that_int8_codes_hide(tmp_path: Path) -> None:
    """The logits are finite; what enters a quantizer is not, once half values are rounded."""
    decoder = planted.Decoder(spikes=(), blocks=2)
    traced = planted.save(decoder, tmp_path)
    sites = find_sites(io.load(traced))
    model = quantized_graph(traced, sites, {x.input: 0.05 for x in sites.linears})
    to_half(model)
    for kind in ("gate", "up"):
        scale = model.graph.initializers[f"layers.1.mlp.{kind}_proj.weight.scale"]
        recompute(scale, lambda array: (array * np.float16(300)).astype(np.float16))
    folder = tmp_path / "bundle"
    folder.mkdir()
    io.save(model, folder / "model.onnx")
    before = sorted(folder.iterdir())
    check_steps(CausalLM(folder / "model.onnx"))
    with pytest.raises(GraphError, match=r"the input of layers\.1/mlp/down_proj, is NaN or inf"):
        finite_values(folder / "model.onnx", list(range(8)))
    assert sorted(folder.iterdir()) == before


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    traced = planted.save(planted.Decoder(spikes=(), blocks=1), tmp_path)
    model = io.load(traced)
    to_half(model)
    folder = tmp_path / "bundle"
    folder.mkdir()
    io.save(model, folder / "model.onnx")
    folder.chmod(0o500)
    try:
        assert finite_values(folder / "model.onnx", list(range(8))) > 5
    finally:
        folder.chmod(0o700)
