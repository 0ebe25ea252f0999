"""Find the places that matter by topology: residual stream, norms, weighted products, attention.

No model family is named here. A block is two branches that are added to the stream; the one with an
attention product is the attention branch, the other one the MLP. A branch starts at a norm of the
stream; or it reads the stream itself, and it ends in a norm, or its sum with the stream passes one,
or the stream has just passed one.
The second branch of a block reads what the first one gave, or the same value as the first one
(parallel branches). Everything that does not fit is reported with its node and the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """One residual branch: [norm ->] `inputs` -> ... -> `output` [-> norm] -> residual Add
    [-> norm].

    Without a norm in front there is one behind the branch or behind the addition, and the products
    read the stream itself.
    """

    kind: str  # "attention" or "mlp"
    stream: str  # residual value the branch reads, [batch, seq, hidden]
    norm: str | None  # node name of the norm in front
    input: str  # what `inputs` read: the norm's output, or the stream
    inputs: tuple[Linear, ...]  # q, k, v or gate, up
    output: Linear  # o or down
    added: str  # what joins the stream: `output` with its bias, or behind its norm
    # Node names of the Adds that take it there; of parallel branches one is theirs alone.
    adds: tuple[str, ...]
    residual: str  # residual value after these: parallel branches have the same
    # What the next branch reads and is added to: `residual`, or the norm that stands behind it.
    onward: str
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

    @property
    def branches(self) -> tuple[Branch, Branch]:
        return (self.attention, self.mlp)


@dataclass(frozen=True)
class Norm:
    """A norm in front of branches, and all their products that read it: parallel ones may share
    it."""

    node: str
    output: str
    linears: tuple[Linear, ...]


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
        return [linear for branch in self.branches for linear in branch.linears]

    @property
    def branches(self) -> list[Branch]:
        return [branch for block in self.blocks for branch in block.branches]

    @property
    def bare(self) -> dict[str, tuple[Linear, ...]]:
        """The products that read a sum of the stream as it is, with no norm between, by the sum's
        name: those of both branches, where these are parallel."""
        found: dict[str, tuple[Linear, ...]] = {}
        sums = {self.embedding, *(branch.residual for branch in self.branches)}
        for branch in self.branches:
            if branch.norm is None and branch.input in sums:
                found[branch.input] = (*found.get(branch.input, ()), *branch.inputs)
        return found

    @property
    def norms(self) -> list[Norm]:
        """Every norm in front of a branch, each once."""
        found: dict[str, Norm] = {}
        for branch in self.branches:
            if branch.norm is not None:
                there = found.get(branch.norm)
                linears = (*(there.linears if there else ()), *branch.inputs)
                found[branch.norm] = Norm(branch.norm, branch.input, linears)
        return list(found.values())


def find_sites(model: ir.Model) -> Sites:
    """Walk the residual stream from the embedding to the last norm.

    Raises GraphError, with a node and the reason, if there is no stream or no block is understood.
    """
    graph = model.graph
    stream = embedding = _embedding(graph)
    together: list[list[Branch]] = []  # those that read the same residual value
    refused: list[Refusal] = []
    while (add := _residual_add(stream)) is not None:
        found = _joined(together[-1], stream, add) if together else None
        if found is not None:
            together[-1] = found
        else:
            for branch in _branches(stream, add):
                if isinstance(branch, Refusal):
                    refused.append(branch)
                elif together and together[-1][-1].adds[-1] == str(add.name):
                    together[-1].append(branch)
                else:
                    together.append([branch])
        stream = add.outputs[0]
        norm = _norm_within(stream)
        if norm is not None:
            if together and together[-1][0].residual == stream.name:
                onward = str(norm.outputs[0].name)
                together[-1] = [replace(branch, onward=onward) for branch in together[-1]]
            stream = norm.outputs[0]
    final = [node for node in stream.consumers() if node.op_type in NORM_OPS]
    blocks, unpaired = _pair(together)
    refused += unpaired
    if not blocks:
        first = refused[0] if refused else Refusal(_label(embedding.producer()), _NO_STREAM)
        raise GraphError(f"No transformer block was understood: node {first.node}: {first.reason}")
    if not final:
        raise GraphError(
            f"The residual stream ends at {stream.name!r} without a norm; only transformers whose "
            "stream passes a norm at the end are supported."
        )
    if not _has_vector(final[0]):
        raise GraphError(f"{_label(final[0])} ends the residual stream, and {_NO_VECTOR}.")
    return Sites(
        hidden=blocks[0].attention.output.out_features,
        embedding=embedding.name,
        blocks=tuple(blocks),
        final_norm=final[0].name,
        refused=tuple(refused),
    )


_NO_STREAM = (
    "no residual stream starts here: expected a norm and an Add that both read the embedding "
    "(pre-norm transformer), or products whose branch ends in a norm and is added to it"
)


def _norm_within(stream: ir.Value) -> ir.Node | None:
    """The norm that alone reads `stream` and gives what the next branch reads and is added to."""
    norm = _sole_norm(stream)
    add = None if norm is None else _residual_add(norm.outputs[0])
    if norm is None or add is None or not _has_vector(norm):
        return None
    found = _branches(norm.outputs[0], add)
    return norm if any(isinstance(branch, Branch) for branch in found) else None


def _sole_norm(value: ir.Value) -> ir.Node | None:
    """The norm that reads `value`, if nothing else does."""
    readers = value.consumers()
    return readers[0] if len(readers) == 1 and readers[0].op_type in NORM_OPS else None


def _is_normed(stream: ir.Value) -> bool:
    """Whether the residual value is a norm's own output."""
    node = stream.producer()
    return node is not None and node.op_type in NORM_OPS


