"""Blocks that share their weights compile to what unshared copies of them compile to."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from iq_export.decide.job import Calibration
from iq_export.graph import io
from iq_export.graph.sites import find_sites
from iq_export.passes.own_weights import own_weights
from iq_export.pipeline import Rewrite, rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.run.ort import CausalLM
from tests import planted
from tests.planted import CPU, logits

DECODER = planted.Decoder(spikes=(), blocks=2)
ROWS = [window.ids for window in planted.windows(DECODER, count=2, seed=9)]
SAME = {1: 0}  # block -> the block whose weights it has


def original(name: str) -> str:
    """The weight that `name` is equal to."""
    match = re.match(r"layers\.(\d+)\.(.*)", name)
    if match is None or int(match[1]) not in SAME:
        return name
    return f"layers.{SAME[int(match[1])]}.{match[2]}"


def saved(folder: Path, *, shared: bool) -> Path:
    """The model with equal blocks, whose weights are there once (`shared`) or once per block."""
    folder.mkdir()
    values = planted.weights(DECODER)
    model = planted.proto(DECODER, {name: values[original(name)] for name in values})
    if shared:
        for node in model.graph.node:
            node.input[:] = [original(name) for name in node.input]
        used = {name for node in model.graph.node for name in node.input}
        kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
    path = folder / "model.onnx"
    onnx.save(
        model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=256
    )
    return path


def rewritten(folder: Path, recipe: str, *, shared: bool) -> Rewrite:
    traced = saved(folder, shared=shared)
    (folder / "work").mkdir()
    data = planted.windows(DECODER, count=4, length=24)
    calibration = Calibration(data[:3], data[3:], 0.1, 0, CPU, insertion="kv")
    return rewrite(
        traced, folder / "work", load_recipe(recipe), "fp16", calibration, Progress(quiet=True)
    )


def constants(path: Path) -> dict[str, list[np.ndarray]]:
    """Node name -> the constants that it reads."""
    return {
        node.name: [v.const_value.numpy() for v in node.inputs if v is not None and v.const_value]
        for node in ir.load(path).graph
    }


def test_every_product_has_its_own_weight_and_the_function_stays(tmp_path: Path) -> None:
    path = saved(tmp_path / "shared", shared=True)
    model = io.load(path)
    changed = own_weights(model, find_sites(model))
    assert len(changed) == 7
    sites = find_sites(model)
    assert len({linear.weight for linear in sites.linears}) == len(sites.linears) == 7 * 2
    own = path.with_name("own.onnx")
    io.save_skeleton(model, own)
    assert np.array_equal(logits(CausalLM(own), ROWS), logits(CausalLM(path), ROWS))
    assert own_weights(io.load(own), find_sites(io.load(own))) == []


def test_a_weight_that_is_no_product_s_alone_is_copied_too(tmp_path: Path) -> None:
    """Its other reader must not see what smoothing or rounding makes of it."""
    model = io.load(planted.save(DECODER, tmp_path))
    site = find_sites(model).linears[0]
    table = model.graph.initializers[site.weight]
    model.graph.append(ir.node("Transpose", [table], {"perm": [1, 0]}, name="other"))
    assert own_weights(model, find_sites(model)) == [site.node]


@pytest.mark.parametrize("recipe", ["w8a8", "w8a6", "w4a16"])
def test_shared_weights_give_the_bundle_of_copied_ones(tmp_path: Path, recipe: str) -> None:
    copied = rewritten(tmp_path / "copied", recipe, shared=False)
    shared = rewritten(tmp_path / "shared", recipe, shared=True)
    left, right = constants(copied.quantized), constants(shared.quantized)
    assert left.keys() == right.keys()
    for name, arrays in left.items():
        for ours, theirs in zip(arrays, right[name], strict=True):
            assert np.array_equal(ours, theirs), name
    assert copied.warnings == [] or "share" not in copied.warnings[0]
    assert "7 products share their weight" in shared.warnings[0]
    found = [logits(CausalLM(done.quantized), ROWS) for done in (copied, shared)]
    assert np.array_equal(*found)
    # The embedding is the LM head's too, and stays so.
    graph = ir.load(shared.quantized).graph
    table = graph.initializers["embed_tokens.weight"]
    assert {node.op_type for node in table.consumers()} == {"Gather", "Transpose"}
    assert sum(v.shape == table.shape for v in graph.initializers.values()) == 1
