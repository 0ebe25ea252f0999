"""Find the places that matter by topology: residual stream, norms, weighted products, attention.

No model family is named here. A block is two residual additions whose branches start at a norm of
the stream; the branch with an attention product is the attention branch, the other one the MLP.
Everything that does not fit is reported with its node and the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from iq_export.errors import GraphError

NORM_OPS = frozenset({"RMSNormalization", "LayerNormalization"})
# Of a norm that states none: the operators' default.
_EPSILON = 1e-5
# What may stand between a product and the tensor it belongs to without changing any element.
LAYOUT_OPS = frozenset({"Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Cast"})


@dataclass(frozen=True)
class Linear:
    """A MatMul whose second operand is a constant `[in_features, out_features]`."""

    node: str
    input: str
    weight: str
    output: str  # the product's own output, before a bias
    in_features: int
    out_features: int


@dataclass(frozen=True)
class AttentionSite:
    """An `Attention` node and this step's keys and values, before they join the KV cache.

    `key` is read after its rotary embedding. Both are `[batch, heads, seq, head_dim]` or, with
    `heads` None, `[batch, seq, features]`; `key_features` and `value_features` are the sizes of
    one token's key and value, all heads together.
    """

    node: str
    key: str
    value: str
    heads: int | None
    key_features: int
    value_features: int


@dataclass(frozen=True)
class Branch:
    """One residual branch: norm -> `inputs` -> ... -> `output` [-> post-norm] -> residual Add."""

    kind: str  # "attention" or "mlp"
    stream: str  # residual value the branch reads, [batch, seq, hidden]
    norm: str  # node name of the norm
    norm_output: str
    inputs: tuple[Linear, ...]  # q, k, v or gate, up: the products that read the norm's output
    output: Linear  # o or down
    residual: str  # residual value after the Add
    # Index in `inputs` of the product that enters `output` by an elementwise product alone
    # (the "up" of a gated MLP), so that a per-channel scale passes through; None otherwise.
    linear_path: int | None = None
    # The single Attention op of an attention branch; None where the product is decomposed.
    attention: AttentionSite | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (*self.inputs, self.output)


@dataclass(frozen=True)
class Block:
    index: int
    attention: Branch
    mlp: Branch


@dataclass(frozen=True)
class Refusal:
    """A part of the graph that is left as it is: its node and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class Sites:
    hidden: int
    embedding: str  # residual value before the first block
    blocks: tuple[Block, ...]
    final_norm: str  # node name
    refused: tuple[Refusal, ...]

    @property
    def linears(self) -> list[Linear]:
        """Every product of every block, in graph order."""
        return [
            linear
            for block in self.blocks
            for branch in (block.attention, block.mlp)
            for linear in branch.linears
        ]


def find_sites(model: ir.Model) -> Sites:
    """Walk the residual stream from the embedding to the last norm.

    Raises GraphError, with a node and the reason, if there is no stream or no block is understood.
    """
    graph = model.graph
    stream = _embedding(graph)
    embedding = stream
    branches: list[Branch] = []
    refused: list[Refusal] = []
    while (add := _residual_add(stream)) is not None:
        found = _branch(stream, add)
        if isinstance(found, Branch):
            branches.append(found)
        else:
            refused.append(found)
        stream = add.outputs[0]
    final = [node for node in stream.consumers() if node.op_type in NORM_OPS]
    blocks, unpaired = _pair(branches)
    refused += unpaired
    if not blocks:
        first = refused[0] if refused else Refusal(_label(embedding.producer()), _NO_STREAM)
        raise GraphError(f"No transformer block was understood: node {first.node}: {first.reason}")
    if not final:
        raise GraphError(
            f"The residual stream ends at {stream.name!r} without a norm; only pre-norm "
            "transformers (a norm before each branch and one at the end) are supported."
        )
    return Sites(
        hidden=branches[0].output.out_features,
        embedding=embedding.name,
        blocks=tuple(blocks),
        final_norm=final[0].name,
        refused=tuple(refused),
    )


_NO_STREAM = (
    "no residual stream starts here: expected a norm and an Add that both read the embedding "
    "(pre-norm transformer)"
)


def norm_epsilon(norm: ir.Node) -> float:
    """What one of NORM_OPS adds to the mean square, or to the variance."""
    stated = norm.attributes.get("epsilon")
    return _EPSILON if stated is None else stated.as_float()


def _label(node: ir.Node | None) -> str:
    return "<graph input>" if node is None else f"{node.name} ({node.op_type})"


def _embedding(graph: ir.Graph) -> ir.Value:
    """The first value that a norm and a residual Add both read, or the token embedding."""
    for node in graph:
        if node.op_type in NORM_OPS:
            value = node.inputs[0]
            if value is not None and _residual_add(value) is not None:
                return value
    for node in graph:
        if node.op_type == "Gather" and _is_constant(node.inputs[0]):
            raise GraphError(
                f"No residual stream was found after {_label(node)}: {_NO_STREAM}."
                f"{_decomposed(graph)}"
            )
    raise GraphError(
        "The graph has no token embedding: expected a Gather from a table of weights."
        f"{_decomposed(graph)}"
    )


def _decomposed(graph: ir.Graph) -> str:
    """What may explain it, where the graph has no norm that is a single op."""
    if any(node.op_type in NORM_OPS for node in graph):
        return ""
    return (
        " It has no RMSNormalization or LayerNormalization node; norms that are written out "
        "(ReduceMean, Sqrt, ...) are not recognised."
    )