_NO_VECTOR = "the weight of this norm is no stored vector with a number for each channel"


def norm_epsilon(norm: ir.Node) -> float:
    """What one of NORM_OPS adds to the mean square, or to the variance."""
    stated = norm.attributes.get("epsilon")
    return _EPSILON if stated is None else stated.as_float()


def _label(node: ir.Node | None) -> str:
    return "<graph input>" if node is None else f"{node.name} ({node.op_type})"


def _embedding(graph: ir.Graph) -> ir.Value:
    """The first value that a norm and a residual Add both read, or that starts a branch with a norm
    behind it."""
    for node in graph:
        value = node.inputs[0] if node.op_type in NORM_OPS or _is_linear(node) else None
        add = None if value is None else _residual_add(value)
        if value is None or add is None:
            continue
        if node.op_type in NORM_OPS:
            return value
        if any(isinstance(branch, Branch) for branch in _branches(value, add)):
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


def _branches(stream: ir.Value, add: ir.Node) -> list[Branch | Refusal]:
    """The branches that `add` adds to `stream`: two where their sum is added."""
    return [_branch(stream, *term) for term in _terms(_other(add, stream), (add,))]


def _joined(before: list[Branch], stream: ir.Value, add: ir.Node) -> list[Branch] | None:
    """`before`, which gave `stream`, and what is added next, if that is parallel to it: it reads
    the value that `before` read, and nothing but the addition reads `stream`."""
    first = before[0]
    if stream.name != first.residual or any(node is not add for node in stream.consumers()):
        return None
    earlier = next((v for v in stream.producer().inputs if v.name == first.stream), None)
    if earlier is None:
        return None
    found = [_branch(earlier, *term) for term in _terms(_other(add, stream), (add,))]
    parallel = [branch for branch in found if isinstance(branch, Branch)]
    if len(parallel) < len(found):
        return None
    end, name = str(add.name), str(add.outputs[0].name)
    longer = [replace(b, adds=(*b.adds, end), residual=name, onward=name) for b in before]
    return [*longer, *parallel]


def _other(add: ir.Node, operand: ir.Value) -> ir.Value:
    return add.inputs[1] if add.inputs[0] is operand else add.inputs[0]


def _terms(
    value: ir.Value, adds: tuple[ir.Node, ...]
) -> list[tuple[ir.Value, tuple[ir.Node, ...]]]:
    """What is added, apart where it is a sum of what two products gave, each with its Adds."""
    node = value.producer()
    if node is None or node.op_type != "Add" or len(value.uses()) > 1:
        return [(value, adds)]
    if any(_producing_linear(operand) is None for operand in node.inputs):
        return [(value, adds)]
    return [(operand, (node, *adds)) for operand in node.inputs]


