"""Find the places that matter by topology: residual stream, norms, weighted products, attention.

No model family is named here. A block is two branches that are added to the stream; the one with an
attention product is the attention branch, the other one the MLP. A branch starts at a norm of the
stream; or it reads the stream itself, and it ends in a norm, or its sum with the stream passes one,
or the stream has just passed one.
The second branch of a block reads what the first one gave, or the same value as the first one
(parallel branches). An MLP branch may be a mixture of experts: several routes, each an MLP, some of
them on tokens that a router chose. Everything that does not fit is reported with its node and the
reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from iq_export.errors import GraphError

NORM_OPS = frozenset({"RMSNormalization", "LayerNormalization"})
# What takes some rows of a value, and leaves their channels as they are.
_ROWS = frozenset({"Gather", "Slice", "Squeeze"})
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
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
class Route:
    """One way through a branch: the products that read what the branch reads, and the one that
    writes. An expert reads chosen tokens: the value `rows`, int64 `[1, n]`, has their numbers among
    all `batch * seq`, and its products' inputs are `[1, n, features]`."""

    inputs: tuple[Linear, ...]  # q, k, v or gate, up
    output: Linear  # o or down
    # Index in `inputs` of the product that enters `output` by an elementwise product alone
    # (the "up" of a gated MLP), so that a per-channel scale passes through; None otherwise.
    linear_path: int | None = None
    rows: str | None = None  # None: all tokens


@dataclass(frozen=True)
class Branch:
    """One residual branch: [norm ->] its routes, added up [-> norm] -> residual Add [-> norm].

    Without a norm in front there is one behind the branch or behind the addition, and the products
    read the stream itself. There is one route, but in a mixture of experts.
    """

    kind: str  # "attention" or "mlp"
    stream: str  # residual value the branch reads, [batch, seq, hidden]
    norm: str | None  # node name of the norm in front
    input: str  # what they read: the norm's output, or the stream
    routes: tuple[Route, ...]
    added: str  # what joins the stream: the output with its bias, or behind its norm
    # Node names of the Adds that take it there; of parallel branches one is theirs alone.
    adds: tuple[str, ...]
    residual: str  # residual value after these: parallel branches have the same
    # What the next branch reads and is added to: `residual`, or the norm that stands behind it.
    onward: str
    readers: frozenset[str]  # names of the nodes that read `input` for this branch
    # What an MLP's tokens are known as sinks by, `[batch, seq, inner_features]`: the input of its
    # output product; of a mixture, see `passes.show_inner` ("" before that).
    inner: str
    inner_features: int
    # The single Attention op of an attention branch; None where the product is decomposed.
    attention: AttentionSite | None = None
    # Products between `inputs` and `output`: those that widen a latent; and the norms in front of
    # them, of which they are the only readers.
    widening: tuple[Linear, ...] = ()
    latent_norms: tuple[Norm, ...] = ()
    routers: tuple[Linear, ...] = ()  # products of a mixture that stay in float
    # Whether every channel that the routes of a mixture write goes on alone, by one factor a token.
    straight: bool = False

    @property
    def is_mixture(self) -> bool:
        return any(route.rows is not None for route in self.routes)

    @property
    def inputs(self) -> tuple[Linear, ...]:
        return tuple(linear for route in self.routes for linear in route.inputs)

    @property
    def outputs(self) -> tuple[Linear, ...]:
        return tuple(route.output for route in self.routes)

    @property
    def output(self) -> Linear:
        """Of a branch with one route."""
        (output,) = self.outputs
        return output

    @property
    def linear_path(self) -> int | None:
        """Of a branch with one route."""
        (route,) = self.routes
        return route.linear_path

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(
            x for route in self.routes for x in (*route.inputs, *self.widening, route.output)
        )


@dataclass(frozen=True)
class Block:
    """`after`: further branches without attention, each of which reads what the one before gave."""

    index: int
    attention: Branch
    mlp: Branch
    after: tuple[Branch, ...] = ()

    @property
    def branches(self) -> tuple[Branch, ...]:
        return (self.attention, self.mlp, *self.after)

    @property
    def residual(self) -> str:
        """The residual value behind all of it."""
        return self.branches[-1].residual


