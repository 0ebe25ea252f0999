"""Weights that stay in their source's files: read when asked for, never wrong ones."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

from iq_export.errors import ModelError
from iq_export.graph import io
from iq_export.graph.stored import StoredTensor, lift, settle
from iq_export.model.weights import stored_tensors
from iq_export.run.ort import CausalLM
from iq_export.run.parts import Call, logits_in_parts
from tests import planted

KINDS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {str(kind): torch.randn(5, 70).to(kind) for kind in KINDS}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def graph_of(folder: Path, path: Path) -> ir.Model:
    """Every tensor of the folder multiplied by an input, as it is and transposed, and written."""
    stored = stored_tensors(folder)
    assert stored is not None
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23}), ir_version=10)
    nodes = []
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    model.graph.inputs.append(x)
    for key, place in stored.items():
        for tensor in (StoredTensor(place, key), StoredTensor(place, f"{key}.T", transposed=True)):
            value = ir.Value(
                name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )  # fmt: skip
            model.graph.initializers.add(value)
            nodes.append(ir.Node("", "Mul", [value, x], name=f"{tensor.name}/Mul"))
            nodes[-1].outputs[0].name = f"{tensor.name}/out"
    model.graph.extend(nodes)
    model.graph.outputs.extend(node.outputs[0] for node in nodes)
    settle(model)
    ir.save(model, path)
    return model


def test_a_graph_refers_to_its_sources_files(folder: Path, tmp_path: Path) -> None:
    """No weight is copied; read back, all are float32, named as before and nothing else is left."""
    (tmp_path / "traced").mkdir()
    path = tmp_path / "traced" / "model.onnx"
    graph_of(folder, path)
    assert path.stat().st_size < 6_000 and len(list(path.parent.iterdir())) == 1
    model = io.load(path)
    assert [node.op_type for node in model.graph] == ["Mul"] * 6
    assert not model.metadata_props
    source = torch.Generator().manual_seed(0)
    for kind in KINDS:
        wanted = torch.randn(5, 70, generator=source).to(kind).float().numpy()
        values = model.graph.initializers
        np.testing.assert_array_equal(values[str(kind)].const_value.numpy(), wanted)
        found = values[f"{kind}.T"].const_value
        np.testing.assert_array_equal(found.numpy(), wanted.T)
        assert found.tobytes() == wanted.T.tobytes() and found.numpy().flags.c_contiguous


@pytest.mark.parametrize("change", ["size", "time", "gone", "link"])
def test_a_source_that_changes_is_one_sentence(change: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "traced").mkdir()
    path, data = tmp_path / "traced" / "model.onnx", folder / "model.safetensors"
    graph_of(folder, path)
    model = io.load(path)
    if change == "size":
        data.write_bytes(data.read_bytes() + b"0")
    elif change == "time":
        os.utime(data, ns=(0, 1))
    else:
        data.rename(tmp_path.parent / f"{tmp_path.name}.moved")
    if change == "link":
        data.symlink_to(tmp_path.parent / f"{tmp_path.name}.moved")
    reason = {"gone": "is gone", "link": "leads out of its folder"}.get(change, "has changed since")
    for value in model.graph.initializers.values():
        with pytest.raises(ModelError, match=reason):
            value.const_value.numpy()


def test_what_was_not_settled_is_left_alone(folder: Path, tmp_path: Path) -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23}), ir_version=10)
    lift(model, tmp_path)
    assert not model.metadata_props


@pytest.mark.parametrize("part_bytes", [1, 20_000, 1 << 30])
def test_a_graph_in_parts_computes_the_same(part_bytes: int, tmp_path: Path) -> None:
    """Over several chunks with a cache, whatever the parts; bit for bit."""
    path = planted.save(planted.Decoder(), tmp_path)
    whole = CausalLM(path, literal=True)
    ids = np.arange(2, 16, dtype=np.int64).reshape(2, 7)
    mask, positions = np.ones_like(ids), np.tile(np.arange(7), (2, 1))
    bounds = [(0, 4), (4, 6), (6, 7)]
    chunks = [(ids[:, a:b], mask[:, :b], positions[:, a:b]) for a, b in bounds]
    wanted, past = [], None
    for chunk in chunks:
        step = whole.forward(*chunk, past)
        wanted.append(step.logits)
        past = step.present
    alone = whole.forward(ids[:, :3], np.ones((2, 10), np.int64), positions[:, :3] + 7, past)
    calls = [
        Call(tuple(chunks)),
        Call(((ids[:, :3], np.ones((2, 10), np.int64), positions[:, :3] + 7),), tuple(past or ())),
    ]
    found = logits_in_parts(path, calls, part_bytes=part_bytes)
    for one, other in zip([*wanted, alone.logits], [*found[0], *found[1]], strict=True):
        np.testing.assert_array_equal(one, other)
