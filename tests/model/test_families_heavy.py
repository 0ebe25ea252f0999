"""Families whose blocks have another structure: traced, and every product of a block in int8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from iq_export.decide.job import Calibration
from iq_export.graph import io
from iq_export.graph.sites import find_sites
from iq_export.model.verify import compare, refer
from iq_export.observe.samples import Window
from iq_export.pipeline import rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from tests.model import families, parity
from tools.families.products import block_products

pytestmark = [pytest.mark.slow, pytest.mark.heavy]


def windows() -> list[Window]:
    rng = np.random.default_rng(0)
    return [Window(rng.integers(4, families.VOCAB, 40).tolist(), False) for _ in range(8)]


@pytest.mark.parametrize("name", families.STRUCTURES)
def test_every_product_of_a_block_is_int8(name: str, tmp_path: Path) -> None:
    model = families.model(name)
    traced = parity.export(model, tmp_path)
    found = compare(traced, refer(model))
    assert found.holds and found.largest < 1e-5
    graph = io.load(traced)
    sites = find_sites(graph)
    assert sites.refused == ()
    assert len(sites.blocks) == 3
    assert block_products(graph) == {linear.node for linear in sites.linears}
    (tmp_path / "work").mkdir()
    data = Calibration(
        windows=windows()[:5], probes=windows()[5:], max_relative_deviation=0.1, seed=0,
        providers=("CPUExecutionProvider",),
    )  # fmt: skip
    done = rewrite(
        traced, tmp_path / "work", load_recipe("w8a8"), "fp16", data, Progress(quiet=True)
    )
    assert done.check is not None and done.check.warning() is None
    nodes = onnx.load(done.quantized, load_external_data=False).graph.node
    made = {value: node.op_type for node in nodes for value in node.output}
    integer = {
        node.name
        for node in nodes
        if node.op_type == "MatMul" and {made.get(v) for v in node.input} == {"DequantizeLinear"}
    }
    assert {linear.node for linear in sites.linears} <= integer
