"""Cleaning of an exported graph, on small graphs written down."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from iq_export.model.scopes import SCOPES, module_scope
from iq_export.model.tidy import drop_expands, settle_axes, settle_reshapes, tidy
from iq_export.run.ort import CausalLM, left_pad

VOCAB, HIDDEN = 11, 4


def scopes(*names: str) -> str:
    return str(["", *names, "operator"])


def node(op: str, inputs: list[ir.Value], scope: str = "", **attributes: int) -> ir.Node:
    parts = scope.split(".") if scope else []
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    made = ir.node(op, inputs, attributes)
    if scope:
        made.metadata_props[SCOPES] = scopes(*names)
    return made


def dims(*sizes: int | str) -> ir.Shape:
    return ir.Shape(list(sizes))


def raw_model() -> ir.Model:
    """A one-layer "causal LM" as the exporter would leave it: tied head, constants, repeats."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    integer = ir.TensorType(ir.DataType.INT64)
    random = np.random.default_rng(0)
    ids = ir.Value(name="input_ids", type=integer, shape=dims("batch", "seq"))
    mask = ir.Value(name="attention_mask", type=integer, shape=dims("batch", "s53"))
    positions = ir.Value(name="position_ids", type=integer, shape=dims("batch", "seq"))
    past = [
        ir.Value(name=f"past_key_values.0.{k}", type=kind, shape=dims("batch", 1, "past", HIDDEN))
        for k in ("key", "value")
    ]

    def initializer(name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype),
                        const_value=tensor)  # fmt: skip

    table = initializer("model.lm_head.weight", random.random((VOCAB, HIDDEN), np.float32))
    weight = initializer("model.base.layers.0.up.weight", random.random((6, HIDDEN), np.float32))
    down = initializer("model.base.layers.0.down.weight", random.random((HIDDEN, 6), np.float32))
    gain = initializer("model.base.layers.0.norm.weight", np.zeros(HIDDEN, np.float32))
    one = initializer("val_1", np.float32(1))
    axis_a = initializer("val_2", np.asarray([1]))
    axis_b = initializer("val_3", np.asarray([1]))
    scalar = initializer("val_4", np.asarray(1))

    embed = node("Gather", [table, ids], "model.base.embed")
    plus = node("Add", [gain, one], "model.base.layers.0.norm")
    norm = node("RMSNormalization", [embed.outputs[0], plus.outputs[0]], "model.base.layers.0.norm")
    turned = node("Transpose", [weight], "model.base.layers.0.up")
    up = node("MatMul", [norm.outputs[0], turned.outputs[0]], "model.base.layers.0.up")
    turned_down = node("Transpose", [down], "model.base.layers.0.down")
    lower = node("MatMul", [up.outputs[0], turned_down.outputs[0]], "model.base.layers.0.down")
    cosines = [node("Cos", [lower.outputs[0]], "model.base.layers.0") for _ in range(2)]
    total = node("Add", [c.outputs[0] for c in cosines], "model.base.layers.0")
    # Two unsqueezes by equal axes, and a scalar constant of the same value beside them.
    heads = [
        node("Unsqueeze", [total.outputs[0], axis], "model.base.layers.0")
        for axis in (axis_a, axis_b)
    ]
    sizes = [node("Shape", [value], start=0, end=1) for value in (past[1], ids)]
    size = node("Add", [sizes[0].outputs[0], sizes[1].outputs[0]])
    shift = node("Mul", [size.outputs[0], scalar])
    zero = node("Sub", [shift.outputs[0], shift.outputs[0]])
    as_float = node("Cast", [zero.outputs[0]], to=1)
    head_in = node("Add", [total.outputs[0], as_float.outputs[0]])
    turned_head = node("Transpose", [table], "model.lm_head")
    head = node("MatMul", [head_in.outputs[0], turned_head.outputs[0]], "model.lm_head")
    presents = [
        node("Concat", [p, h.outputs[0]], "model.base.layers.0", axis=2)
        for p, h in zip(past, heads, strict=True)
    ]
    head.outputs[0].name = "logits"
    for value, name in zip(presents, ("present.0.key", "present.0.value"), strict=True):
        value.outputs[0].name = name
        value.outputs[0].shape = dims("batch", 1, "past + seq", HIDDEN)
    head.outputs[0].shape = dims("batch", "seq", VOCAB)
    outputs = [head.outputs[0], *(p.outputs[0] for p in presents)]
    for value in outputs:
        value.type = kind
    nodes = [embed, plus, norm, turned, up, turned_down, lower, *cosines, total, *heads,
             *sizes, size, shift, zero, as_float, head_in, turned_head, head,
             *presents]  # fmt: skip
    graph = ir.Graph(
        [ids, mask, positions, *past], outputs, nodes=nodes, opset_imports={"": 23}, name="main",
        initializers=[table, weight, down, gain, one, axis_a, axis_b, scalar],
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


def logits(model: ir.Model, path: Path) -> np.ndarray:
    ir.save(model, path)
    return CausalLM(path).forward(*left_pad([[1, 2, 3], [4]], 0)).logits


def tidied() -> ir.Model:
    model = raw_model()
    settle_axes(model.graph)
    tidy(model, module_prefix="model.base")
    return model


def test_the_result_is_the_same(tmp_path: Path) -> None:
    before = logits(raw_model(), tmp_path / "before.onnx")
    np.testing.assert_array_equal(logits(tidied(), tmp_path / "after.onnx"), before)


def test_it_is_deterministic() -> None:
    first, second = (ir.to_proto(tidied()).SerializeToString() for _ in range(2))
    assert first == second


def test_weights_are_transposed_and_a_tied_table_is_not() -> None:
    graph = tidied().graph
    source = raw_model().graph.initializers
    kept = graph.initializers
    for name in ("up", "down"):
        original = source[f"model.base.layers.0.{name}.weight"].const_value.numpy()
        np.testing.assert_array_equal(
            kept[f"layers.0.{name}.weight"].const_value.numpy(), original.T
        )
    assert "embed.weight" in kept and "lm_head.weight" not in kept
    transposes = [n for n in graph if n.op_type == "Transpose"]
    assert [n.inputs[0].name for n in transposes] == ["embed.weight"]


def test_names() -> None:
    names = [n.name for n in tidied().graph]
    assert len(set(names)) == len(names)
    assert {"embed", "layers.0/norm", "layers.0/up", "layers.0/down", "lm_head"} <= set(names)
    outputs = [out.name for n in tidied().graph for out in n.outputs]
    assert "layers.0/down/out" in outputs and len(set(outputs)) == len(outputs)


def test_an_expression_of_parameters_becomes_the_norms_weight() -> None:
    graph = tidied().graph
    weight = graph.initializers["layers.0.norm.weight"]
    np.testing.assert_array_equal(weight.const_value.numpy(), np.ones(HIDDEN, np.float32))
    norm = next(n for n in graph if n.op_type == "RMSNormalization")
    assert norm.inputs[1] is weight


def test_repeats_are_merged() -> None:
    graph = tidied().graph
    assert sum(n.op_type == "Cos" for n in graph) == 1
    assert sum(n.op_type == "Unsqueeze" for n in graph) == 1
    # Both sizes are the batch: read once, and from the ids.
    shapes = [n for n in graph if n.op_type == "Shape"]
    assert [n.inputs[0].name for n in shapes] == ["input_ids"]


def test_a_scalar_is_not_merged_with_a_vector_of_one() -> None:
    """As axes, ONNX Runtime would take the scalar, TensorRT not."""
    graph = tidied().graph
    axes = next(n for n in graph if n.op_type == "Unsqueeze").inputs[1]
    assert tuple(axes.const_value.shape.numpy()) == (1,)


def test_axes_are_named() -> None:
    graph = tidied().graph
    by_name = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    assert [str(d) for d in by_name["attention_mask"].shape] == ["batch", "total"]
    assert [str(d) for d in by_name["present.0.key"].shape] == ["batch", "1", "total", "4"]


def test_no_metadata_is_left() -> None:
    model = tidied()
    assert model.producer_name == "iq-export"
    assert not any(n.metadata_props for n in model.graph)


def test_module_scope() -> None:
    assert module_scope(node("Add", [], "model.base.layers.0.mlp")) == "model.base.layers.0.mlp"
    assert module_scope(ir.node("Add", [])) == ""
    outside = ir.node("Shape", [])
    outside.metadata_props[SCOPES] = str(["_empty_nn_module_stack_from_metadata_hook", "sym"])
    assert module_scope(outside) == ""


def test_a_constant_that_is_cast_like_an_activation_is_one() -> None:
    """It would be a scalar that is computed in every run, and no type of its own tells which."""
    model = raw_model()
    total = next(n for n in model.graph if n.op_type == "MatMul").outputs[0]
    untyped = node("Exp", [total])
    one = model.graph.initializers["val_4"]  # int64
    alike = node("CastLike", [one, untyped.outputs[0]])
    less = node("Sub", [untyped.outputs[0], alike.outputs[0]])
    total.replace_all_uses_with(less.outputs[0])
    untyped.replace_input_with(0, total)
    model.graph.insert_after(total.producer(), [untyped, alike, less])
    settle_axes(model.graph)
    tidy(model, module_prefix="model.base")
    found = next(n for n in model.graph if n.op_type == "Sub")
    constant = found.inputs[1]
    assert constant is not None and constant.const_value is not None
    assert constant.const_value.dtype == ir.DataType.FLOAT and constant.const_value.numpy() == 1
    assert not any(n.op_type in ("Cast", "CastLike") for n in found.inputs[0].consumers())


@pytest.mark.parametrize(
    ("before", "after", "sizes"),
    (
        (("batch", "seq", 8), ("batch", "seq", 2, 4), [0, 0, 2, 4]),
        (("batch", "seq", 2, 4), ("batch", "seq", 8), [0, 0, 8]),
        # An axis that is neither fixed nor where it was: the computed sizes stay.
        (("batch", "seq", 8), ("seq", "batch", 8), None),
        (("batch", "seq"), ("batch*seq",), None),
    ),
)
def test_reshapes_get_constant_sizes(
    before: tuple[int | str, ...], after: tuple[int | str, ...], sizes: list[int] | None
) -> None:
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", type=kind, shape=dims(*before))
    computed = ir.Value(name="sizes", type=ir.TensorType(ir.DataType.INT64), shape=dims(len(after)))
    reshape = ir.node("Reshape", [x, computed], {"allowzero": 1})
    reshape.outputs[0].name, reshape.outputs[0].type = "y", kind
    reshape.outputs[0].shape = dims(*after)
    graph = ir.Graph(
        [x, computed], reshape.outputs, nodes=[reshape], opset_imports={"": 23}, name="main"
    )
    settle_reshapes(graph)
    if sizes is None:
        assert reshape.inputs[1] is computed
    else:
        constant = reshape.inputs[1]
        assert constant is not None and constant.const_value is not None
        assert constant.const_value.numpy().tolist() == sizes
        # With allowzero a 0 would mean an empty axis instead of "as the input".
        assert "allowzero" not in reshape.attributes


@pytest.mark.parametrize(("other", "kept"), [(("batch", "seq", 8), 0), (("batch", 1, 8), 1)])
def test_an_addition_spreads_a_bias_itself(other: tuple[int | str, ...], kept: int) -> None:
    """Where nothing else needs it spread: as in a module's own sum of a product and its bias."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", type=kind, shape=dims(*other))
    sizes = ir.Value(name="sizes", type=ir.TensorType(ir.DataType.INT64), shape=dims(3))
    bias = ir.Value(
        name="bias", type=kind, shape=dims(8), const_value=ir.tensor(np.ones(8, np.float32))
    )
    wide = ir.node("Expand", [bias, sizes])
    wide.outputs[0].shape = dims("batch", "seq", 8)
    add = ir.node("Add", [x, wide.outputs[0]])
    graph = ir.Graph(
        [x, sizes], add.outputs, nodes=[wide, add], initializers=[bias], opset_imports={"": 23},
        name="main",
    )  # fmt: skip
    drop_expands(graph)
    assert sum(node.op_type == "Expand" for node in graph) == kept
    assert (add.inputs[1] is bias) == (not kept)
