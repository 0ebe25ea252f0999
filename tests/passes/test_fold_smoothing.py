"""Folded smoothing leaves the function as it is and divides the activations by its factors."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime import InferenceSession

from iq_export.decisions import Smoothing, SmoothingChoice
from iq_export.graph.sites import find_sites
from iq_export.observe.samples import Window
from iq_export.observe.walk import walk
from iq_export.passes.fold_smoothing import fold_smoothing
from iq_export.progress import Progress
from iq_export.run.ort import CausalLM
from tests.planted import Planted, logits


def choices(data: Planted, *, norms: bool = True, paths: bool = True) -> Smoothing:
    """Random factors for every site."""
    rng = np.random.default_rng(0)

    def choice(width: int) -> SmoothingChoice:
        return SmoothingChoice("test", np.exp(rng.normal(size=width)).astype(np.float32), 0, 0)

    blocks = data.sites.blocks
    return Smoothing(
        {b.input: choice(64) for x in blocks for b in x.branches} if norms else {},
        {x.mlp.output.input: choice(128) for x in blocks} if paths else {},
    )


@pytest.mark.parametrize(("norms", "paths"), [(True, True), (True, False), (False, True)])
def test_same_function(spiky: Planted, norms: bool, paths: bool) -> None:
    model = spiky.load()
    assert fold_smoothing(model, spiky.sites, choices(spiky, norms=norms, paths=paths))
    path = spiky.path.with_name("smoothed.onnx")
    ir.save(model, path)
    rows = [window.ids for window in spiky.windows[:3]]
    exact = logits(CausalLM(spiky.path), rows)
    np.testing.assert_allclose(logits(CausalLM(path), rows), exact, atol=1e-4 * np.ptp(exact))


def test_activations_are_divided_by_the_factors(spiky: Planted) -> None:
    smoothing, model = choices(spiky), spiky.load()
    fold_smoothing(model, spiky.sites, smoothing)
    path = spiky.path.with_name("smoothed.onnx")
    ir.save(model, path)
    window = Window(spiky.windows[0].ids[:8], False)
    factors = {**smoothing.norms, **smoothing.paths}
    before, after = (
        next(walk(p, list(factors), [window], progress=Progress(quiet=True)))[1]
        for p in (spiky.path, path)
    )
    for name, choice in factors.items():
        np.testing.assert_allclose(after[name] * choice.factors, before[name], rtol=2e-3, atol=1e-2)


def test_not_one_node_more(spiky: Planted) -> None:
    model = spiky.load()
    before = [(node.name, len(node.inputs)) for node in model.graph]
    constants = set(model.graph.initializers)
    fold_smoothing(model, spiky.sites, choices(spiky))
    assert [(node.name, len(node.inputs)) for node in model.graph] == before
    assert set(model.graph.initializers) == constants


def test_nothing_chosen_nothing_changed(spiky: Planted) -> None:
    model = spiky.load()
    assert fold_smoothing(model, spiky.sites, Smoothing({}, {})) is False
    tensor = model.graph.initializers["layers.0.mlp.down_proj.weight"].const_value
    assert isinstance(tensor, ir.ExternalTensor)


def test_weights_are_computed_when_written(spiky: Planted) -> None:
    """A pass over a large model must not hold its weights."""
    model = spiky.load()
    fold_smoothing(model, spiky.sites, choices(spiky))
    for linear in spiky.sites.linears:
        if not linear.node.endswith("o_proj"):
            assert isinstance(model.graph.initializers[linear.weight].const_value, ir.LazyTensor)


def test_bias_of_a_layer_norm_is_divided_too() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[1, 2, 2] x) => (float[1, 2, 2] y)
        <float[2] w = {2, 4}, float[2] b = {1, 3}, float[2, 2] a = {1, 0, 2, 1},
         float[2, 2] ow = {1, 1, 0, 1}, float[2] fw = {1, 1},
         float[2, 2] g1 = {1, 0, 0, 1}, float[2, 2] u1 = {1, 2, 3, 4},
         float[2, 2] d1 = {1, 0, 1, 1}>
        {
            [n] normed = LayerNormalization (x, w, b)
            [q] q = MatMul (normed, a)
            [t] s = Transpose <perm = [0, 2, 1]> (q)
            [attend] c = MatMul (q, s)
            [context] v = MatMul (c, q)
            [o] o = MatMul (v, ow)
            [add] r = Add (x, o)
            [n2] m = LayerNormalization (r, w, b)
            [gate] g = MatMul (m, g1)
            [act] act = Sigmoid (g)
            [up] u = MatMul (m, u1)
            [mul] h = Mul (act, u)
            [down] d = MatMul (h, d1)
            [add2] r2 = Add (r, d)
            [final] y = LayerNormalization (r2, fw, b)
        }
    """
    model = ir.from_onnx_text(text)
    sites = find_sites(model)
    factors = np.float32([4, 0.5])
    choice = SmoothingChoice("test", factors, 0, 0)
    before = InferenceSession(ir.to_proto(model).SerializeToString())
    # `w` and `b` are read by both norms, so smoothing one must not change the other.
    fold_smoothing(model, sites, Smoothing({"normed": choice}, {}))
    after = InferenceSession(ir.to_proto(model).SerializeToString())
    x = np.random.default_rng(0).normal(size=(1, 2, 2)).astype(np.float32)
    (expected,), (found,) = (session.run(None, {"x": x}) for session in (before, after))
    np.testing.assert_allclose(found, expected, atol=1e-5)
