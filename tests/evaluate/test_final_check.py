"""A finished file that is broken is refused, whatever its logits look like; a harsh one is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from iq_export.baselines import quantized_graph
from iq_export.errors import GraphError
from iq_export.evaluate.final_check import (
    MOST_LOST,
    MUCH_LOST,
    FinalCheck,
    block_parts,
    broken,
    final_check,
    finite_results,
    finite_values,
    watched,
)
from iq_export.graph import io
from iq_export.graph.attention import attentions
from iq_export.graph.edit import recompute
from iq_export.graph.sites import Sites, find_sites
from iq_export.observe.samples import Window
from iq_export.observe.tail import Tail
from iq_export.passes.quantize_cache import quantize_cache
from iq_export.passes.to_half import to_half
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from tests import planted
from tests.planted import CPU, Decoder

DECODER = Decoder(spikes=(), blocks=2, seed=3)
WINDOWS = planted.windows(DECODER, count=2, length=32)
QUIET = {"providers": CPU, "progress": Progress(quiet=True)}


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.save(DECODER, tmp_path_factory.mktemp("traced"))


@pytest.fixture(scope="module")
def sites(traced: Path) -> Sites:
    return find_sites(io.load(traced))


def tail(traced: Path) -> Tail:
    return Tail.of_graph(traced, WINDOWS, **QUIET)


def shipped(traced: Path, scale: float = 0.05, *, name: str, half: bool = True) -> ir.Model:
    """int8 everywhere with one range for all activations."""
    sites = find_sites(io.load(traced))
    scales = {linear.input: scale for linear in sites.linears}
    model = quantized_graph(traced, sites, scales)
    if half:
        to_half(model)
    io.save(model, traced.with_name(name))
    return io.load(traced.with_name(name))


def saved(model: ir.Model, traced: Path, name: str) -> Path:
    io.save(model, traced.with_name(name))
    return traced.with_name(name)


def node_of(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def test_what_is_watched(traced: Path) -> None:
    known = watched(shipped(traced, name="known.onnx"))
    assert known["layers.0/self_attn/Attention/out"] == "the result of layers.0/self_attn/Attention"
    assert known["layers.1/Add_2/out"] == "the sum layers.1/Add_2"
    assert known["layers.1/mlp/Mul/out"] == "the input of layers.1/mlp/down_proj"
    assert {"logits", "present.0.key", "present.1.value"} <= set(known)
    assert sum(what.startswith("the input of") for what in known.values()) == 8


def test_a_mask_is_added_as_infinity(traced: Path) -> None:
    """Only what a norm reads is the stream: scores behind an additive mask may be infinite."""
    model = shipped(traced, name="masked.onnx")
    scores = node_of(model, "layers.0/self_attn/q_proj").outputs[0]
    mask = node_of(model, "layers.0/self_attn/k_proj").outputs[0]
    masked = ir.node("Add", [scores, mask], name="masked")
    masked.outputs[0].name, masked.outputs[0].dtype = "masked/out", scores.dtype
    model.graph.append(masked)
    model.graph.append(ir.node("Softmax", [masked.outputs[0]], name="softmax"))
    assert "masked/out" not in watched(model)


def test_an_attention_with_an_int8_cache(tmp_path: Path) -> None:
    """The key that attention reads comes from a DequantizeLinear."""
    path = planted.save(DECODER, tmp_path)
    model = io.load(path)
    sites = find_sites(model)
    caches = [
        x for b in sites.blocks for x in (b.attention.attention.key, b.attention.attention.value)
    ]
    quantize_cache(model, sites, dict.fromkeys(caches, 0.05))
    to_half(model)
    quantized = path.with_name("kv8.onnx")
    io.save(model, quantized)
    found = io.load(quantized)
    assert [(x.heads, x.head_dim) for x in attentions(found)] == [(4, 16)] * 2
    inputs = [what for what in watched(found).values() if what.startswith("the input of")]
    assert len(inputs) == len(caches)
    assert finite_values(quantized, WINDOWS[0].ids) > 10


def test_a_good_file(traced: Path) -> None:
    shipped(traced, name="good.onnx")
    check = final_check(tail(traced), traced.with_name("good.onnx"), WINDOWS, **QUIET)
    assert (check.windows, check.tokens) == (2, 64)
    assert check.top1 > 0.8 and check.lost < MUCH_LOST and check.warning() is None
    assert check.to_dict()["lost"] == check.lost
    assert f"{check.tensors} tensors finite" in check.sentence()


def test_nan_behind_which_a_quantizer_stands(traced: Path, sites: Sites) -> None:
    """Scores overflow in half; int8 codes of the NaN are finite, and so are the logits."""
    model = shipped(traced, name="loud.onnx")
    for kind in ("q", "k"):
        scale = model.graph.initializers[f"layers.1.self_attn.{kind}_proj.weight.scale"]
        recompute(scale, lambda array: (array * np.float16(300)).astype(np.float16))
    path = saved(model, traced, "nan.onnx")
    with pytest.raises(GraphError, match=r"the attention of block 1\): q\.k reaches"):
        final_check(tail(traced), path, WINDOWS, block_parts(sites), **QUIET)
    with pytest.raises(GraphError, match=r"the scores of layers\.1/self_attn/Attention:"):
        finite_values(path, WINDOWS[0].ids)


def test_infinity_in_front_of_a_quantizer(traced: Path, sites: Sites) -> None:
    """A product overflows on hardware; ONNX Runtime alone goes on in float32 and is content."""
    model = shipped(traced, name="large.onnx")
    for kind in ("gate", "up"):
        scale = model.graph.initializers[f"layers.1.mlp.{kind}_proj.weight.scale"]
        recompute(scale, lambda array: (array * np.float16(300)).astype(np.float16))
    path = saved(model, traced, "infinite.onnx")
    match = r"'layers\.1/mlp/Mul/out', the input of layers\.1/mlp/down_proj \(the MLP of block 1\)"
    with pytest.raises(GraphError, match=match) as caught:
        final_check(tail(traced), path, WINDOWS, block_parts(sites), **QUIET)
    assert "half values rounded" in str(caught.value)


def test_a_clip_in_front_of_a_quantizer_hides_nothing(traced: Path) -> None:
    sites = find_sites(io.load(traced))
    scales = {linear.input: 0.05 for linear in sites.linears}
    model = quantized_graph(traced, sites, scales, load_recipe("w8a6").rounding)
    assert watched(model)["layers.1/mlp/Mul/out"] == "the input of layers.1/mlp/down_proj"


@pytest.mark.parametrize("scale", [1e-4, 50.0])
def test_a_broken_file_is_told_with_the_place(traced: Path, sites: Sites, scale: float) -> None:
    """Ranges far too small, or so large that every code is zero."""
    model = shipped(traced, name="plain.onnx")
    name = "layers.1/input_layernorm/out.scale"
    recompute(model.graph.initializers[name], lambda array: np.full_like(array, scale))
    head = node_of(model, "norm").inputs[1]
    recompute(head, lambda array: -array)  # and it says the contrary of what it knows
    path = saved(model, traced, "broken.onnx")
    check = final_check(tail(traced), path, WINDOWS, **QUIET)
    assert check.lost > MOST_LOST
    text = broken(check, traced, path, sites, WINDOWS, **QUIET)
    assert "the attention of block 1" in text and "broken" in text and "\n" not in text


def test_the_criterion_has_no_unit() -> None:
    """Nearly uniform predictions are judged as sharp ones are; zero logits are guessing."""
    for size in (0.01, 1.0):
        rng = np.random.default_rng(0)
        signal = size * rng.normal(size=(64, 50))
        for noise, low, high in ((0.05, 0.0, 0.01), (0.5, 0.1, MUCH_LOST + 0.1), (2.0, 1.0, 9.0)):
            found = signal + noise * size * rng.normal(size=signal.shape)
            assert low <= _lost(signal, found) < high
        assert _lost(signal, np.zeros_like(signal)) == pytest.approx(1, abs=0.05)


def _lost(signal: np.ndarray, found: np.ndarray) -> float:
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (signal, found))
    mean = np.log(np.exp(p).mean(0))
    kl, base = ((np.exp(p) * (p - other)).sum(1).mean() for other in (q, mean))
    return FinalCheck(1, len(p), 0.0, kl, base, 0).lost


def test_much_lost_is_said() -> None:
    text = FinalCheck(4, 512, 0.4, 1.0, 3.0, 100).warning()
    assert text is not None and "33%" in text and "iq-export eval" in text


def test_a_float32_file_is_looked_at_too(traced: Path) -> None:
    model = shipped(traced, name="float.onnx", half=False)
    scale = model.graph.initializers["layers.0.mlp.up_proj.weight.scale"]
    recompute(scale, lambda array: array * np.float32(np.inf))
    path = saved(model, traced, "inf32.onnx")
    with pytest.raises(GraphError, match="in float32"):
        list(finite_results(path, [Window(WINDOWS[0].ids, False)], **QUIET))
