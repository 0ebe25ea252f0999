"""What a checkpoint holds beside a sound set of weights is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from iq_export.errors import GraphError, ModelError
from iq_export.graph import io
from iq_export.model.load import resolve
from iq_export.model.trace import TracedModel, trace
from iq_export.model.weights_check import check_finite, check_finite_graph
from tests import planted
from tests.model.whole import load_model

Getter = Callable[[str], Path]
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def llama(folders: Getter, tmp_path: Path) -> Path:
    """A copy of the tiny Llama (4 layers) that a test may change."""
    return shutil.copytree(folders("llama"), tmp_path / "llama")


def with_weights(folder: Path, **changes: torch.Tensor) -> Path:
    """Put tensors into the checkpoint, dots in names written as double underscores."""
    file = folder / "model.safetensors"
    weights = load_file(file) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite(
    llama: Path, value: float, kind: str, dtype: torch.dtype
) -> None:
    weight = load_file(llama / "model.safetensors")[QUERY].to(dtype)
    weight[3, 5] = value
    with_weights(llama, **{QUERY.replace(".", "__"): weight})
    with pytest.raises(ModelError, match=rf"'{QUERY}' of llama holds {kind} at \[3, 5\] \(1 of"):
        load_model(resolve(str(llama)))


def test_finite_weights_pass() -> None:
    weights = [("empty", torch.zeros(0)), ("ids", torch.arange(3)), ("w", torch.tensor([65504.0]))]
    check_finite(weights, "model")


def test_a_constant_of_an_onnx_file_that_is_not_finite(llama: Path, tmp_path: Path) -> None:
    values = planted.weights(planted.NO_SPIKES)
    values["layers.2.mlp.up_proj.weight"][1, 7] = np.nan
    path = tmp_path / "model.onnx"
    onnx.save(planted.proto(planted.NO_SPIKES, values), path)
    source = resolve(str(path), tokenizer=llama)
    with pytest.raises(GraphError, match=r"'layers\.2\.mlp\.up_proj\.weight'.*NaN at \[1, 7\]"):
        trace(source, tmp_path / "traced")
    assert not (tmp_path / "traced").exists()


def test_a_constant_of_an_onnx_file_that_cannot_be_read(llama: Path, tmp_path: Path) -> None:
    model = onnx.load(planted.save(planted.NO_SPIKES, tmp_path))
    ids = onnx.helper.make_tensor("ids", onnx.TensorProto.INT64, [2], [1, 2])
    del ids.dims[:]  # two values, and no axis
    model.graph.initializer.append(ids)
    onnx.save(model, tmp_path / "damaged.onnx")
    source = resolve(str(tmp_path / "damaged.onnx"), tokenizer=llama)
    with pytest.raises(GraphError, match=r"'ids' of damaged\.onnx cannot be read: .*reshape"):
        trace(source, tmp_path / "traced")


def test_a_mask_may_hold_infinity(tmp_path: Path) -> None:
    values = planted.weights(planted.NO_SPIKES)
    values["mask"] = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    values["minus"] = np.array(-np.inf, np.float32)
    path = planted.save(planted.NO_SPIKES, tmp_path, values)
    check_finite_graph(io.load(path), "model")


def test_a_weight_of_another_size_than_configured(llama: Path) -> None:
    edit_config(llama, intermediate_size=40)
    with pytest.raises(ModelError) as found:
        load_model(resolve(str(llama)))
    assert str(found.value) == (
        "The weight 'model.layers.0.mlp.down_proj.weight' of llama has the shape [32, 48] in its "
        "file, and by its config.json [32, 40] (12 weights differ so): correct config.json, or "
        "get the model again."
    )


def test_layers_beyond_the_configured_number(llama: Path) -> None:
    edit_config(llama, num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"weights of layer 2 .* num_hidden_layers 2"):
        load_model(resolve(str(llama)))


def test_layers_that_predict_several_tokens_ahead_are_said(llama: Path) -> None:
    edit_config(llama, num_hidden_layers=3, num_nextn_predict_layers=1)
    (note,) = load_model(resolve(str(llama))).notes
    assert "left out" in note and "model.layers.3." in note and "more" in note


def test_a_parameter_that_the_configured_model_lacks(llama: Path) -> None:
    with_weights(llama, model__layers__0__self_attn__q_proj__bias=torch.ones(32))
    with pytest.raises(ModelError, match=r"no place for: 'model\.layers\.0\.self_attn\.q_proj\.b"):
        load_model(resolve(str(llama)))


def test_parts_of_another_model_are_said(llama: Path) -> None:
    with_weights(llama, vision_tower__x__weight=torch.ones(3), v_head__weight=torch.ones(3))
    (note,) = load_model(resolve(str(llama))).notes
    assert "'v_head.weight' and 1 more" in note


def test_buffers_that_are_computed_anew_are_no_matter(llama: Path) -> None:
    with_weights(
        llama,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
        model__layers__0__self_attn__masked_bias=torch.ones(1),
    )
    assert load_model(resolve(str(llama))).notes == ()


def test_an_adapter_within_the_weights(llama: Path) -> None:
    with_weights(llama, model__layers__0__self_attn__q_proj__lora_A__weight=torch.ones(2, 32))
    with pytest.raises(ModelError, match=r"not merged .*lora_A.*merge_and_unload"):
        load_model(resolve(str(llama)))


def test_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is an adapter .*merge_and_unload.*base model"):
        resolve(str(tmp_path))


def test_an_adapter_beside_a_model(llama: Path) -> None:
    (llama / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"beside the model \(adapter_model\.safetensors\)"):
        resolve(str(llama))


def test_notes_are_kept_with_the_trace(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    TracedModel(tmp_path, "m", "0", 1.0, notes=("left out",)).save("key")
    assert TracedModel.load(tmp_path, "key").notes == ("left out",)