def _branch(stream: ir.Value, tail: ir.Value, adds: tuple[ir.Node, ...]) -> Branch | Refusal:
    add = adds[-1]
    norms = [node for node in stream.consumers() if node.op_type in NORM_OPS]
    behind = _norm_behind(tail)
    if not norms:
        behind |= _is_normed(stream) or _sole_norm(add.outputs[0]) is not None
    if not norms and not behind:
        return Refusal(_label(add), f"no norm reads the residual value {stream.name!r} before it")
    output = _producing_linear(tail)
    if output is None:
        return Refusal(
            _label(add), f"the added value {tail.name!r} does not come from a weighted MatMul"
        )
    inside = _between(stream, output)
    norm = next((node for node in norms if node in inside), None)
    if norm is None and not behind:
        return Refusal(_label(output), f"its branch does not start at a norm of {stream.name!r}")
    if norm is not None and not _has_vector(norm):
        return Refusal(_label(norm), _NO_VECTOR)
    read = stream if norm is None else norm.outputs[0]
    inputs = [node for node in read.consumers() if _is_linear(node) and node in inside]
    others = [node for node in read.consumers() if node in inside and node not in inputs]
    if norm is None and inputs and others and not _is_normed(stream):
        # They would read a clamped spike, and no template.
        return Refusal(_label(others[0]), f"it reads the residual value {read.name!r} as it is")
    if not inputs:
        if norm is None:
            return Refusal(_label(output), f"no weighted MatMul of its branch reads {read.name!r}")
        return Refusal(_label(norm), "no weighted MatMul reads this norm")
    products = _attentions(inside)
    kind = "attention" if products else "mlp"
    return Branch(
        kind=kind,
        stream=stream.name,
        norm=None if norm is None else norm.name,
        input=read.name,
        inputs=tuple(_linear(node) for node in inputs),
        output=_linear(output),
        added=tail.name,
        adds=tuple(str(node.name) for node in adds),
        residual=add.outputs[0].name,
        onward=add.outputs[0].name,
        linear_path=_linear_path(inputs, output) if kind == "mlp" else None,
        attention=_attention_site(products[0]) if len(products) == 1 else None,
    )


def _norm_behind(value: ir.Value) -> bool:
    """Whether a norm stands between `value` and the weighted MatMul behind it."""
    node = value.producer()
    while node is not None and node.op_type in LAYOUT_OPS:
        node = node.inputs[0].producer()
    return node is not None and node.op_type in NORM_OPS


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


def _attentions(nodes: set[ir.Node]) -> list[ir.Node]:
    """The attentions among `nodes`; where these are written out, their products."""
    single = [node for node in nodes if node.op_type == "Attention"]
    return single or [
        node
        for node in nodes
        if node.op_type == "MatMul" and not any(_is_constant(value) for value in node.inputs)
    ]


def _has_vector(norm: ir.Node) -> bool:
    """Whether its weight is stored, a number for each channel."""
    weight = norm.inputs[1] if len(norm.inputs) > 1 else None
    if weight is None or not _is_constant(weight) or len(weight.shape or ()) != 1:
        return False
    channels = norm.inputs[0].shape
    last = channels[-1] if channels is not None and len(channels) else None
    return not isinstance(last, int) or weight.shape[0] == last


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


def _pair(together: list[list[Branch]]) -> tuple[list[Block], list[Refusal]]:
    blocks: list[Block] = []
    refused: list[Refusal] = []
    waiting: Branch | None = None

    def give_up() -> None:
        nonlocal waiting
        if waiting is not None:
            refused.append(Refusal(_start(waiting), "no MLP branch follows this attention branch"))
        waiting = None

    for branches in together:
        if sorted(branch.kind for branch in branches) == ["attention", "mlp"]:
            give_up()
            attention, mlp = sorted(branches, key=lambda branch: branch.kind)
            blocks.append(Block(len(blocks), attention, mlp))
        elif len(branches) > 1:
            give_up()
            what = "the branches beside this one are not one attention and one MLP"
            refused.append(Refusal(_start(branches[0]), what))
        elif branches[0].kind == "attention":
            give_up()
            waiting = branches[0]
        elif waiting is None:
            reason = "no attention branch precedes this MLP branch"
            refused.append(Refusal(_start(branches[0]), reason))
        else:
            blocks.append(Block(len(blocks), waiting, branches[0]))
            waiting = None
    give_up()
    return blocks, refused


def _start(branch: Branch) -> str:
    """The node at which a branch starts."""
    return branch.norm or branch.inputs[0].node
