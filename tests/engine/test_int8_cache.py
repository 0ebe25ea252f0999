"""TensorRT builds graphs with an int8 KV cache, sink ops as standard ops and as plugin layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from iq_export.engine.build import Profile, Range, build_engine
from iq_export.engine.plugin import PluginBuild
from iq_export.engine.targets import resolve_target
from iq_export.pipeline import Rewrite, rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from tests import planted
from tests.test_pipeline import calibration

# TensorRT's attention kernel asks for heads of 64.
DECODER = replace(planted.WITH_DELIMITER, heads=2, kv_heads=2, head_dim=64)
SMALL = Profile(Range(1, 1, 2), Range(1, 4, 8), Range(0, 4, 8))

pytestmark = pytest.mark.usefixtures("rtx")


@pytest.fixture(scope="module", params=["kv", "norm"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rewrite:
    folder = tmp_path_factory.mktemp("engine")
    (folder / "work").mkdir()
    data = replace(calibration(DECODER), insertion=request.param)
    return rewrite(
        planted.save(DECODER, folder), folder / "work", load_recipe("w8a8kv8"), "fp16", data,
        Progress(quiet=True),
    )  # fmt: skip


@pytest.mark.parametrize("target", ["rtx-turing", "rtx-all"])
def test_body_form(done: Rewrite, tmp_path: Path, target: str) -> None:
    report = build_engine(done.quantized, tmp_path / "a.plan", resolve_target(target), SMALL)
    assert (report.form, report.sink_nodes) == ("body", done.sink_nodes)


def test_plugin_form(done: Rewrite, tmp_path: Path, plugin: PluginBuild) -> None:
    """Also on keys `[batch, heads, total, head_dim]` with an index per head."""
    report = build_engine(
        done.quantized, tmp_path / "a.plan", resolve_target("rtx-ampere"), SMALL,
        plugin=plugin.path,
    )  # fmt: skip
    nodes = done.sink_nodes - report.absorbed + sum(report.fused.values())
    assert (report.form, report.plugin_layers) == ("plugin", nodes)
