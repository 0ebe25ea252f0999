"""Queries, keys and values that are made of normed latents: all products are found, inserted in
front of, smoothed and quantized."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from iq_export.graph.sites import Norm, find_sites
from iq_export.run.ort import CausalLM
from tests import planted
from tests.planted import Decoder, Spike
from tests.test_structures import quantized_error

LATENT = Decoder(latent=24)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> planted.Planted:
    return planted.observe(LATENT, tmp_path_factory.mktemp("latent"))


def test_products_that_widen_a_latent_are_found(data: planted.Planted) -> None:
    sites, at = data.sites, "layers.1/self_attn"
    assert sites.refused == () and len(sites.linears) == 9 * LATENT.blocks
    attention = sites.blocks[1].attention
    assert [x.node for x in attention.inputs] == [f"{at}/kv_a_proj", f"{at}/q_a_proj"]
    assert {x.node for x in attention.widening} == {f"{at}/{kind}_proj" for kind in "qkv"}
    assert {x.in_features for x in attention.widening} == {24}
    found = {norm.node: [x.node for x in norm.linears] for norm in attention.latent_norms}
    assert found == {
        f"{at}/q_a_norm": [f"{at}/q_proj"],
        f"{at}/kv_a_norm": [f"{at}/k_proj", f"{at}/v_proj"],
    }
    assert not {norm.node for norm in sites.norms} & found.keys()


def test_a_norm_that_others_read_is_not_folded_into() -> None:
    model = ir.from_proto(planted.proto(replace(LATENT, spikes=())))
    norm = next(node for node in model.graph if node.name == "layers.1/self_attn/kv_a_norm")
    product = next(node for node in model.graph if node.name == "layers.1/self_attn/o_proj")
    other = ir.node("ReduceMean", [norm.outputs[0]], {"keepdims": 1}, name="other")
    joined = ir.node("Add", [product.inputs[0], other.outputs[0]], name="joined")
    model.graph.insert_before(product, [other, joined])
    product.replace_input_with(0, joined.outputs[0])
    (only,) = find_sites(model).blocks[1].attention.latent_norms
    assert isinstance(only, Norm) and only.node == "layers.1/self_attn/q_a_norm"


def test_the_spike_is_found_and_taken_out(data: planted.Planted) -> None:
    (life,) = data.lifecycles
    assert (life.birth, life.death) == (1, 3)
    rows = [window.ids for window in data.windows[:6]]
    expected = planted.logits(CausalLM(data.path), rows)
    for chunk in (None, 7):
        found = planted.logits(CausalLM(data.inserted), rows, chunk=chunk)
        assert np.abs(found - expected).max() < 1e-2 * (expected.max() - expected.min())


def test_the_quantized_graph_is_the_model(tmp_path: Path) -> None:
    assert quantized_error(replace(LATENT, spikes=(Spike(1, None),)), tmp_path, 0.1) < 5e-3
