"""Which layers are traced, and when copying them is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iq_export.model.replicate import plan_layers, shortened

Getter = Callable[[str], Path]


def load(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_one_representative_of_each_kind(folders: Getter) -> None:
    plan = plan_layers(load(folders("llama")))
    assert plan is not None
    assert (plan.prefix, plan.traced, plan.template) == ("model.layers", (0, 1), (0, 1, 1, 1))
    mixed = plan_layers(load(folders("gemma3")))
    assert mixed is not None
    assert (mixed.traced, mixed.template) == ((0, 1, 2), (0, 1, 2, 1))


@pytest.mark.parametrize("change", ("scalar", "shape", "parameter", "class"))
def test_layers_that_differ_are_of_different_kinds(change: str, folders: Getter) -> None:
    import torch

    model = load(folders("llama"))
    layer = model.model.layers[2]
    if change == "scalar":
        layer.self_attn.scaling = 0.5
    elif change == "shape":
        layer.mlp.up_proj = torch.nn.Linear(32, 24, bias=False)
    elif change == "parameter":
        layer.mlp.gate_proj = torch.nn.Linear(32, 48, bias=True)
    else:
        layer.mlp.act_fn = torch.nn.GELU()
    plan = plan_layers(model)
    assert plan is not None and plan.template == (0, 1, 2, 1)


def test_nothing_is_gained_when_all_layers_differ(folders: Getter) -> None:
    model = load(folders("llama"))
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.scaling = 0.1 * (index + 1)
    assert plan_layers(model) is None


def test_the_model_is_whole_again_afterwards(folders: Getter) -> None:
    model = load(folders("gemma3"))
    plan = plan_layers(model)
    assert plan is not None
    layers, types = model.model.layers, list(model.config.layer_types)
    with pytest.raises(KeyError), shortened(model, plan):
        assert len(model.model.layers) == model.config.num_hidden_layers == 3
        assert model.config.layer_types == [types[0], types[1], types[2]]
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
        raise KeyError
    assert model.model.layers is layers and model.config.layer_types == types
    assert model.config.num_hidden_layers == len(layers) == 4
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]


def test_a_graph_that_is_no_chain_is_not_copied(
    folders: Getter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that read what an earlier one left aside: all are traced, and it is right."""
    from transformers.models.llama import modeling_llama

    from iq_export.model.load import resolve
    from iq_export.model.trace import trace

    original = modeling_llama.LlamaMLP.forward
    aside: dict[str, Any] = {}

    def leaky(self: Any, x: Any) -> Any:
        out = original(self, x)
        result = out + aside["out"] if "out" in aside and aside["x"].shape == x.shape else out
        aside.update(out=out, x=x)
        return result

    def fresh(self: Any, *args: Any, **options: Any) -> Any:
        aside.clear()
        return forward(self, *args, **options)

    forward = modeling_llama.LlamaModel.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", leaky)
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", fresh)
    traced = trace(resolve(str(folders("llama"))), tmp_path / "out")
    assert traced.layers_traced == 4
    assert traced.parity is not None and traced.parity < 1e-5
