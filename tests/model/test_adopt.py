"""ONNX files as other exporters write them: no node names, constants as nodes, no inner types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession

from iq_export.decide.job import Calibration
from iq_export.errors import GraphError, ModelError
from iq_export.graph import io
from iq_export.graph.sites import find_sites
from iq_export.model.load import resolve
from iq_export.model.trace import trace
from iq_export.model.written_out import made_by
from iq_export.observe.samples import Window
from iq_export.pipeline import rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.run.ort import CausalLM
from tests import planted
from tests.model.whole import whole_graph
from tests.planted import CPU, logits

DECODER = planted.Decoder()
SINGLE_OPS = {"Attention", "Gelu", "LayerNormalization", "RMSNormalization", "RotaryEmbedding"}


def plain_file(folder: Path) -> Path:
    """The planted model with neither node names nor types of inner values, and every small constant
    as a node."""
    model = planted.proto(DECODER)
    for node in model.graph.node:
        node.ClearField("name")
    model.graph.ClearField("value_info")
    for tensor in [t for t in model.graph.initializer if np.prod(t.dims) <= 64]:
        model.graph.initializer.remove(tensor)
        constant = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        model.graph.node.insert(0, constant)
    onnx.save(model, folder / "plain.onnx")
    return folder / "plain.onnx"


def test_plain_file_compiles(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = plain_file(tmp_path)
    adopted = trace(resolve(str(path), tokenizer=tokenizer_folder), tmp_path / "traced")
    graph = onnx.load(adopted.model, load_external_data=False).graph
    assert not any(node.op_type == "Constant" for node in graph.node)
    assert all(node.name for node in graph.node)
    assert {value.name for value in graph.value_info} >= {"layers.2/mlp/Mul/out"}
    rows = [[1, 2, 3, 4]]
    exact = logits(CausalLM(path), rows)
    np.testing.assert_allclose(logits(CausalLM(adopted.model), rows), exact, atol=1e-4)
    data = planted.windows(DECODER, count=4)
    work = tmp_path / "work"
    work.mkdir()
    done = rewrite(
        adopted.model, work, load_recipe("w8a8"), "fp16",
        Calibration(data[:2], data[2:], 0.1, 0, CPU), Progress(quiet=True),
    )  # fmt: skip
    assert done.sink_nodes == 8
    InferenceSession(str(done.quantized))


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    import tokenizers
    import transformers

    folder = tmp_path / "tokenizer"
    words = {f"w{i}": i for i in range(DECODER.vocab)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="w0", bos_token="w1"
    ).save_pretrained(folder)
    return folder


def test_half_file_is_refused_by_its_input(tmp_path: Path, tokenizer_folder: Path) -> None:
    model = planted.proto(DECODER)
    (past,) = [v for v in model.graph.input if v.name == "past_key_values.1.key"]
    past.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(model, tmp_path / "half.onnx")
    source = resolve(str(tmp_path / "half.onnx"), tokenizer=tokenizer_folder)
    with pytest.raises(GraphError, match=r"'past_key_values\.1\.key'.* is float16"):
        trace(source, tmp_path / "traced")


@pytest.mark.parametrize("opset", [12, 24])
def test_other_opset_is_refused(opset: int, tmp_path: Path, tokenizer_folder: Path) -> None:
    model = planted.proto(DECODER)
    model.opset_import[0].version = opset
    onnx.save(model, tmp_path / "other.onnx")
    source = resolve(str(tmp_path / "other.onnx"), tokenizer=tokenizer_folder)
    with pytest.raises(GraphError, match=f"has opset {opset}; supported are opsets 13 to 23"):
        trace(source, tmp_path / "traced")


def test_a_value_that_nothing_makes(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = planted.proto(DECODER)
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    node.input[1] = "nowhere"
    onnx.save(model, tmp_path / "open.onnx")
    source = resolve(str(tmp_path / "open.onnx"), tokenizer=tokenizer_folder)
    with pytest.raises(ModelError, match=r"open\.onnx is no valid graph: .*'nowhere'"):
        trace(source, tmp_path / "traced")
    assert capsys.readouterr().err == ""


def test_an_unknown_weight_type(tmp_path: Path, tokenizer_folder: Path) -> None:
    model = planted.proto(DECODER)
    model.graph.initializer[0].data_type = 99
    path = tmp_path / "odd.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"odd\.onnx is not an ONNX file, or it is damaged"):
        trace(resolve(str(path), tokenizer=tokenizer_folder), tmp_path / "traced")
    with pytest.raises(GraphError, match=r"odd\.onnx is not a readable ONNX model"):
        io.load(path)


def test_a_weight_outside_of_the_file_without_a_type(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    path = planted.save(DECODER, tmp_path)
    model = onnx.load(path, load_external_data=False)
    weight = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    weight.data_type = onnx.TensorProto.UNDEFINED
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=rf"weight '{weight.name}' of .* has no type of number"):
        trace(resolve(str(path), tokenizer=tokenizer_folder), tmp_path / "traced")


def test_shapes_that_contradict_each_other_are_a_note(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = planted.proto(DECODER)
    (past,) = [v for v in model.graph.input if v.name == "past_key_values.1.key"]
    past.type.tensor_type.shape.dim[2].dim_value = -1
    onnx.save(model, tmp_path / "negative.onnx")
    source = resolve(str(tmp_path / "negative.onnx"), tokenizer=tokenizer_folder)
    traced = trace(source, tmp_path / "traced", progress=Progress())
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    (note,) = [note for note in traced.notes if "Inference" in note]
    assert f"warning: {note}" in printed


def test_a_cache_inside_of_attention_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Its keys and values of past and present never stand in the graph, where passes look."""
    model = planted.proto(DECODER)
    node = next(node for node in model.graph.node if node.op_type == "Attention")
    node.input.extend([""] * (4 - len(node.input)))
    node.input.extend(["past_key_values.0.key", "past_key_values.0.value"])
    onnx.save(model, tmp_path / "inside.onnx")
    source = resolve(str(tmp_path / "inside.onnx"), tokenizer=tokenizer_folder)
    with pytest.raises(
        GraphError, match=rf"'{node.name}' \(Attention\).*takes the KV cache itself"
    ):
        trace(source, tmp_path / "traced")


