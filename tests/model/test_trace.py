"""The traced graph: its interface, its ops, and that it computes what transformers computes."""

from __future__ import annotations

import collections
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from iq_export.errors import GraphError, ModelError, UsageError
from iq_export.model import trace as trace_module
from iq_export.model.load import resolve
from iq_export.model.trace import TracedModel, trace
from iq_export.model.verify import TOLERANCE, Parity
from iq_export.run.generate import Tokenizer, generate
from iq_export.run.ort import CausalLM, left_pad
from tests.model.whole import whole_graph

# The sizes of the tiny models of conftest.py.
VOCAB, LAYERS, WINDOW = 96, 4, 5
FAMILIES = ("llama", "llama-bias", "qwen2", "qwen3", "mistral", "phi3", "gemma3")
Getter = Callable[[str], Any]


def reference_model(folder: Path) -> Any:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def reference_logits(model: Any, ids: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()


def in_chunks(graph: CausalLM, rows: list[list[int]], sizes: tuple[int, ...]) -> np.ndarray:
    """Logits of a left-padded batch that is fed in chunks, with the cache."""
    ids, mask, positions = left_pad(rows, 0)
    parts, past, start = [], None, 0
    for size in (*sizes, ids.shape[1] - sum(sizes)):
        end = start + size
        step = graph.forward(ids[:, start:end], mask[:, :end], positions[:, start:end], past)
        parts.append(step.logits)
        past, start = step.present, end
    return np.concatenate(parts, axis=1)


def tokens(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, folders: Getter, traces: Getter) -> None:
    """In one pass, in chunks of 1, 7 and the rest, and left-padded beside a longer row."""
    model, graph = reference_model(folders(family)), CausalLM(whole_graph(traces(family)))
    rows = [tokens(4 * WINDOW, 1), tokens(2 * WINDOW + 1, 2), tokens(1, 3)]
    expected = [reference_logits(model, row) for row in rows]
    bound = 1e-4 * (expected[0].max() - expected[0].min())
    alone = in_chunks(graph, rows[:1], ())
    assert np.abs(alone[0] - expected[0]).max() < bound
    for sizes in ((), (1, 7), (12, 1, 1)):
        padded = in_chunks(graph, rows, sizes)
        assert np.isfinite(padded).all()
        for index, want in enumerate(expected):
            assert np.abs(padded[index, -len(want) :] - want).max() < bound


@pytest.mark.parametrize("family", ("llama", "gemma3"))
def test_greedy_tokens_equal_transformers(family: str, folders: Getter, traces: Getter) -> None:
    """64 steps, with the cache and by computing everything anew."""
    import torch

    model, graph = reference_model(folders(family)), CausalLM(whole_graph(traces(family)))
    prompt = tokens(6, 4)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None
        )[0, len(prompt) :].tolist()
    assert list(generate(graph, prompt, max_new_tokens=64)) == expected
    grown = list(prompt)
    for _ in range(64):
        grown.append(int(in_chunks(graph, [grown], ())[0, -1].argmax()))
    assert grown[len(prompt) :] == expected


def test_padding_alone_is_finite(traces: Getter) -> None:
    """A row of nothing but padding attends to itself only: no NaN anywhere."""
    graph = CausalLM(whole_graph(traces("llama")))
    ids, mask = np.zeros((2, 4), np.int64), np.zeros((2, 4), np.int64)
    mask[0] = 1
    step = graph.forward(ids, mask, np.zeros_like(ids))
    assert np.isfinite(step.logits).all()
    assert all(np.isfinite(tensor).all() for tensor in step.present)


