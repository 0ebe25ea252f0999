"""Inputs and outputs by role, from every form that a graph comes in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime import InferenceSession

from iq_export.bundle.manifest import TensorInfo
from iq_export.errors import GraphError
from iq_export.graph.interface import (
    BATCH,
    FEATURES,
    HEADS,
    PAST,
    SEQ,
    TOTAL,
    Interface,
    Role,
    Tensor,
    input_names,
    output_names,
)
from tests import planted

DECODER = planted.Decoder(blocks=2, spikes=())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.save(DECODER, tmp_path_factory.mktemp("interface"))


def read(path: Path, form: str) -> Interface:
    if form == "graph":
        return Interface.of_graph(ir.load(path).graph)
    if form == "proto":
        return Interface.of_proto(onnx.load(path, load_external_data=False).graph)
    session = Interface.of_session(InferenceSession(path))
    if form == "session":
        return session
    listed = ([TensorInfo(t.name, t.dtype, list(t.shape)) for t in side]  # type: ignore[arg-type]
              for side in (session.inputs, session.outputs))  # fmt: skip
    return Interface.of_tensors(*listed)


@pytest.mark.parametrize("form", ["graph", "proto", "session", "manifest"])
def test_every_form_reads_the_same(path: Path, form: str) -> None:
    found = read(path, form)
    assert [t.name for t in found.inputs] == input_names(2)
    assert [t.name for t in found.outputs] == output_names(2)
    ids, mask, positions = found.inputs[:3]
    assert (ids.role, ids.axes, ids.dtype) == (Role.IDS, (BATCH, SEQ), "int64")
    assert (mask.role, mask.axes) == (Role.MASK, (BATCH, TOTAL))
    assert (positions.role, positions.axes) == (Role.POSITIONS, (BATCH, SEQ))
    last = found.past[-1]
    assert (last.role, last.layer, last.kind, last.dtype) == (Role.PAST, 1, "value", "float")
    assert last.axes == (BATCH, HEADS, PAST, FEATURES)
    assert last.shape == (BATCH, 2, PAST, 16)
    assert [t.role for t in found.present] == [Role.PRESENT] * 4
    assert found.layers == 2
    found.check_causal_lm("model.onnx", (Role.IDS, Role.MASK, Role.POSITIONS))


def listed(inputs: list[str], outputs: list[str]) -> Interface:
    return Interface.of_tensors(
        *([TensorInfo(n, "float", []) for n in s] for s in (inputs, outputs))
    )


def test_cache_is_in_the_order_of_layers() -> None:
    """Also where a graph lists the tenth before the second, or lifecycles before layers."""
    layers = [10, 2, *range(2), *range(3, 10)]
    names = [f"past_key_values.{i}.{kind}" for i in layers for kind in ("value", "key")]
    found = listed(["past_sinks.10", "past_sinks.2", *names], [])
    keys = [t.layer for t in found.past if t.kind == "key"]
    assert keys == list(range(11))
    assert [t.kind for t in found.past[:4]] == ["key", "value", "key", "value"]
    assert [t.name for t in found.past[-2:]] == ["past_sinks.2", "past_sinks.10"]


@pytest.mark.parametrize("name", [
    "past_key_values.01.key", "past_key_values.1.keys", "my.past_key_values.1.key",
    "past_key_values.٣.key", f"past_key_values.{'9' * 5000}.key", "past_sinks.1.key", "logits",
    "input_ids\n",
])  # fmt: skip
def test_what_is_called_alike_has_no_role(name: str) -> None:
    (tensor,) = listed([name], []).inputs
    assert tensor == Tensor(name, "float", ())


@pytest.mark.parametrize("lacking", ["input_ids", "past_key_values.1.value", "logits",
                                     "present.0.key", "present_sinks.0"])  # fmt: skip
def test_no_causal_lm_names_what_is_lacking(lacking: str) -> None:
    sides = [*input_names(2), "past_sinks.0"], [*output_names(2), "present_sinks.0"]
    found = listed(*([name for name in side if name != lacking] for side in sides))
    with pytest.raises(GraphError, match=f"no causal LM with KV cache: it has no .*'{lacking}'"):
        found.check_causal_lm("model.onnx")


def test_a_graph_without_cache_is_no_causal_lm() -> None:
    with pytest.raises(GraphError, match=r"no input 'past_key_values\.0\.key'"):
        listed(["input_ids"], ["logits"]).check_causal_lm("model.onnx")


@pytest.mark.parametrize("ids", [[3, 1, 2], [[3, 1, 2], [4, 5, 6]]])
def test_feeds_are_unpadded_sequences_with_an_empty_cache(path: Path, ids: list[int]) -> None:
    session = InferenceSession(path)
    interface = Interface.of_session(session)
    feeds = interface.feeds(ids, {"more": np.zeros(1)})
    batch = len(np.atleast_2d(ids))
    assert list(feeds) == [tensor.name for tensor in interface.inputs]  # not what another takes
    more = replace(interface, inputs=(*interface.inputs, Tensor("more", "float", (1,))))
    assert more.feeds(ids, {"more": np.zeros(1)})["more"].shape == (1,)
    assert feeds["position_ids"].tolist() == [[0, 1, 2]] * batch
    assert feeds["attention_mask"].tolist() == [[1, 1, 1]] * batch
    assert feeds["past_key_values.1.key"].shape == (batch, 2, 0, 16)
    (logits,) = session.run(["logits"], feeds)
    assert logits.shape[:2] == (batch, 3)


def test_an_int8_cache_and_its_sink_index_are_fed_too() -> None:
    shapes = {"past_key_values.0.key": ("int8", (BATCH, 3, PAST, 64)),
              "past_sinks.0": ("int32", (BATCH, PAST))}  # fmt: skip
    tensors = [TensorInfo(name, kind, list(shape)) for name, (kind, shape) in shapes.items()]
    feeds = Interface.of_tensors(tensors, []).feeds([1])
    found = {name: (str(value.dtype), value.shape) for name, value in feeds.items()}
    assert found == {"past_key_values.0.key": ("int8", (1, 3, 0, 64)),
                     "past_sinks.0": ("int32", (1, 0))}  # fmt: skip


def test_inputs_that_cannot_be_fed_are_named(path: Path) -> None:
    with pytest.raises(GraphError, match="not understood: 'pixel_values'"):
        listed(["pixel_values"], []).feeds([1])
    key = read(path, "session").past[0]
    for wrong, why in (
        (replace(key, shape=key.shape[:2]), "must have 4 axes"),
        (replace(key, shape=(BATCH, "heads", PAST, 16)), "must have a fixed size"),
        (replace(key, dtype="double"), "has type double"),
    ):
        with pytest.raises(GraphError, match=f"{key.name}.*{why}"):
            Interface((wrong,), ()).feeds([1])