def _residual_add(stream: ir.Value) -> ir.Node | None:
    """The Add that carries the stream on: both operands computed, one of them the stream."""
    for node in stream.consumers():
        if node.op_type == "Add" and not any(_is_constant(value) for value in node.inputs):
            return node
    return None


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _branch(stream: ir.Value, add: ir.Node) -> Branch | Refusal:
    tail = next(value for value in add.inputs if value is not stream)
    norms = [node for node in stream.consumers() if node.op_type in NORM_OPS]
    if not norms:
        return Refusal(_label(add), f"no norm reads the residual value {stream.name!r} before it")
    output = _producing_linear(tail)
    if output is None:
        return Refusal(
            _label(add), f"the added value {tail.name!r} does not come from a weighted MatMul"
        )
    inside = _between(stream, output)
    norm = next((node for node in norms if node in inside), None)
    if norm is None:
        return Refusal(_label(output), f"its branch does not start at a norm of {stream.name!r}")
    normed = norm.outputs[0]
    inputs = [node for node in normed.consumers() if _is_linear(node)]
    if not inputs:
        return Refusal(_label(norm), "no weighted MatMul reads this norm")
    products = [node for node in inside if _is_attention(node)]
    kind = "attention" if products else "mlp"
    return Branch(
        kind=kind,
        stream=stream.name,
        norm=norm.name,
        norm_output=normed.name,
        inputs=tuple(_linear(node) for node in inputs),
        output=_linear(output),
        residual=add.outputs[0].name,
        linear_path=_linear_path(inputs, output) if kind == "mlp" else None,
        attention=_attention_site(products[0]) if len(products) == 1 else None,
    )


def _producing_linear(value: ir.Value) -> ir.Node | None:
    """The weighted MatMul behind `value`, through a bias, post-norm, scale or layout change."""
    node = value.producer()
    while node is not None and not _is_linear(node):
        if node.op_type in NORM_OPS or node.op_type in LAYOUT_OPS:
            node = node.inputs[0].producer()
        elif node.op_type in {"Add", "Mul"}:
            computed = [v for v in node.inputs if not _is_constant(v)]
            if len(computed) != 1:
                return None
            node = computed[0].producer()
        else:
            return None
    return node


def _between(stream: ir.Value, end: ir.Node) -> set[ir.Node]:
    """All nodes on paths that lead to `end`, stopping at the residual stream."""
    seen: set[ir.Node] = {end}
    todo = [end]
    while todo:
        for value in todo.pop().inputs:
            if value is None or value is stream:
                continue
            producer = value.producer()
            if producer is not None and producer not in seen:
                seen.add(producer)
                todo.append(producer)
    return seen


def _is_linear(node: ir.Node) -> bool:
    return (
        node.op_type == "MatMul"
        and _is_constant(node.inputs[1])
        and len(node.inputs[1].shape or ()) == 2
    )


def _is_attention(node: ir.Node) -> bool:
    if node.op_type == "Attention":
        return True
    return node.op_type == "MatMul" and not any(_is_constant(value) for value in node.inputs)


def _attention_site(node: ir.Node) -> AttentionSite | None:
    """None for a decomposed product, or where a size that must be fixed is not."""
    if node.op_type != "Attention":
        return None
    key, value = (_this_step(node.inputs[position]) for position in (1, 2))
    sizes = [_token_sizes(tensor) for tensor in (key, value)]
    if sizes[0] is None or sizes[1] is None:
        return None
    (heads, key_features), (_, value_features) = sizes
    return AttentionSite(node.name, key.name, value.name, heads, key_features, value_features)


def _token_sizes(tensor: ir.Value) -> tuple[int | None, int] | None:
    """`(heads or None, features of one token)` of a key or value; None if they are not fixed."""
    match tuple(tensor.shape or ()):
        case (_, int(heads), _, int(size)):
            return heads, heads * size
        case (_, _, int(size)):
            return None, size
    return None


def _this_step(value: ir.Value) -> ir.Value:
    """What a Concat appends to the cache (a graph input), else the value itself."""
    node = value.producer()
    if node is not None and node.op_type == "Concat" and len(node.inputs) == 2:
        past, new = node.inputs
        if past is not None and new is not None and past.is_graph_input():
            return new
    return value


def _linear(node: ir.Node) -> Linear:
    rows, columns = node.inputs[1].shape.numpy()
    return Linear(
        node=node.name,
        input=node.inputs[0].name,
        weight=node.inputs[1].name,
        output=node.outputs[0].name,
        in_features=rows,
        out_features=columns,
    )


def _linear_path(inputs: list[ir.Node], output: ir.Node) -> int | None:
    product = output.inputs[0].producer()
    if product is None or product.op_type != "Mul":
        return None
    for index, node in enumerate(inputs):
        # A bias would have to be scaled too; a gated MLP with biases is left unsmoothed.
        if any(value is node.outputs[0] for value in product.inputs):
            consumers = node.outputs[0].consumers()
            if len(consumers) == 1:
                return index
    return None


def _pair(branches: list[Branch]) -> tuple[list[Block], list[Refusal]]:
    blocks: list[Block] = []
    refused: list[Refusal] = []
    waiting: Branch | None = None
    for branch in branches:
        if branch.kind == "attention":
            if waiting is not None:
                refused.append(Refusal(waiting.norm, "no MLP branch follows this attention branch"))
            waiting = branch
        elif waiting is None:
            refused.append(Refusal(branch.norm, "no attention branch precedes this MLP branch"))
        else:
            blocks.append(Block(len(blocks), waiting, branch))
            waiting = None
    if waiting is not None:
        refused.append(Refusal(waiting.norm, "no MLP branch follows this attention branch"))
    return blocks, refused
