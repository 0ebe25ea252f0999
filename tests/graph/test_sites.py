"""Sites are found by topology; what does not fit is reported with its node and the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from iq_export.errors import GraphError
from iq_export.graph.sites import AttentionSite, Sites, find_sites
from tests.passes.goldens import FOLDER as GRAPHS
from tests.planted import Decoder, Planted, proto

SMALL = Decoder(
    blocks=3, hidden=8, heads=2, kv_heads=1, head_dim=4, features=16, vocab=10, positions=8,
    spikes=(),
)  # fmt: skip
Change = Callable[[onnx.ModelProto], None]


def sites_of(change: Change | None = None, decoder: Decoder = SMALL) -> Sites:
    model = proto(decoder)
    if change is not None:
        change(model)
    return find_sites(ir.from_proto(model))


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def reroute(model: onnx.ModelProto, old: str, new: str, readers: tuple[str, ...]) -> None:
    """Let the nodes called `readers` read `new` where they read `old`."""
    for name in readers:
        inputs = node(model, name).input
        inputs[:] = [new if value == old else value for value in inputs]


def insert(model: onnx.ModelProto, before: str, *nodes: onnx.NodeProto) -> None:
    position = [node.name for node in model.graph.node].index(before)
    for offset, new in enumerate(nodes):
        model.graph.node.insert(position + offset, new)


def weight(model: onnx.ModelProto, name: str, size: int) -> str:
    model.graph.initializer.append(
        helper.make_tensor(name, onnx.TensorProto.FLOAT, [size], [1.0] * size)
    )
    return name


def test_blocks_of_a_decoder() -> None:
    sites = sites_of()
    assert sites.hidden == 8
    assert sites.embedding == "embed/out"
    assert sites.final_norm == "norm"
    assert sites.refused == ()
    assert [block.index for block in sites.blocks] == [0, 1, 2]
    block = sites.blocks[1]
    attention, mlp = block.attention, block.mlp
    assert (attention.kind, mlp.kind) == ("attention", "mlp")
    assert attention.stream == "layers.0/Add_2/out"
    assert attention.norm == "layers.1/input_layernorm"
    assert attention.input == "layers.1/input_layernorm/out"
    assert [x.node for x in attention.linears] == [
        f"layers.1/self_attn/{kind}_proj" for kind in "qkvo"
    ]
    assert attention.residual == mlp.stream == "layers.1/Add/out"
    assert [x.node for x in mlp.inputs] == ["layers.1/mlp/gate_proj", "layers.1/mlp/up_proj"]
    assert mlp.output.node == "layers.1/mlp/down_proj"
    assert mlp.output.weight == "layers.1.mlp.down_proj.weight"
    assert (mlp.output.in_features, mlp.output.out_features) == (16, 8)
    assert mlp.residual == "layers.1/Add_2/out"


def test_the_up_projection_is_the_linear_path() -> None:
    """The gate goes through an activation, so no per-channel scale passes through it."""
    sites = sites_of()
    assert {block.mlp.linear_path for block in sites.blocks} == {1}
    assert {block.attention.linear_path for block in sites.blocks} == {None}


def test_linears_are_those_of_the_blocks() -> None:
    """Seven per block; the tied head is none of them."""
    linears = sites_of().linears
    assert len(linears) == 21
    assert len({linear.node for linear in linears}) == 21
    assert "lm_head" not in {linear.node for linear in linears}


def test_order_of_nodes_does_not_matter() -> None:
    def reorder(model: onnx.ModelProto) -> None:
        up = node(model, "layers.1/mlp/up_proj")
        copy = onnx.NodeProto()
        copy.CopyFrom(up)
        model.graph.node.remove(up)
        insert(model, "layers.1/mlp/gate_proj", copy)

    up_first = sites_of(reorder).blocks[1].mlp
    assert up_first.inputs[up_first.linear_path].node == "layers.1/mlp/up_proj"


def test_norms_on_heads_biases_and_post_norms_are_understood() -> None:
    """As in models that normalise queries, add biases, and normalise a branch's output."""

    def change(model: onnx.ModelProto) -> None:
        insert(
            model,
            "layers.1/self_attn/q_rotary",
            helper.make_node(
                "RMSNormalization",
                ["layers.1/self_attn/q_heads/out", weight(model, "q.norm", 4)],
                ["q/normed"],
                name="q/norm",
            ),
        )
        reroute(
            model, "layers.1/self_attn/q_heads/out", "q/normed", ("layers.1/self_attn/q_rotary",)
        )
        insert(
            model,
            "layers.1/Add_2",
            helper.make_node(
                "Add",
                ["layers.1/mlp/down_proj/out", weight(model, "bias", 8)],
                ["biased"],
                name="bias",
            ),
            helper.make_node(
                "RMSNormalization", ["biased", weight(model, "post", 8)], ["post/out"], name="post"
            ),
        )
        reroute(model, "layers.1/mlp/down_proj/out", "post/out", ("layers.1/Add_2",))

    sites = sites_of(change)
    assert len(sites.blocks) == 3
    assert sites.refused == ()
    assert sites.blocks[1].mlp.output.node == "layers.1/mlp/down_proj"