@dataclass(frozen=True)
class Norm:
    """A norm in front of products of branches, and all these, experts' on some of its rows:
    parallel branches may share it. `routers` read it too, and stay in float; `readers` are the
    nodes that read it for all these."""

    node: str
    output: str
    linears: tuple[Linear, ...]
    routers: tuple[Linear, ...]
    readers: frozenset[str]


@dataclass(frozen=True)
class Convolution:
    """A convolution with stored weights, in front of the first block or behind the last one; `axis`
    of the weight counts output channels."""

    node: str
    input: str
    weight: str
    axis: int


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
    convolutions: tuple[Convolution, ...] = ()

    @property
    def linears(self) -> list[Linear]:
        """Every product of every block, in graph order."""
        return [linear for branch in self.branches for linear in branch.linears]

    @property
    def branches(self) -> list[Branch]:
        return [branch for block in self.blocks for branch in block.branches]

    @property
    def _normed(self) -> set[str]:
        """What norms that stand in the stream give."""
        return {branch.onward for branch in self.branches if branch.onward != branch.residual}

    @property
    def bare(self) -> dict[str, tuple[Linear, ...]]:
        """The products that read a sum of the stream as it is, with no norm between, by the sum's
        name: those of both branches, where these are parallel, and routers."""
        found: dict[str, tuple[Linear, ...]] = {}
        for branch in self.branches:
            if branch.norm is None and branch.input not in self._normed:
                its = (*branch.inputs, *branch.routers)
                found[branch.input] = (*found.get(branch.input, ()), *its)
        return found

    @property
    def bare_readers(self) -> dict[str, frozenset[str]]:
        """The nodes that read these values for these products, by the value's name."""
        found: dict[str, frozenset[str]] = {}
        for branch in self.branches:
            if branch.norm is None and branch.input not in self._normed:
                found[branch.input] = found.get(branch.input, frozenset()) | branch.readers
        return found

    @property
    def norms(self) -> list[Norm]:
        """Every norm in front of a branch, each once."""
        found: dict[str, Norm] = {}
        for branch in self.branches:
            if branch.norm is not None:
                before = found.get(branch.norm, Norm("", "", (), (), frozenset()))
                found[branch.norm] = Norm(
                    branch.norm, branch.input, (*before.linears, *branch.inputs),
                    (*before.routers, *branch.routers), before.readers | branch.readers,
                )  # fmt: skip
        return list(found.values())

    @property
    def latent_norms(self) -> list[Norm]:
        """The norms within branches, in front of products that widen a latent."""
        return [norm for branch in self.branches for norm in branch.latent_norms]

    @property
    def sources(self) -> dict[str, str]:
        """By the name of an expert's tokens: the value whose rows these are."""
        return {
            linear.input: branch.input
            for branch in self.branches
            for route in branch.routes
            if route.rows is not None
            for linear in route.inputs
        }

    @property
    def rows(self) -> dict[str, str]:
        """By the name of what an expert's products read: the value that numbers its tokens."""
        return {
            linear.input: route.rows
            for branch in self.branches
            for route in branch.routes
            if route.rows is not None
            for linear in (*route.inputs, route.output)
        }


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
        stream = scaled_on(add.outputs[0])
        norm = _norm_within(stream)
        if norm is not None:
            if together and together[-1][0].residual == add.outputs[0].name:
                onward = str(norm.outputs[0].name)
                together[-1] = [replace(branch, onward=onward) for branch in together[-1]]
            stream = norm.outputs[0]
    final = _final_norms(stream)
    blocks, unpaired = _pair(together)
    refused += unpaired
    if not blocks:
        first = refused[0] if refused else Refusal(_label(embedding.producer()), _NO_STREAM)
        raise GraphError(f"No transformer block was understood: node {first.node}: {first.reason}.")
    if not final:
        raise GraphError(
            f"The residual stream ends at {stream.name!r} without a norm; only transformers whose "
            "stream passes a norm at the end are supported."
        )
    if not _has_vector(final[0]):
        raise GraphError(f"{_label(final[0])} ends the residual stream, and {_NO_VECTOR}.")
    return Sites(
        hidden=blocks[0].attention.outputs[0].out_features,
        embedding=embedding.name,
        blocks=tuple(blocks),
        final_norm=final[0].name,
        refused=tuple(refused),
        convolutions=tuple(_convolutions(graph)),
    )


