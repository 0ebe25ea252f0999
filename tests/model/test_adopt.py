"""ONNX files as other exporters write them: no node names, constants as nodes, no inner types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession

from iq_export.decide.job import Calibration
from iq_export.errors import GraphError, ModelError
from iq_export.graph import io
from iq_export.model.load import resolve
from iq_export.model.trace import trace
from iq_export.pipeline import rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.run.ort import CausalLM
from tests import planted
from tests.planted import CPU, logits

DECODER = planted.Decoder()


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


def test_other_opset_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    model = planted.proto(DECODER)
    model.opset_import[0].version = 21
    onnx.save(model, tmp_path / "old.onnx")
    source = resolve(str(tmp_path / "old.onnx"), tokenizer=tokenizer_folder)
    with pytest.raises(GraphError, match="has opset 21; only opset 23"):
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
