"""Engines of the fused copy: what the plugin's fused ops become in TensorRT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from iq_export.engine.build import Profile, Range, build_engine
from iq_export.engine.plugin import PluginBuild
from iq_export.engine.targets import resolve_target
from iq_export.errors import EngineError
from iq_export.graph import io
from iq_export.passes.fuse import fuse
from iq_export.pipeline import Rewrite, rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from tests import planted
from tests.test_pipeline import calibration

# TensorRT's attention kernel asks for heads of 64.
DECODER = replace(planted.WITH_DELIMITER, heads=2, kv_heads=2, head_dim=64)
SMALL = Profile(Range(1, 1, 2), Range(1, 4, 8), Range(0, 4, 8))
AMPERE = resolve_target("rtx-ampere")

pytestmark = pytest.mark.usefixtures("rtx")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Rewrite:
    folder = tmp_path_factory.mktemp("fused")
    (folder / "work").mkdir()
    data = replace(calibration(DECODER), insertion="norm")
    return rewrite(
        planted.save(DECODER, folder), folder / "work", load_recipe("w8a8"), "fp16", data,
        Progress(quiet=True),
    )  # fmt: skip


def test_every_fused_op_becomes_one_layer(
    done: Rewrite, tmp_path: Path, plugin: PluginBuild
) -> None:
    shipped, beside = done.quantized.read_bytes(), set(done.quantized.parent.iterdir())
    report = build_engine(
        done.quantized, tmp_path / "a.plan", AMPERE, SMALL, plugin=plugin.path, form_reason="so"
    )
    expected = fuse(io.load(done.quantized))
    assert report.fused == expected.ops
    # Inserted templates and clamped products, with side channels or a rotation, and norms as such.
    assert {"AddRmsNormInsertQuantize", "AddRmsNormQuantize"} < set(report.fused)
    assert any(op.startswith("SiluMulClamp") for op in report.fused)
    assert report.sink_nodes == done.sink_nodes
    assert report.absorbed == expected.absorbed > 0
    assert report.plugin_layers == done.sink_nodes - report.absorbed + sum(report.fused.values())
    assert (report.form, report.form_reason) == ("plugin", "so")
    assert report.unfused == expected.reasons
    assert done.quantized.read_bytes() == shipped
    assert set(done.quantized.parent.iterdir()) == beside


def test_what_the_plugin_refuses_names_the_node(
    done: Rewrite, tmp_path: Path, plugin: PluginBuild
) -> None:
    """A template table of another width, found when TensorRT configures the fused layer."""
    model = io.load(done.quantized)
    node = next(n for n in model.graph if "insert" in str(n.name) and n.domain == "iq")
    rows, width = node.attributes["template_shape"].as_ints()
    node.attributes["template_shape"] = type(node.attributes["template_shape"])(
        "template_shape", node.attributes["template_shape"].type, [2 * rows, width // 2]
    )
    path = done.quantized.with_name("spoilt.onnx")
    io.save_skeleton(model, path)
    words = rf"AddRmsNormInsertQuantize '.*fused': .*has {width} elements, a template {width // 2}"
    with pytest.raises(EngineError, match=words):
        build_engine(path, tmp_path / "a.plan", AMPERE, SMALL, plugin=plugin.path)
    path.unlink()
    assert not list(done.quantized.parent.glob(".*fused*"))