def _final_norms(stream: ir.Value) -> list[ir.Node]:
    """The norms that read the end of the stream; else those that read some of its rows."""
    readers = list(stream.consumers())
    norms = [node for node in readers if node.op_type in NORM_OPS]
    if norms:
        return norms
    chosen = [node for node in readers if node.op_type in _ROWS]
    while chosen and not norms:
        behind = [reader for node in chosen for reader in node.outputs[0].consumers()]
        norms = [node for node in behind if node.op_type in NORM_OPS]
        chosen = [node for node in behind if node.op_type in _ROWS]
    return norms


def _convolutions(graph: ir.Graph) -> Iterator[Convolution]:
    for node in graph:
        if node.op_type not in _CONVOLUTIONS or not _is_constant(node.inputs[1]):
            continue
        groups = node.attributes.get("group")
        turned = node.op_type == "ConvTranspose"
        if turned and groups is not None and groups.as_int() > 1:
            continue  # its axis of outputs is that of one group
        read, weight = node.inputs[0], node.inputs[1]
        yield Convolution(str(node.name), str(read.name), str(weight.name), int(turned))


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


def scaled_on(stream: ir.Value) -> ir.Value:
    """The stream behind a constant factor by which all of it is multiplied; else as it is."""
    readers = list(stream.consumers())
    if len(readers) != 1 or readers[0].op_type != "Mul":
        return stream
    factor = next((value for value in readers[0].inputs if _is_constant(value)), None)
    if factor is None or factor.shape is None or any(size != 1 for size in factor.shape):
        return stream
    return readers[0].outputs[0]


def _branches(stream: ir.Value, add: ir.Node) -> list[Branch | Refusal]:
    """The branches that `add` adds to `stream`: two where their sum is added."""
    return [_branch(stream, *term) for term in _terms(stream, _other(add, stream), (add,))]


def _joined(before: list[Branch], stream: ir.Value, add: ir.Node) -> list[Branch] | None:
    """`before`, which gave `stream`, and what is added next, if that is parallel to it: it reads
    the value that `before` read, and nothing but the addition reads `stream`."""
    first = before[0]
    if stream.name != first.residual or any(node is not add for node in stream.consumers()):
        return None
    earlier = next((v for v in stream.producer().inputs if v.name == first.stream), None)
    if earlier is None:
        return None
    found = [_branch(earlier, *term) for term in _terms(earlier, _other(add, stream), (add,))]
    parallel = [branch for branch in found if isinstance(branch, Branch)]
    if len(parallel) < len(found):
        return None
    end, name = str(add.name), str(add.outputs[0].name)
    longer = [replace(b, adds=(*b.adds, end), residual=name, onward=name) for b in before]
    return [*longer, *parallel]


def _other(add: ir.Node, operand: ir.Value) -> ir.Value:
    return add.inputs[1] if add.inputs[0] is operand else add.inputs[0]


def _terms(
    stream: ir.Value, value: ir.Value, adds: tuple[ir.Node, ...]
) -> list[tuple[ir.Value, tuple[ir.Node, ...]]]:
    """What is added, apart where it is a sum of what two products gave, or an attention and a
    mixture of experts; each with its Adds."""
    node = value.producer()
    if node is None or node.op_type != "Add" or len(value.uses()) > 1:
        return [(value, adds)]
    single = [_producing_linear(operand) for operand in node.inputs]
    if None in single:
        attends = [end is not None and bool(_attentions(_between(stream, end))) for end in single]
        if not any(attends) or not all(map(_summands, node.inputs)):
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
        return _mixture(stream, tail, adds)
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
    inner = [x for x in _reached(read, inside) if _is_linear(x) and x not in (*inputs, output)]
    products = _attentions(inside)
    kind = "attention" if products else "mlp"
    path = _linear_path(inputs, output) if kind == "mlp" else None
    return Branch(
        kind=kind,
        stream=stream.name,
        norm=None if norm is None else norm.name,
        input=read.name,
        routes=(Route(tuple(map(_linear, inputs)), _linear(output), path),),
        added=tail.name,
        adds=tuple(str(node.name) for node in adds),
        residual=add.outputs[0].name,
        onward=add.outputs[0].name,
        readers=frozenset(str(node.name) for node in inputs),
        inner=output.inputs[0].name,
        inner_features=_linear(output).in_features,
        attention=_attention_site(products[0]) if len(products) == 1 else None,
        widening=tuple(_linear(node) for node in inner),
        latent_norms=_norms_of(inner),
    )