def test_decomposed_attention_is_understood() -> None:
    def change(model: onnx.ModelProto) -> None:
        fused = node(model, "layers.1/self_attn/Attention")
        query, _, value, _ = fused.input
        present = "present.1.key"
        insert(
            model,
            fused.name,
            helper.make_node("Transpose", [present], ["kt"], name="kt", perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", [query, "kt"], ["scores"], name="scores"),
            helper.make_node("Softmax", ["scores"], ["shares"], name="shares"),
            helper.make_node("MatMul", ["shares", value], list(fused.output), name="context"),
        )
        model.graph.node.remove(fused)

    sites = sites_of(change)
    assert [block.attention.kind for block in sites.blocks] == ["attention"] * 3


def test_layer_normalization_counts_as_a_norm() -> None:
    def change(model: onnx.ModelProto) -> None:
        for item in model.graph.node:
            if item.op_type == "RMSNormalization":
                item.op_type = "LayerNormalization"

    assert len(sites_of(change).blocks) == 3


def test_missing_norm_is_refused_by_node() -> None:
    """Block 1's MLP reads the residual as it is: that block is left alone, the others are found."""

    def change(model: onnx.ModelProto) -> None:
        stream, normed = "layers.1/Add/out", "layers.1/post_attention_layernorm/out"
        readers = ("layers.1/mlp/gate_proj", "layers.1/mlp/up_proj")
        reroute(model, normed, stream, readers)
        model.graph.node.remove(node(model, "layers.1/post_attention_layernorm"))

    sites = sites_of(change)
    assert [block.mlp.output.node for block in sites.blocks] == [
        "layers.0/mlp/down_proj",
        "layers.2/mlp/down_proj",
    ]
    reasons = {refusal.node: refusal.reason for refusal in sites.refused}
    assert reasons == {
        "layers.1/Add_2 (Add)": "no norm reads the residual value 'layers.1/Add/out' before it",
        "layers.1/input_layernorm": "no MLP branch follows this attention branch",
    }


def test_branch_without_a_product_is_refused_by_node() -> None:
    def change(model: onnx.ModelProto) -> None:
        reroute(
            model, "layers.2/mlp/down_proj/out", "layers.2/mlp/act/Mul/out", ("layers.2/Add_2",)
        )
        node(model, "layers.2/mlp/act/Mul").input[1] = "layers.2/mlp/act/Sigmoid/out"
        node(model, "layers.2/mlp/act/Mul").input[0] = "layers.2/mlp/act/Sigmoid/out"

    refused = {refusal.node: refusal.reason for refusal in sites_of(change).refused}
    assert "does not come from a weighted MatMul" in refused["layers.2/Add_2 (Add)"]


def test_branch_that_reads_another_norm_is_refused() -> None:
    """A parallel norm of the stream is not enough: the branch itself must start at one."""

    def change(model: onnx.ModelProto) -> None:
        for name in ("gate", "up"):
            reroute(
                model,
                "layers.1/post_attention_layernorm/out",
                "layers.1/input_layernorm/out",
                (f"layers.1/mlp/{name}_proj",),
            )

    refused = {refusal.node: refusal.reason for refusal in sites_of(change).refused}
    reason = refused["layers.1/mlp/down_proj (MatMul)"]
    assert reason == "its branch does not start at a norm of 'layers.1/Add/out'"


def test_no_attention_at_all_is_an_error() -> None:
    def change(model: onnx.ModelProto) -> None:
        for i in range(SMALL.blocks):
            at = f"layers.{i}/self_attn/"
            reroute(model, f"{at}Attention/out", f"{at}q_heads/out", (f"{at}together",))
            model.graph.node.remove(node(model, f"{at}Attention"))

    with pytest.raises(GraphError, match="no attention branch precedes this MLP branch"):
        sites_of(change)


def test_what_else_reads_a_sum_keeps_its_norm_from_standing_in_the_stream() -> None:
    """`x = norm(x + f(x))` where `x + f(x)` is read too."""

    def change(model: onnx.ModelProto) -> None:
        reader = helper.make_node("Tanh", ["layers.0/Add/out"], ["other"], name="reader")
        model.graph.node.append(reader)
        model.graph.output.append(helper.make_tensor_value_info("other", 1, None))

    decoder = replace(SMALL, bare=True, within=True)
    assert len(sites_of(decoder=decoder).blocks) == SMALL.blocks
    sites = sites_of(change, decoder=decoder)
    assert sites.embedding == "layers.0/input_layernorm/out"
    assert len(sites.blocks) == SMALL.blocks - 1
    assert [r.reason for r in sites.refused] == ["no attention branch precedes this MLP branch"]


def test_decomposed_norms_are_an_error_with_the_way_out() -> None:
    def change(model: onnx.ModelProto) -> None:
        for item in model.graph.node:
            if item.op_type == "RMSNormalization":
                item.op_type = "Mul"
                del item.attribute[:]

    with pytest.raises(GraphError, match=r"embed_tokens \(Gather\).*written out"):
        sites_of(change)


def test_graph_without_norms_or_embedding() -> None:
    text = "<ir_version: 10, opset_import: ['' : 23]> g (float[2] x) => (float[2] y) {y = Abs (x)}"
    with pytest.raises(GraphError, match="no RMSNormalization"):
        find_sites(ir.from_proto(onnx.parser.parse_model(text.replace("'", '"'))))


def test_no_final_norm_is_an_error() -> None:
    def change(model: onnx.ModelProto) -> None:
        reroute(model, "norm/out", "layers.2/Add_2/out", ("lm_head",))
        model.graph.node.remove(node(model, "norm"))

    with pytest.raises(GraphError, match=r"ends at 'layers.2/Add_2/out' without a norm"):
        sites_of(change)


def test_keys_and_values_of_an_attention_are_those_of_this_step() -> None:
    """After the rotary embedding, before the Concat with the cache."""
    site = sites_of().blocks[1].attention.attention
    at = "layers.1/self_attn"
    assert site == AttentionSite(
        node=f"{at}/Attention", key=f"{at}/k_rotary/out", value=f"{at}/v_heads/out",
        heads=1, key_features=4, value_features=4,
    )  # fmt: skip
    assert sites_of().blocks[1].mlp.attention is None
    without = sites_of(decoder=replace(SMALL, cache=False))
    assert without.blocks[1].attention.attention == site


def test_attention_on_three_axes() -> None:
    model = onnx.parser.parse_model((GRAPHS / "insert_sinks.before.onnxtxt").read_text("utf-8"))
    sites = find_sites(ir.from_proto(onnx.shape_inference.infer_shapes(model)))
    assert sites.blocks[0].attention.attention == AttentionSite(
        "attention0", "k0_out", "v0_out", None, 4, 4
    )


def test_attention_that_is_no_single_op_has_no_site() -> None:
    def change(model: onnx.ModelProto) -> None:
        old = node(model, "layers.1/self_attn/Attention")
        query, key, *_ = old.input
        product = helper.make_node("MatMul", [query, key], ["scores"], name="scores")
        value = helper.make_node("MatMul", ["scores", old.input[2]], [old.output[0]], name="mixed")
        insert(model, old.name, product, value)
        model.graph.node.remove(old)

    branch = sites_of(change).blocks[1].attention
    assert (branch.kind, branch.attention) == ("attention", None)


def test_weight_as_graph_input_is_no_linear() -> None:
    """A product with a computed operand is an attention product, not a weighted one."""

    def change(model: onnx.ModelProto) -> None:
        name = "layers.1.mlp.down_proj.weight"
        tensor = next(t for t in model.graph.initializer if t.name == name)
        model.graph.initializer.remove(tensor)
        model.graph.input.append(
            helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
        )

    assert {r.node for r in sites_of(change).refused} >= {"layers.1/Add_2 (Add)"}


def test_reading_sites_loads_no_weight(spiky: Planted) -> None:
    """On a skeleton the weights stay in their file."""
    model = spiky.load()
    find_sites(model)
    tensor = model.graph.initializers["layers.0.mlp.down_proj.weight"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.raw is None


BARE = replace(SMALL, bare=True, post_norms=True)


def test_a_stream_that_is_read_by_more_than_products_is_refused() -> None:
    """Whatever reads the stream itself would read a clamped spike and no template."""

    def change(model: onnx.ModelProto) -> None:
        stream, key = "layers.0/Add_2/out", "layers.1/self_attn/k_proj"
        factor = weight(model, "factor", 1)
        insert(model, key, helper.make_node("Mul", [stream, factor], ["half"], "half"))
        reroute(model, stream, "half", (key,))

    assert sites_of(decoder=BARE).refused == ()
    refused = sites_of(change, BARE).refused
    assert ("half (Mul)", "it reads the residual value 'layers.0/Add_2/out' as it is") in [
        (each.node, each.reason) for each in refused
    ]


@pytest.mark.parametrize("size", [1, 7])
def test_a_norm_whose_weight_is_no_vector_is_refused(size: int) -> None:
    def change(model: onnx.ModelProto) -> None:
        node(model, "layers.1/input_layernorm").input[1] = weight(model, "short", size)

    (first, *_) = sites_of(change).refused
    assert first.node == "layers.1/input_layernorm (RMSNormalization)"
    assert "no stored vector" in first.reason


def test_the_first_block_may_have_no_norm_in_front() -> None:
    def change(model: onnx.ModelProto) -> None:
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = node(model, f"layers.0/{name}")
            readers = [each.name for each in model.graph.node if norm.output[0] in each.input]
            reroute(model, norm.output[0], norm.input[0], tuple(readers))
            model.graph.node.remove(norm)

    sites = sites_of(change, replace(SMALL, post_norms=True))
    assert sites.embedding == "embed/out"
    assert [branch.norm is None for block in sites.blocks for branch in block.branches] == (
        [True] * 2 + [False] * 4
    )


def test_products_may_read_an_embedding_that_has_passed_a_norm() -> None:
    """The first block of some models has no norm of its own in front of its attention."""

    def change(model: onnx.ModelProto) -> None:
        first = "layers.0/input_layernorm"
        reroute(model, "embed/out", f"{first}/out", ("layers.0/Add",))

    sites = sites_of(change)
    assert sites.refused == () and len(sites.blocks) == SMALL.blocks
    assert sites.embedding == "layers.0/input_layernorm/out"
    first = sites.blocks[0]
    assert (first.attention.norm, first.attention.input) == (None, sites.embedding)
    assert first.mlp.norm == "layers.0/post_attention_layernorm"


def test_one_attention_op_is_the_attention_beside_other_products() -> None:
    """As angles of a rotation that are computed by a MatMul."""

    def change(model: onnx.ModelProto) -> None:
        product = "layers.1/self_attn/o_proj"
        read = node(model, product).input[0]
        turn = helper.make_node("Transpose", [read], ["turned"], "turned", perm=[0, 2, 1])
        square = helper.make_node("MatMul", ["turned", read], ["square"], "square")
        again = helper.make_node("MatMul", [read, "square"], ["again"], "again")
        insert(model, product, turn, square, again)
        reroute(model, read, "again", (product,))

    attention = sites_of(change).blocks[1].attention.attention
    assert attention is not None and attention.node == "layers.1/self_attn/Attention"


def test_products_read_a_stream_that_a_factor_scales_as_it_is() -> None:
    decoder = Decoder(post_norms=True, bare=True, factor=0.5)
    sites = find_sites(ir.from_proto(proto(decoder)))
    assert set(sites.bare) == {branch.input for branch in sites.branches}
    assert "layers.0/factor/out" in sites.bare
