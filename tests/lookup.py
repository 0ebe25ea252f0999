"""A "language model" whose logits depend on the current token only: a table in ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(path: Path, table: np.ndarray) -> Path:
    """Write the causal LM whose logits are the rows of `table` `[vocab, vocab]`."""
    past = ("past_key_values.0.key", "past_key_values.0.value")
    present = [name.replace("past_key_values", "present") for name in past]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["logits"]),
        helper.make_node("Cast", ["input_ids"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["float", "axes"], ["kv"]),
        *(helper.make_node("Concat", [name, "kv"], [after], axis=2)
          for name, after in zip(past, present, strict=True)),
    ]  # fmt: skip
    ids, cache = ["batch", "seq"], ["batch", 1, "past", 1]
    graph = helper.make_graph(
        nodes,
        "lookup",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ids),
            *(helper.make_tensor_value_info(name, TensorProto.FLOAT, cache) for name in past),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*ids, table.shape[1]]),
            *(helper.make_tensor_value_info(n, TensorProto.FLOAT, cache) for n in present),
        ],
        [
            numpy_helper.from_array(table.astype(np.float32), "table"),
            numpy_helper.from_array(np.asarray([1, 3]), "axes"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path