def _reached(read: ir.Value, inside: set[ir.Node]) -> list[ir.Node]:
    """The nodes among `inside` that `read` reaches, in graph order."""
    found: set[ir.Node] = set()
    todo = list(read.consumers())
    while todo:
        node = todo.pop()
        if node in inside and node not in found:
            found.add(node)
            todo += [reader for value in node.outputs for reader in value.consumers()]
    graph = read.producer().graph
    return [node for node in graph if node in found]


def _norms_of(products: list[ir.Node]) -> tuple[Norm, ...]:
    """The norms that nothing but `products` reads."""
    found = []
    for node in dict.fromkeys(node.inputs[0].producer() for node in products):
        if node is None or node.op_type not in NORM_OPS or not _has_vector(node):
            continue
        readers = list(node.outputs[0].consumers())
        if all(reader in products for reader in readers):
            linears = tuple(_linear(reader) for reader in readers)
            names = frozenset(str(reader.name) for reader in readers)
            found.append(Norm(str(node.name), str(node.outputs[0].name), linears, (), names))
    return tuple(found)


def _mixture(stream: ir.Value, tail: ir.Value, adds: tuple[ir.Node, ...]) -> Branch | Refusal:
    """An MLP branch whose routes are experts, and MLPs that all tokens pass beside them."""
    add, outputs = adds[-1], _summands(tail)
    unknown = Refusal(
        _label(add), f"the added value {tail.name!r} does not come from a weighted MatMul"
    )
    if not outputs:
        return unknown
    inside = _between(stream, tail.producer())
    norms = [node for node in stream.consumers() if node.op_type in NORM_OPS and node in inside]
    if not norms and not _norm_behind(tail):
        return Refusal(_label(add), f"no norm reads the residual value {stream.name!r} before it")
    norm = norms[0] if norms else None
    if norm is not None and not _has_vector(norm):
        return Refusal(_label(norm), _NO_VECTOR)
    read = stream if norm is None else norm.outputs[0]
    assert add.graph is not None
    place = {node: number for number, node in enumerate(add.graph)}
    routes, used = [], set()
    for output in sorted(outputs, key=place.__getitem__):
        found = _route(read, output)
        if isinstance(found, Refusal):
            return found
        inputs, rows = found
        inputs = sorted(inputs, key=place.__getitem__)
        used |= {output, *inputs}
        path = _linear_path(inputs, output)
        routes.append(Route(tuple(map(_linear, inputs)), _linear(output), path, rows))
    if not any(route.rows for route in routes):
        return unknown
    routers = [
        node
        for node in inside
        if _is_linear(node) and node not in used and _taken_from(node.inputs[0], read) is not None
    ]
    inner = _inner(outputs)
    width = None if inner is None or inner.shape is None else inner.shape[-1]
    return Branch(
        kind="mlp",
        stream=stream.name,
        norm=None if norm is None else norm.name,
        input=read.name,
        routes=tuple(routes),
        added=tail.name,
        adds=tuple(str(node.name) for node in adds),
        residual=add.outputs[0].name,
        onward=add.outputs[0].name,
        readers=_readers(read, {*used, *routers}, inside),
        inner=str(inner.name) if inner is not None and isinstance(width, int) else "",
        inner_features=width if isinstance(width, int) else 0,
        routers=tuple(_linear(node) for node in sorted(routers, key=place.__getitem__)),
        straight=_straight(tail),
    )


def _readers(read: ir.Value, products: set[ir.Node], inside: set[ir.Node]) -> frozenset[str]:
    """The nodes of the branch that read `read` for its `products`: none, if some do for others."""
    todo, seen = [node for node in read.consumers() if node in inside], set()
    found = frozenset(str(node.name) for node in todo)
    while todo:
        node = todo.pop()
        if node in seen or node in products or node.op_type == "Shape":
            continue
        seen.add(node)
        if node.op_type not in LAYOUT_OPS and node.op_type != "Gather":
            return frozenset()
        todo += node.outputs[0].consumers()
    return found


