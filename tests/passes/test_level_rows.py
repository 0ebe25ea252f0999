"""Rows of one size in front of a product with a norm behind: same function, small rows kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from iq_export.formats.rounding import W8A8
from iq_export.graph import io
from iq_export.graph.sites import find_sites
from iq_export.passes.level_rows import level_rows
from iq_export.passes.quantize import QuantizePlan, quantize
from iq_export.run.ort import CausalLM
from tests import planted
from tests.planted import logits

POST = replace(planted.NO_SPIKES, post_norms=True)
ROWS = [window.ids for window in planted.windows(POST, count=3)]


def test_a_model_without_post_norms_is_left_alone(tmp_path: Path) -> None:
    model = io.load(planted.save(planted.NO_SPIKES, tmp_path))
    before = len(model.graph)
    assert level_rows(model, find_sites(model)) == []
    assert len(model.graph) == before


def test_every_output_product_gets_one_and_the_logits_stay(tmp_path: Path) -> None:
    path = planted.save(POST, tmp_path)
    model = io.load(path)
    found = level_rows(model, find_sites(model))
    assert [linear.node.rpartition("/")[2] for linear in found] == ["o_proj", "down_proj"] * 4
    assert sum(node.op_type == "ReduceMax" for node in model.graph) == 8
    io.save(model, tmp_path / "level.onnx")
    exact, same = (logits(CausalLM(p), ROWS) for p in (path, tmp_path / "level.onnx"))
    assert np.abs(exact - same).max() < 1e-5 * np.ptp(exact)


def test_small_rows_survive_a_range_made_for_large_ones(tmp_path: Path) -> None:
    """One token's up-projection is a hundred times that of the others; all rows count alike."""
    values = planted.weights(POST)
    loud = 3
    values["embed_tokens.weight"][:, 7] = 0
    values["embed_tokens.weight"][loud, 7] = 30
    for block in range(POST.blocks):
        values[f"layers.{block}.mlp.up_proj.weight"][7] *= 100
    path = planted.save(POST, tmp_path, values)

    def error(levelled: bool) -> float:
        model = io.load(path)
        sites = find_sites(model)
        if levelled:
            level_rows(model, sites)
        nodes = {node.name: node for node in model.graph}
        downs = [block.mlp.output for block in sites.blocks]
        names = [nodes[linear.node].inputs[0].name for linear in downs]
        io.save(model, tmp_path / "float.onnx")
        top = peaks(tmp_path / "float.onnx", names)
        scales = {name: peak / 127 for name, peak in top.items()}
        quantize(model, QuantizePlan(tuple(downs), W8A8, scales))
        io.save(model, tmp_path / "int8.onnx")
        exact, found = (logits(CausalLM(p), rows) for p in (path, tmp_path / "int8.onnx"))
        return float(((exact - found) ** 2).mean() / (exact**2).mean())

    rows = [[loud, *row[1:]] for row in ROWS]

    def peaks(path: Path, names: list[str]) -> dict[str, float]:
        from iq_export.observe.samples import Window
        from iq_export.observe.walk import walk
        from iq_export.progress import Progress

        runs = walk(path, names, [Window(row, False) for row in rows], providers=planted.CPU,
            progress=Progress(quiet=True),
        )  # fmt: skip
        found = [values for _, values in runs]
        return {name: max(float(np.abs(v[name]).max()) for v in found) for name in names}

    assert error(levelled=True) < 0.2 * error(levelled=False)