def primitive_file(folder: Path, path: Path, opset: int) -> Path:
    """A transformers model as torch's older exporter writes it: every op is a primitive one."""
    import torch
    import transformers

    from iq_export.graph.interface import input_names, output_names
    from iq_export.model.capture import cache_shape, flat_module
    from iq_export.model.export import example_inputs
    from iq_export.model.quiet import quiet

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    cache = cache_shape(model)
    module = flat_module(model, cache)
    model.set_attn_implementation("sdpa")
    inputs, outputs = input_names(cache.num_layers), output_names(cache.num_layers)
    axes = {name: {0: "batch", 1: "seq"} for name in ("input_ids", "position_ids", "logits")}
    axes["attention_mask"] = {0: "batch", 1: "total"}
    axes |= {name: {0: "batch", 2: "past"} for name in inputs[3:]}
    axes |= {name: {0: "batch", 2: "total"} for name in outputs[1:]}
    with quiet():
        torch.onnx.export(
            module, example_inputs(cache, model.config.vocab_size), path, dynamo=False,
            opset_version=opset, input_names=inputs, output_names=outputs, dynamic_axes=axes,
        )  # fmt: skip
    return path


def parts(path: Path) -> tuple[Counter[str], list[tuple[Any, ...]]]:
    """The single ops of a graph, and of each of its blocks what later steps go by."""
    model = io.load(path)
    sites = find_sites(model)
    assert not sites.refused
    return Counter(node.op_type for node in model.graph if node.op_type in SINGLE_OPS), [
        (
            [(linear.in_features, linear.out_features) for linear in branch.linears],
            branch.linear_path,
            branch.attention and (branch.attention.heads, branch.attention.key_features),
        )
        for block in sites.blocks
        for branch in (block.attention, block.mlp)
    ]


@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(f, marks=pytest.mark.heavy) for f in ("qwen2", "starcoder2"))],
)
def test_a_file_of_primitive_ops(
    family: str, folders: Callable[[str], Path], traces: Callable[[str], Any], tmp_path: Path
) -> None:
    """It becomes what the same model is when it is traced, and compiles."""
    path = primitive_file(folders(family), tmp_path / "primitive.onnx", 14)
    before = {node.op_type for node in onnx.load(path).graph.node}
    assert "Softmax" in before and not before & SINGLE_OPS
    adopted = trace(resolve(str(path), tokenizer=folders(family)), tmp_path / "traced")
    assert parts(adopted.model) == parts(traces(family).model)
    rows = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    exact, found = (logits(CausalLM(whole_graph(m)), rows) for m in (traces(family), adopted))
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * np.ptp(exact))
    rng = np.random.default_rng(0)
    windows = [Window(rng.integers(3, 90, 24).tolist(), bos=False) for _ in range(4)]
    (tmp_path / "work").mkdir()
    done = rewrite(
        adopted.model, tmp_path / "work", load_recipe("w8a8"), "fp16",
        Calibration(windows[:2], windows[2:], 0.1, 0, CPU), Progress(quiet=True),
    )  # fmt: skip
    products = [node for node in io.load(done.quantized).graph if node.op_type == "MatMul"]
    codes = [node for node in products if made_by(node.inputs[1], "DequantizeLinear")]
    assert len(codes) == len(find_sites(io.load(adopted.model)).linears)
    InferenceSession(str(done.quantized))
