"""With the scale's power of two in front of q.k logits are equal, and half holds the product."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from iq_export.decide.job import Calibration
from iq_export.errors import GraphError
from iq_export.graph import io
from iq_export.graph.attention import attention_scale, attentions
from iq_export.observe.peaks import PeakObserver
from iq_export.observe.samples import Window
from iq_export.observe.walk import observe
from iq_export.passes.scale_query import scale_queries
from iq_export.pipeline import rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.run.ort import CausalLM
from tests import planted
from tests.planted import CPU, Decoder, logits

SMALL = Decoder(spikes=(), blocks=2)
NORMED = Decoder(spikes=(), blocks=2, post_norms=True)
WINDOWS = planted.windows(SMALL, count=3, length=24)
ROWS = [window.ids for window in WINDOWS]


def louder(factor: float, decoder: Decoder = SMALL) -> dict[str, np.ndarray]:
    """Weights whose queries and keys are `factor` times as large in block 1."""
    values = planted.weights(decoder)
    for kind in ("q", "k"):
        values[f"layers.1.self_attn.{kind}_proj.weight"] *= np.float32(factor)
    return values


def peaks(path: Path, limit: float = 0.0, windows: Sequence[Window] = WINDOWS) -> dict[str, float]:
    observer = PeakObserver(io.load(path), len(windows), limit)
    observe(path, [observer], windows, progress=Progress(quiet=True))
    return observer.peaks


@pytest.mark.parametrize("decoder", [SMALL, NORMED, Decoder(spikes=(), blocks=2, head_dim=8)])
def test_same_function_and_smaller_product(tmp_path: Path, decoder: Decoder) -> None:
    """Head sizes whose root is a power of two, and one whose is not; with norms of q and k."""
    path = planted.save(decoder, tmp_path)
    model = io.load(path)
    names = [attended.node for attended in attentions(model)]
    assert scale_queries(model, names) == names
    assert len(names) == 2
    for node in model.graph:
        if node.op_type == "Attention":
            assert 1 <= attention_scale(node) < 2
    scaled = path.with_name("scaled.onnx")
    io.save_skeleton(model, scaled)
    np.testing.assert_allclose(
        logits(CausalLM(scaled), ROWS), logits(CausalLM(path), ROWS), rtol=1e-5, atol=1e-5
    )
    before, after = peaks(path), peaks(scaled)
    # 16 ** -0.5 is a quarter, 8 ** -0.5 a quarter times 2 ** 0.5.
    assert after == {node: pytest.approx(peak / 4, rel=1e-5) for node, peak in before.items()}


def test_nothing_to_do(tmp_path: Path) -> None:
    model = io.load(planted.save(SMALL, tmp_path))
    nodes = [node for node in model.graph if node.op_type == "Attention"]
    assert scale_queries(model, []) == []
    nodes[0].attributes["scale"] = ir.AttrFloat32("scale", 1.0)
    assert scale_queries(model, [str(nodes[0].name)]) == []


def test_the_product_is_that_of_attention(tmp_path: Path) -> None:
    """Of grouped heads, after the rotary embedding, over all pairs of a window."""
    path = planted.save(SMALL, tmp_path)
    model = io.load(path)
    graph = CausalLM(path)
    for attended in attentions(model):
        assert (attended.heads, attended.head_dim, attended.scale) == (4, 16, 0.25)
    step = graph.forward(np.array([ROWS[0]]), np.ones((1, 24), np.int64), np.arange(24)[None], None)
    key = step.present[2][0]  # block 1, [kv_heads, seq, head_dim]
    query = attentions(model)[1].query
    tapped = io.load(path)
    tapped.graph.outputs.append(
        next(v for node in tapped.graph for v in node.outputs if v.name == query)
    )
    beside = path.with_name("tapped.onnx")
    io.save_skeleton(tapped, beside)
    whole = CausalLM(beside, extra_outputs=[query])
    found = whole.forward(np.array([ROWS[0]]), np.ones((1, 24), np.int64), np.arange(24)[None])
    scores = found.extras[query][0] @ np.repeat(key, 2, axis=0).transpose(0, 2, 1)
    one = peaks(path, windows=WINDOWS[:1])
    node = attentions(model)[1].node
    assert one[node] == pytest.approx(float(np.abs(scores).max()), rel=1e-5)
    # A bound is given where it is enough.
    assert peaks(path, limit=1e9)[node] >= one[node]


def run(folder: Path, values: dict[str, np.ndarray], dtype: str) -> object:
    traced = planted.save(SMALL, folder, values)
    (folder / "work").mkdir()
    data = Calibration(WINDOWS, WINDOWS[:1], 0.1, 0, CPU, insertion="kv")
    return rewrite(traced, folder / "work", load_recipe("fp16"), dtype, data, Progress(quiet=True))


def test_products_beyond_half_are_scaled_before(tmp_path: Path) -> None:
    """q.k reaches 1.5 times half's largest number, the scores do not."""
    folder = tmp_path / "plain"
    folder.mkdir()
    node = "layers.1/self_attn/Attention"
    reach = peaks(planted.save(SMALL, folder))[node]
    folder = tmp_path / "loud"
    folder.mkdir()
    done = run(folder, louder((1.5 * 65504 / reach) ** 0.5), "fp16")
    (note,) = [text for text in done.warnings if "queries and keys" in text]
    assert "in 1 attentions" in note and node in note
    scaled = {node.name: attention_scale(node) for node in io.load(done.quantized).graph
              if node.op_type == "Attention"}  # fmt: skip
    assert scaled == {"layers.0/self_attn/Attention": 0.25, node: 1.0}
    assert done.check.lost < 0.05


def test_scores_beyond_half_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        GraphError, match=r"the attention of block 1\): q\.k reaches .*--dtype fp32"
    ):
        run(tmp_path, louder(1000.0), "fp16")


def test_float32_holds_them(tmp_path: Path) -> None:
    assert run(tmp_path, louder(1000.0), "fp32").check.top1 == 1