def test_pads_do_not_reach_the_tokens(traces: Getter) -> None:
    graph = CausalLM(whole_graph(traces("llama")))
    row = tokens(5, 5)
    ids, mask, positions = left_pad([row, tokens(9, 6)], 0)
    other = np.where(mask == 1, ids, 17)
    first, second = (graph.forward(x, mask, positions).logits[0, -5:] for x in (ids, other))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("family", "norms", "ropes"), (("llama", 9, 8), ("qwen3", 17, 8), ("gemma3", 25, 8))
)
def test_single_ops(family: str, norms: int, ropes: int, traces: Getter) -> None:
    model = onnx.load(whole_graph(traces(family)), load_external_data=False)
    count = collections.Counter(node.op_type for node in model.graph.node)
    assert count["RMSNormalization"] == norms
    assert count["RotaryEmbedding"] == ropes
    assert count["Attention"] == LAYERS
    assert count["MatMul"] == 7 * LAYERS + 1
    assert count["Expand"] == count["Identity"] == count["Constant"] == 0
    # Reshapes have constant sizes; what is joined is the cache.
    assert count["Concat"] == 2 * LAYERS
    assert count["Cos"] <= 2  # one per base of the rotation, not one per layer
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
    onnx.checker.check_model(str(whole_graph(traces(family))))


def test_interface(traces: Getter) -> None:
    graph = onnx.load(traces("llama").model, load_external_data=False).graph

    def shapes(values: Any) -> dict[str, list[Any]]:
        return {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in values
        }

    inputs, outputs = shapes(graph.input), shapes(graph.output)
    assert list(inputs)[:4] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
    ]
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch", "seq"]
    assert inputs["attention_mask"] == ["batch", "total"]
    assert inputs["past_key_values.3.value"] == ["batch", 2, "past", 8]
    assert next(iter(outputs)) == "logits" and outputs["logits"] == ["batch", "seq", VOCAB]
    assert outputs["present.3.value"] == ["batch", 2, "total", 8]
    assert len(inputs) == 3 + 2 * LAYERS and len(outputs) == 1 + 2 * LAYERS


def test_weights_are_named_transposed_and_stored_once(folders: Getter, traces: Getter) -> None:
    model = onnx.load(whole_graph(traces("llama")))
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    state = reference_model(folders("llama")).state_dict()
    for layer in range(LAYERS):
        for name in (f"layers.{layer}.mlp.down_proj", f"layers.{layer}.self_attn.q_proj"):
            original = state[f"model.{name}.weight"].numpy()
            np.testing.assert_array_equal(weights[f"{name}.weight"], original.T)
        norm = f"layers.{layer}.input_layernorm.weight"
        np.testing.assert_array_equal(weights[norm], state[f"model.{norm}"].numpy())
    matrices = [name for name, value in weights.items() if value.shape == (VOCAB, 32)]
    assert matrices == ["embed_tokens.weight"]
    assert not [name for name, value in weights.items() if value.shape == (32, VOCAB)]
    names = {node.name: node for node in model.graph.node}
    assert names["layers.2/mlp/down_proj"].input[1] == "layers.2.mlp.down_proj.weight"
    assert names["layers.0/self_attn/Attention"].op_type == "Attention"
    assert names["lm_head"].op_type == "MatMul"
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert not model.metadata_props


def test_gemma_norm_weights_are_folded(folders: Getter, traces: Getter) -> None:
    """Gemma multiplies by 1 + weight: one constant in the graph, under the norm's name."""
    model = onnx.load(whole_graph(traces("gemma3")))
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    state = reference_model(folders("gemma3")).state_dict()
    for layer in range(LAYERS):
        name = f"layers.{layer}.input_layernorm.weight"
        np.testing.assert_allclose(weights[name], 1 + state[f"model.{name}"].numpy(), rtol=1e-6)


def traced_before(traced: TracedModel) -> Callable[..., int]:
    """Stands in for the export of the model that `traced` is of: writes its graph."""

    def export(model: Any, weights: Any, out: Path, *_: Any) -> int:
        shutil.copy(traced.model, out)
        return traced.layers_traced

    return export


def same_graph(first: Path, second: Path) -> bool:
    return (first / "model.onnx").read_bytes() == (second / "model.onnx").read_bytes()


