"""The int8 KV cache: what is stored, what is read, and that chunks still agree with one pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession

from iq_export.errors import GraphError
from iq_export.graph import io
from iq_export.graph.sites import find_sites
from iq_export.passes.order import INSERTED
from iq_export.passes.quantize_cache import quantize_cache
from iq_export.pipeline import Rewrite, rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.run.generate import generate
from iq_export.run.ort import CausalLM, left_pad
from tests import planted
from tests.planted import DELIMITER, logits
from tests.test_pipeline import calibration

DECODERS = {
    "spiky": planted.Decoder(),
    "delimited": planted.WITH_DELIMITER,
    "calm": planted.NO_SPIKES,
}


@pytest.fixture(scope="module", params=[("spiky", "auto"), ("delimited", "auto"),
                                        ("delimited", "kv"), ("calm", "auto")])  # fmt: skip
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rewrite:
    name, insertion = request.param
    decoder = DECODERS[name]
    folder = tmp_path_factory.mktemp("kv8")
    (folder / "work").mkdir()
    data = replace(calibration(decoder), insertion=insertion)
    return rewrite(
        planted.save(decoder, folder), folder / "work", load_recipe("w8a8kv8"), "fp32", data,
        Progress(quiet=True),
    )  # fmt: skip


def batch() -> list[list[int]]:
    found = planted.windows(planted.WITH_DELIMITER, count=4, length=60, seed=4)
    return [w.ids[:n] for w, n in zip(found, (60, 9, 33, 1), strict=True)]


def test_cache_is_int8_and_remembers_the_sinks(done: Rewrite) -> None:
    session = InferenceSession(done.quantized)
    inputs = {value.name: (value.type, value.shape) for value in session.get_inputs()}
    outputs = {value.name: (value.type, value.shape) for value in session.get_outputs()}
    for kind in ("key", "value"):
        assert inputs[f"past_key_values.3.{kind}"] == ("tensor(int8)", ["batch", 2, "past", 16])
        assert outputs[f"present.3.{kind}"] == ("tensor(int8)", ["batch", 2, "total", 16])
    sinks = {name for name in inputs if "sinks" in name}
    assert sinks == {f"past_sinks.{n}" for n in range(len(done.sinks))}
    for name in sinks:
        assert inputs[name] == ("tensor(int32)", ["batch", "past"])
        assert outputs[name.replace("past", "present")] == ("tensor(int32)", ["batch", "total"])
    assert CausalLM(done.quantized).kv_dtype == np.int8


def test_index_of_the_whole_sequence_is_kept(done: Rewrite) -> None:
    if not done.sinks:
        pytest.skip("no sinks")
    model = CausalLM(done.quantized)
    ids, mask, positions = left_pad(batch(), pad_id=DELIMITER)
    past = None
    for start in range(0, 60, 11):
        end = min(start + 11, 60)
        step = model.forward(ids[:, start:end], mask[:, :end], positions[:, start:end], past)
        past = step.present
    expected = (positions == 0) & (mask == 1)
    if done.sinks[0].count > 1:
        expected |= (ids == DELIMITER) & (mask == 1)
    np.testing.assert_array_equal(past[-1] > 0, expected)


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_and_decode_steps_agree_with_one_pass(done: Rewrite, chunk: int) -> None:
    """With float32 products, where no sum falls to the other side of a rounding."""
    model = done.graph(INSERTED)
    quantize_cache(model, done.sites, {name: found.scale for name, found in done.cache.items()})
    path = done.quantized.with_name("cache_alone.onnx")
    io.save(model, path)
    once, chunked = (logits(CausalLM(path), batch(), chunk=size) for size in (None, chunk))
    for number, row in enumerate(batch()):
        real = slice(60 - len(row), None)
        np.testing.assert_allclose(chunked[number, real], once[number, real], atol=2e-3)


def test_ops_are_known_by_what_they_are(done: Rewrite) -> None:
    """Names are for people: with others the same graph comes out."""
    scales = {name: found.scale for name, found in done.cache.items()}
    found = []
    for renamed in (False, True):
        model = done.graph(INSERTED)
        made = (node for node in model.graph if renamed and node.name.startswith("iq"))
        for number, node in enumerate(made):
            node.name = f"n{number}"
            for place, value in enumerate(node.outputs):
                value.name = f"v{number}.{place}"
        quantize_cache(model, done.sites, scales)
        path = done.quantized.with_name(f"renamed_{renamed}.onnx")
        io.save(model, path)
        sides = ([v.name for v in side] for side in (model.graph.inputs, model.graph.outputs))
        found.append((*sides, logits(CausalLM(path), batch(), chunk=7)))
    assert found[0][:2] == found[1][:2]
    np.testing.assert_array_equal(found[0][2], found[1][2])


def test_quantized_products_agree_but_for_rounding(done: Rewrite) -> None:
    (ids, *_) = batch()
    once, chunked = (logits(CausalLM(done.quantized), [ids], chunk=size) for size in (None, 7))
    assert ((chunked - once) ** 2).sum() / (once**2).sum() < 1e-3


def test_semantic_logits_are_near_the_traced_graph(done: Rewrite) -> None:
    (ids,) = (window.ids for window in planted.windows(planted.WITH_DELIMITER, count=1, seed=8))
    semantic = np.array([p > 0 and token != DELIMITER for p, token in enumerate(ids)])
    exact, found = (logits(CausalLM(p), [ids])[0][semantic] for p in (done.traced, done.quantized))
    assert ((found - exact) ** 2).sum() / (exact**2).sum() < 0.002


def test_generation_takes_the_cache_as_it_is(done: Rewrite) -> None:
    ids = batch()[2]
    model = CausalLM(done.quantized)
    found = list(generate(model, ids, max_new_tokens=5))
    whole = [int(logits(model, [ids + found[:n]])[0, -1].argmax()) for n in range(5)]
    assert found == whole


def test_scales_are_in_the_plan_and_leave_the_sinks_out(done: Rewrite) -> None:
    assert len(done.cache) == 8
    for scale in done.cache.values():
        assert scale.scale == pytest.approx(scale.clip * scale.absmax / 127)
        assert 0 <= scale.error < 0.01
    for sinks in done.sinks:
        assert sinks.form in ("kv", "norm+kv")


def test_attention_without_a_joined_cache_is_refused(tmp_path: Path) -> None:
    decoder = replace(planted.NO_SPIKES, cache=False, blocks=1)
    model = io.load(planted.save(decoder, tmp_path))
    sites = find_sites(model)
    with pytest.raises(GraphError, match=r"layers\.0/self_attn/Attention.*recipe w8a8"):
        quantize_cache(model, sites, {})


def test_decomposed_attention_is_refused(tmp_path: Path) -> None:
    decoder = replace(planted.NO_SPIKES, blocks=1)
    model = io.load(planted.save(decoder, tmp_path))
    sites = find_sites(model)
    (block,) = sites.blocks
    hidden = replace(block, attention=replace(block.attention, attention=None))
    with pytest.raises(GraphError, match="no single Attention op"):
        quantize_cache(model, replace(sites, blocks=(hidden,)), {})


def test_half_loads_in_a_plain_session(tmp_path: Path) -> None:
    decoder = planted.WITH_DELIMITER
    (tmp_path / "work").mkdir()
    done = rewrite(
        planted.save(decoder, tmp_path), tmp_path / "work", load_recipe("w8a8kv8"), "fp16",
        calibration(decoder), Progress(quiet=True),
    )  # fmt: skip
    onnx.checker.check_model(done.quantized)
    once, chunked = (logits(CausalLM(done.quantized), batch()[:1], chunk=c) for c in (None, 13))
    assert np.mean(np.abs(once - chunked) > 0.1) < 0.01