def _summands(value: ir.Value) -> list[ir.Node]:
    """The weighted MatMuls whose rows `value` is a sum of, each by some factor; none if it is no
    such sum."""
    node = value.producer()
    if node is None:
        return []
    if _is_linear(node):
        return [node]
    if node.op_type in _BY_TOKEN or node.op_type in LAYOUT_OPS or node.op_type in NORM_OPS:
        return _summands(node.inputs[0])
    if node.op_type not in ("Add", "Concat", "Mul"):
        return []
    parts = [_summands(v) for v in node.inputs if not _is_constant(v)]
    parts = [part for part in parts if part] if node.op_type == "Mul" else parts
    whole = bool(parts) and all(parts) and (node.op_type != "Mul" or len(parts) == 1)
    return [each for part in parts for each in part] if whole else []


# What takes rows of tokens, or adds some of them up.
_BY_TOKEN = frozenset({"Gather", "ReduceSum"})


def _straight(value: ir.Value) -> bool:
    """Whether nothing between `value` and its `_summands` joins channels or has a factor, or a
    number to add, for each."""
    node = value.producer()
    if node is None or _is_linear(node):
        return node is not None
    if node.op_type in _BY_TOKEN or node.op_type in LAYOUT_OPS:
        return _straight(node.inputs[0])
    computed = [v for v in node.inputs if not _is_constant(v)]
    if node.op_type == "Add" and len(computed) == 1:  # a bias
        made = computed[0].producer()
        return made is not None and _is_linear(made)
    if node.op_type in ("Add", "Concat"):
        return all(map(_straight, computed))
    if node.op_type != "Mul":
        return False
    rows = [v for v in computed if _summands(v)]
    factors = [v for v in node.inputs if v not in rows]
    return all(_is_scalar(v) for v in factors) and all(map(_straight, rows))


def _is_scalar(value: ir.Value) -> bool:
    """Whether it has one number for each token, or for all."""
    shape = value.shape
    return shape is not None and (len(shape) == 0 or shape[-1] == 1)


def _route(read: ir.Value, output: ir.Node) -> tuple[list[ir.Node], str | None] | Refusal:
    """The products between `read` and `output` that read its rows, and which value numbers these
    (None: all rows)."""
    seen, todo = {output}, [output.inputs[0]]
    inputs: list[ir.Node] = []
    numbers: set[str | None] = set()
    while todo:
        value = todo.pop()
        node = None if value is None else value.producer()
        if value is read or node is None or node in seen:
            continue
        seen.add(node)
        rows = _taken_from(node.inputs[0], read) if _is_linear(node) else None
        if rows is None:
            todo += node.inputs
        else:
            inputs.append(node)
            numbers.add(rows or None)
    if _attentions(seen):
        return Refusal(_label(output), "experts of an attention are not understood")
    if len(numbers) != 1:
        return Refusal(_label(output), f"no weighted MatMul of its route reads {read.name!r}")
    return inputs, next(iter(numbers))


def _taken_from(value: ir.Value | None, source: ir.Value) -> str | None:
    """Which value numbers the rows of `source` that `value` is: "" if it is all of them, None if it
    is something else."""
    rows = ""
    while value is not source:
        node = None if value is None else value.producer()
        if node is not None and node.op_type == "Gather" and not rows:
            index = node.inputs[1].producer()
            if index is None or index.op_type != "Squeeze":
                return None
            rows = str(index.inputs[0].name)
        elif node is None or node.op_type not in LAYOUT_OPS:
            return None
        value = node.inputs[0]
    return rows


def _inner(outputs: list[ir.Node]) -> ir.Value | None:
    """What joins the inputs of all output products of a mixture, each token's as a row."""
    joins = [n for n in outputs[0].inputs[0].consumers() if n.op_type == "Concat"]
    for join in joins:
        value = join.outputs[0]
        while len(readers := value.consumers()) == 1:
            value = readers[0].outputs[0]
        return value
    return None


def _norm_behind(value: ir.Value) -> bool:
    """Whether a norm stands between `value` and the weighted MatMul, or the sum, behind it."""
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
        elif waiting is None and blocks and blocks[-1].residual == branches[0].stream:
            blocks[-1] = replace(blocks[-1], after=(*blocks[-1].after, branches[0]))
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