def test_the_short_cut_writes_the_same_graph(
    folders: Getter, traces: Getter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying layers gives, byte for byte, what exporting every layer gives."""
    monkeypatch.setattr("iq_export.model.replicate.plan_layers", lambda model: None)
    whole = trace(resolve(str(folders("gemma3"))), tmp_path / "whole")
    assert traces("gemma3").layers_traced == 3 and whole.layers_traced == LAYERS
    assert same_graph(whole.folder, traces("gemma3").folder)


def test_a_short_cut_that_is_wrong_is_not_taken(
    folders: Getter, traces: Getter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, export, seen = trace_module.compare, trace_module._export, []
    before = traces("llama")

    def exported(model: Any, weights: Any, out: Path, opset: int, short_cut: bool) -> Any:
        again = traced_before(before)  # the short cut is no other than there
        return (again if short_cut else export)(model, weights, out, opset, short_cut)

    def wrong_at_first(path: Path, reference: Any) -> Parity:
        seen.append(path)
        return Parity(1.0, 0.1, 1.0) if len(seen) == 1 else compare(path, reference)

    monkeypatch.setattr(trace_module, "compare", wrong_at_first)
    monkeypatch.setattr(trace_module, "_export", exported)
    traced = trace(resolve(str(folders("llama"))), tmp_path / "out")
    assert len(seen) == 2
    assert traces("llama").layers_traced == 2 and traced.layers_traced == LAYERS
    assert same_graph(traced.folder, traces("llama").folder)
    assert traced.parity is not None and traced.parity < 1e-5
    assert traced.noise_ratio is not None and traced.noise_ratio < TOLERANCE


def test_a_graph_that_differs_is_refused(
    folders: Getter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "_export", lambda *args: 2)
    found = Parity(2e-3, 1e-4, 2e-3, "token 3 of a text")
    monkeypatch.setattr(trace_module, "compare", lambda path, reference: found)
    with pytest.raises(GraphError, match="does not equal the model") as caught:
        trace(resolve(str(folders("llama"))), tmp_path / "out")
    assert "at token 3 of a text its logits are 0.002 of their range" in str(caught.value)
    assert "the model's own float32 is 0.0001 from them" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_onnx_runtime_refuses_names_the_model_type(
    folders: Getter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, reference: Any) -> Parity:
        raise GraphError("ONNX Runtime cannot load model.onnx: Type Error.")

    monkeypatch.setattr(trace_module, "_export", lambda *args: 2)
    monkeypatch.setattr(trace_module, "compare", broken)
    with pytest.raises(GraphError, match=r"\(model type 'llama'\) is broken: ONNX Runtime cannot"):
        trace(resolve(str(folders("llama"))), tmp_path / "out")


def test_assets_are_enough_to_run(traces: Getter) -> None:
    assets = traces("llama").assets
    assert {"config.json", "generation_config.json", "tokenizer.json", "NOTICE"} <= {
        file.name for file in assets.iterdir()
    }
    assert Tokenizer(assets).encode("w5 w6", add_bos=True) == [1, 5, 6]


def test_a_second_trace_reuses_the_first(
    folders: Getter, traces: Getter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("loaded again")

    first = traces("llama")
    monkeypatch.setattr(trace_module, "load_model", fail)
    assert trace(resolve(str(folders("llama"))), first.folder) == first


@pytest.mark.parametrize("damage", ("truncate", "delete", "record"))
def test_a_damaged_trace_is_not_reused(
    damage: str, folders: Getter, traces: Getter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(traces("llama").folder, tmp_path / "copy")
    if damage == "truncate":
        data = (copy / "model.onnx").read_bytes()
        (copy / "model.onnx").write_bytes(data[:-1])
    elif damage == "delete":
        (copy / "assets" / "tokenizer.json").unlink()
    else:
        (copy / "trace.json").write_text("{")
    with pytest.raises(ModelError):
        TracedModel.load(copy)

    class LoadedAgainError(Exception):
        pass

    def again(*_: Any) -> None:
        raise LoadedAgainError

    monkeypatch.setattr(trace_module, "load_model", again)
    with pytest.raises(LoadedAgainError):
        trace(resolve(str(folders("llama"))), copy)


@pytest.mark.parametrize("change", ("moved", "touched"))
def test_a_trace_that_refers_to_other_files_is_not_reused(
    change: str, folders: Getter, traces: Getter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same contents: elsewhere, or written again."""
    source = shutil.copytree(folders("llama"), tmp_path / "llama")
    first = shutil.copytree(traces("llama").folder, tmp_path / "traced")
    monkeypatch.setattr(trace_module, "load_model", lambda *_: pytest.fail("loaded again"))
    if change == "touched":
        key = trace_module._cache_key(resolve(str(source)), traces("llama").source_sha256, 23)
        TracedModel.load(first).save(key)
        assert trace(resolve(str(source)), first).model == first / "model.onnx"
        os.utime(source / "model.safetensors", ns=(0, 1))
    with pytest.raises(pytest.fail.Exception, match="loaded again"):
        trace(resolve(str(source)), first)


def test_no_copy_of_safetensors_is_written(traces: Getter) -> None:
    files = {file.name for file in traces("llama").folder.iterdir() if file.is_file()}
    assert files == {"model.onnx", "trace.json"}
    assert not any(
        "weight" in tensor.name and len(tensor.dims) > 1 and tensor.raw_data
        for tensor in onnx.load(traces("llama").model, load_external_data=False).graph.initializer
    )


def test_another_model_is_traced_anew(
    folders: Getter, traces: Getter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(traces("llama").folder, tmp_path / "copy")
    monkeypatch.setattr(trace_module, "_export", traced_before(traces("qwen2")))
    traced = trace(resolve(str(folders("qwen2"))), copy)
    assert traced.source_sha256 != traces("llama").source_sha256
    names = [i.name for i in onnx.load(traced.model, load_external_data=False).graph.initializer]
    assert "layers.0.self_attn.q_proj.bias" in names


def test_an_interrupt_leaves_nothing(
    folders: Getter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trace_module, "_export", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trace(resolve(str(folders("llama"))), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_opset_is_refused(folders: Getter, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Opset 18"):
        trace(resolve(str(folders("llama"))), tmp_path / "out", opset=18)


def test_an_onnx_file_is_adopted(folders: Getter, traces: Getter, tmp_path: Path) -> None:
    first = traces("llama")
    source = resolve(str(whole_graph(first)), tokenizer=folders("llama"))
    adopted = trace(source, tmp_path / "out")
    assert adopted.parity is None
    row = [tokens(9, 8)]
    np.testing.assert_array_equal(
        in_chunks(CausalLM(adopted.model), row, ()),
        in_chunks(CausalLM(whole_graph(first)), row, ()),
    )
    assert Tokenizer(adopted.assets).encode("w7", add_bos=False) == [7]


@pytest.mark.parametrize(
    ("name", "kind"), (("position_ids", "input"), ("present.1.value", "output"))
)
def test_an_onnx_file_without_cache_is_refused(
    name: str, kind: str, folders: Getter, traces: Getter, tmp_path: Path
) -> None:
    shutil.copytree(whole_graph(traces("llama")).parent, tmp_path / "src")
    path = tmp_path / "src" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    values = model.graph.input if kind == "input" else model.graph.output
    next(value for value in values if value.name == name).name = "other"
    onnx.save(model, path)
    with pytest.raises(GraphError, match=f"no {kind} '{name}'"):
        trace(resolve(str(path), tokenizer=folders("llama")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ("graph", "data", "missing"))
def test_a_damaged_onnx_file_is_refused(
    damage: str, folders: Getter, traces: Getter, tmp_path: Path
) -> None:
    shutil.copytree(whole_graph(traces("llama")).parent, tmp_path / "src")
    path, data = tmp_path / "src" / "model.onnx", tmp_path / "src" / "model.onnx.data"
    if damage == "graph":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "data":
        data.write_bytes(data.read_bytes()[:1000])
    else:
        data.unlink()
    with pytest.raises(ModelError):
        trace(resolve(str(path), tokenizer=folders("llama")), tmp_path / "out")
    assert not (tmp_path / "out").exists()
