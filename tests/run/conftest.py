"""A causal LM that counts, as an ONNX file made by hand: no torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

VOCAB = 12


def counting_model(path: Path, *, half: bool = False, layers: int = 2) -> Path:
    """Token t is followed by t + 1 (mod VOCAB), shifted by the number of padded positions before.

    The cache holds each token's id, and the mask its validity: logits peak at
    `1 + last token + (tokens seen - sum of the mask)`, so that a wrong cache or mask shows.
    """
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    dtype = np.float16 if half else np.float32
    past = [f"past_key_values.{i}.{k}" for i in range(layers) for k in ("key", "value")]
    present = [f"present.{i}.{k}" for i in range(layers) for k in ("key", "value")]
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=kind),
        helper.make_node("Unsqueeze", ["ids", "axes_1_3"], ["row"]),
        helper.make_node("Expand", ["row", "kv_shape"], ["kv"]),
        *(
            helper.make_node("Concat", [p, "kv"], [q], axis=2)
            for p, q in zip(past, present, strict=True)
        ),
        helper.make_node("Shape", ["present.0.key"], ["seen"], start=2, end=3),
        helper.make_node("ReduceSum", ["attention_mask", "axis_1"], ["valid"], keepdims=1),
        helper.make_node("Sub", ["seen", "valid"], ["missing"]),
        helper.make_node("Add", ["input_ids", "one"], ["next"]),
        helper.make_node("Add", ["next", "missing"], ["shifted"]),
        helper.make_node("Mod", ["shifted", "vocab"], ["token"]),
        helper.make_node("OneHot", ["token", "vocab", "off_on"], ["logits"], axis=-1),
        helper.make_node("ReduceSum", ["position_ids", "axis_1"], ["position_sum"], keepdims=0),
    ]
    constants = {
        "axes_1_3": np.asarray([1, 3]), "axis_1": np.asarray([1]), "one": np.asarray(1),
        "vocab": np.asarray([VOCAB]), "off_on": np.asarray([0, 9], dtype),
        "kv_shape": np.asarray([1, 3, 1, 4]),
    }  # fmt: skip
    int_in = {
        "input_ids": ["batch", "seq"],
        "attention_mask": ["batch", "total"],
        "position_ids": ["batch", "seq"],
    }
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, s) for n, s in int_in.items()]
    inputs += [helper.make_tensor_value_info(n, kind, ["batch", 3, "past", 4]) for n in past]
    outputs = [helper.make_tensor_value_info("logits", kind, ["batch", "seq", VOCAB])]
    outputs += [helper.make_tensor_value_info(n, kind, ["batch", 3, "total", 4]) for n in present]
    outputs += [helper.make_tensor_value_info("position_sum", TensorProto.INT64, ["batch"])]
    graph = helper.make_graph(
        nodes,
        "counting",
        inputs,
        outputs,
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.fixture
def counting(tmp_path: Path) -> Callable[..., Path]:
    """`counting(half=..., layers=...)` -> path of the counting model."""

    def make(**options: Any) -> Path:
        return counting_model(tmp_path / "counting.onnx", **options)

    return make


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    """A byte-level tokenizer without merges: 256 bytes, then <s>, </s>, <end>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path / "assets"
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<end>")])
    core.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))
    return folder
