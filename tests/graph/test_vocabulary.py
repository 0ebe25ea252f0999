"""Which ids a graph can take is read from its table, whatever the tokenizer and the logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from iq_export.errors import DataError, GraphError
from iq_export.evaluate.compare import compare
from iq_export.graph.vocabulary import Vocabulary, read_vocabulary
from iq_export.observe.samples import Window, check_windows
from iq_export.run.generate import generate
from iq_export.run.ort import CausalLM


class Names:
    """Id 7 is `<image>`."""

    bos_id = None

    def token(self, token: int) -> str | None:
        return "<image>" if token == 7 else None

    def encode(self, text: str, add_bos: bool) -> list[int]:
        return [int(word) for word in text.split()]


def lookup_model(path: Path, rows: int, logits: int, *, quantized: bool = False) -> Path:
    """A causal LM that looks its input up in a table of `rows`; it always predicts the last id."""
    table = np.tile(np.arange(logits, dtype=np.float32), (rows, 1))
    past = ("past_key_values.0.key", "past_key_values.0.value")
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["narrow"], to=TensorProto.INT32),
        helper.make_node("Gather", ["looked_up", "narrow"], ["logits"]),
        helper.make_node("Cast", ["input_ids"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["float", "axes"], ["kv"]),
        *(helper.make_node("Concat", [p, "kv"], [p.replace("past_key_values", "present")], axis=2)
          for p in past),
        # A smaller table that is not indexed by tokens.
        helper.make_node("Gather", ["positions", "position_ids"], ["rope"]),
    ]  # fmt: skip
    weights = {"axes": np.asarray([1, 3]), "positions": np.zeros((2, 1), np.float32)}
    if quantized:
        weights |= {"table": table.astype(np.int8), "scale": np.float32(1), "zero": np.int8(0)}
        nodes.insert(0, helper.make_node("DequantizeLinear", ["table", "scale", "zero"],
                                         ["looked_up"]))  # fmt: skip
    else:
        weights["looked_up"] = table
    wide = {"batch": None, "seq": None}
    graph = helper.make_graph(
        nodes,
        "lookup",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, list(wide)),
            helper.make_tensor_value_info("position_ids", TensorProto.INT64, list(wide)),
            *(helper.make_tensor_value_info(p, TensorProto.FLOAT, ["batch", 1, "past", 1])
              for p in past),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", logits]),
            *(helper.make_tensor_value_info(p.replace("past_key_values", "present"),
                                            TensorProto.FLOAT, ["batch", 1, "total", 1])
              for p in past),
            helper.make_tensor_value_info("rope", TensorProto.FLOAT, [*wide, 1]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
        value_info=[helper.make_tensor_value_info("looked_up", TensorProto.FLOAT, [rows, logits])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("rows", "logits"), [(7, 7), (7, 9), (9, 7)])
def test_the_table_and_the_logits(rows: int, logits: int, quantized: bool, tmp_path: Path) -> None:
    path = lookup_model(tmp_path / "m.onnx", rows, logits, quantized=quantized)
    assert read_vocabulary(path) == Vocabulary(rows, logits)
    model = CausalLM(path)
    assert (model.embedding_rows, model.vocab_size) == (rows, logits)


def test_nothing_is_known_of_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"graph")
    assert read_vocabulary(tmp_path / "m.onnx") == read_vocabulary(tmp_path) == Vocabulary()
    Vocabulary().check([10**9, -1], Names(), "the prompt")


def test_the_token_is_named() -> None:
    with pytest.raises(DataError, match=r"the prompt holds the token '<image>' with id 7, and .*7 "
                       r"rows: take it out of the prompt"):  # fmt: skip
        Vocabulary(7, 9).check([6, 0, 7, 8], Names(), "the prompt")
    Vocabulary(9, 7).check([7], Names(), "the prompt")  # input only, as an image token


@pytest.mark.parametrize(("rows", "logits"), [(7, 9), (9, 7)])
def test_windows_of_a_text(rows: int, logits: int, tmp_path: Path) -> None:
    """A text's tokens are looked up, and predicted as well."""
    path = lookup_model(tmp_path / "m.onnx", rows, logits)
    check_windows([Window([1, 6], False)], Names(), path, "text t")
    with pytest.raises(DataError, match="text t holds the token '<image>'"):
        check_windows([Window([1, 6], False), Window([1, 7], False)], Names(), path, "text t")
    with pytest.raises(DataError, match=r"text t\.txt holds the token '<image>'"):
        compare({"bundle": path}, Names(), "1 2 3 7", count=1, length=4, text_name="t.txt")  # type: ignore[arg-type]


def test_generation_within_the_table(tmp_path: Path) -> None:
    """Ids beyond the logits are fine in a prompt; a logit beyond the table is no token."""
    model = CausalLM(lookup_model(tmp_path / "m.onnx", 9, 7))
    assert list(generate(model, [8], max_new_tokens=2)) == [6, 6]
    with pytest.raises(DataError, match=r"0\.\.8"):
        next(generate(model, [9], max_new_tokens=1))
    model = CausalLM(lookup_model(tmp_path / "m.onnx", 7, 9))
    with pytest.raises(GraphError, match="token 8, for which its embedding table has no row"):
        next(generate(model, [1], max_new_tokens=1))
