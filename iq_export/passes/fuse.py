"""Replace what lies in front of a quantizer by one op: for the copy that an engine is built from.

1. residual Add -> RMS/LayerNorm [-> SinkClampInsert] -> QuantizeLinear becomes Add*Norm*Quantize,
   which gives the sum for the residual stream, and the codes.
2. Mul(Mul(gate, Sigmoid(gate)), up) [-> SinkClampInsert of zeros] [-> side channels] [-> block
   Hadamard] -> QuantizeLinear becomes SiluMul*Quantize, which gives codes and side channels.

DequantizeLinear stays in front of the product. A quantizer that fits neither is left as it is, with
the reason. The ops are the TensorRT plugin's; `sinks/ops.py` holds their meaning, which rounds less
often than the ops they replace but at no other place.

Precondition: the finished graph that ships. Postcondition: the same function up to rounding within
the fused ops; initializers keep their place in the file of weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from iq_export.graph import io
from iq_export.graph.edit import constant
from iq_export.graph.sites import NORM_OPS, Refusal, norm_epsilon
from iq_export.passes.rotate import hadamard
from iq_export.sinks.ops import DOMAIN, PLUGIN_ATTRIBUTES

LARGEST_BLOCK, MOST_SIDES = 512, 255  # as in plugins/include/iq


@dataclass(frozen=True)
class Fusion:
    """`ops`: fused op -> how many. `absorbed`: sink ops that went into them. `refused`: quantizers
    left as they are."""

    ops: Mapping[str, int]
    absorbed: int
    refused: tuple[Refusal, ...]

    @property
    def reasons(self) -> dict[str, int]:
        """Why quantizers are left -> how many of them, most frequent first."""
        return dict(Counter(refusal.reason for refusal in self.refused).most_common())


class _Refused(Exception):
    """A quantizer that cannot be fused; the message is the reason."""


@dataclass(frozen=True)
class _Found:
    """A match: `outputs` are the values that the op gives instead, `nodes` what it replaces."""

    op: str
    inputs: list[ir.Value]
    outputs: list[ir.Value]
    attributes: dict[str, ir.Attr | float | int | list[int]]
    nodes: list[ir.Node]


def fuse(model: ir.Model) -> Fusion:
    """Fuse what can be fused in `model`, in place."""
    graph = model.graph
    counts: Counter[str] = Counter()
    refused: list[Refusal] = []
    absorbed = 0
    for node in list(graph):
        if node.op_type != "QuantizeLinear" or node.inputs[0].is_initializer():
            continue
        try:
            found = _match(graph, node)
        except _Refused as reason:
            refused.append(Refusal(str(node.name), str(reason)))
            continue
        absorbed += sum(old.domain == DOMAIN for old in found.nodes)
        _replace(graph, node, found)
        counts[found.op] += 1
    if counts:
        io.add_fused_functions(model)
        graph.sort()  # a sum stands where the quantizer was, behind some of its readers
    return Fusion(dict(sorted(counts.items())), absorbed, tuple(refused))


def _match(graph: ir.Graph, quantizer: ir.Node) -> _Found:
    source = _skip_to_source(quantizer)
    if source.op_type in NORM_OPS:
        found = _match_norm(graph, quantizer)
    elif source.op_type == "Mul":
        found = _match_product(quantizer)
    else:
        raise _Refused(f"reads {source.op_type}, neither a norm nor a gated product")
    outputs = set(graph.outputs)
    if any(value in outputs for node in found.nodes for value in node.outputs):
        raise _Refused("an output of the graph lies within")
    index = next((value for value in found.inputs if _is_index(value)), None)
    if index is not None and _depends(index, found.nodes):
        raise _Refused("its sink index depends on what is fused")
    return found


def _skip_to_source(quantizer: ir.Node) -> ir.Node:
    """The norm or product that the chain in front of `quantizer` starts from, or what it is."""
    node = _producer(quantizer.inputs[0])
    if node.op_type == "Reshape" and _producer(node.inputs[0]).op_type == "MatMul":
        split = _producer(_producer(node.inputs[0]).inputs[0])
        if split.op_type == "Reshape":
            node = _producer(split.inputs[0])
    while node.op_type == "SinkClampInsert":
        node = _producer(node.inputs[0])
    return node


def _match_norm(graph: ir.Graph, quantizer: ir.Node) -> _Found:
    scale = _scale(quantizer)
    nodes, insert = [quantizer], None
    node = _only_reader(quantizer.inputs[0], quantizer)
    if node.op_type == "SinkClampInsert":
        insert = node
        nodes.append(node)
        node = _only_reader(node.inputs[0], node)
        if node.op_type == "SinkClampInsert":
            raise _Refused("two lifecycles insert their templates here")
    norm = node
    if norm.op_type not in NORM_OPS:
        raise _Refused("is rotated behind a norm")
    add = norm.inputs[0].producer()
    if add is None or add.op_type != "Add" or any(v.is_initializer() for v in add.inputs):
        raise _Refused(f"its norm reads {add.op_type if add else 'an input'}, not a residual Add")
    if not _same_shape(*add.inputs):
        raise _Refused("its residual Add is of two shapes")
    if norm.inputs[1].shape is None or len(norm.inputs[1].shape) != 1:
        raise _Refused("the weight of its norm is no vector")
    axis = norm.attributes.get("axis")
    if axis is not None and axis.as_int() not in (-1, len(norm.inputs[0].shape or []) - 1):
        raise _Refused("its norm is not over the last axis")
    layer = norm.op_type == "LayerNormalization"
    if len([value for value in norm.outputs if value.uses()]) > 1:
        raise _Refused("the mean or the deviation of its norm is read")
    inputs = [*add.inputs, norm.inputs[1]]
    if layer:
        inputs.append(_bias(graph, norm))
    attributes: dict[str, ir.Attr | float | int | list[int]] = {
        "epsilon": norm_epsilon(norm),
        "scale": scale,
    }
    if insert is not None:
        inputs.append(insert.inputs[1])
        attributes |= {name: insert.attributes[name] for name in ("templates", "template_shape")}
    op = f"Add{'Layer' if layer else 'Rms'}Norm{'' if insert is None else 'Insert'}Quantize"
    outputs = [add.outputs[0], quantizer.outputs[0]]
    return _Found(op, inputs, outputs, attributes, [*nodes, norm, add])


def _bias(graph: ir.Graph, norm: ir.Node) -> ir.Value:
    if len(norm.inputs) > 2 and norm.inputs[2] is not None:
        return norm.inputs[2]
    weight = norm.inputs[1]
    name = f"{norm.name}.no_bias"
    if weight.const_value is None:
        raise _Refused("the weight of its norm is no constant")
    if name in graph.initializers:
        return graph.initializers[name]
    return constant(graph, name, np.zeros(weight.shape.numpy(), weight.dtype.numpy()))


def _match_product(quantizer: ir.Node) -> _Found:
    scale = _scale(quantizer)
    attributes: dict[str, ir.Attr | float | int | list[int]] = {"scale": scale}
    node, value = quantizer, quantizer.inputs[0]
    nodes = [quantizer]
    block, factor, turned = _match_rotation(node, value)
    attributes |= {"block": block, "factor": factor}
    if turned:
        nodes += turned
        node, value = turned[-1], turned[-1].inputs[0]
    outputs = [quantizer.outputs[0]]
    side = _match_side(value, node)
    if side is not None:
        mask, gather, channels = side
        nodes += [mask, gather]
        attributes["channels"] = channels
        outputs.append(gather.outputs[0])
        value = mask.inputs[0]
    readers = {node} if side is None else {side[0], side[1]}
    clamp = _producer(value)
    index = None
    if clamp.op_type == "SinkClampInsert":
        if any(clamp.attributes["templates"].as_floats()):
            raise _Refused("what is inserted is not zero")
        _check_readers(value, readers)
        nodes.append(clamp)
        index, value, readers = clamp.inputs[1], clamp.inputs[0], {clamp}
    inputs, products = _match_silu(value, readers)
    if index is not None:
        inputs.append(index)
    op = f"SiluMul{'' if index is None else 'Clamp'}{'' if side is None else 'Side'}Quantize"
    return _Found(op, inputs, outputs, attributes, [*nodes, *products])


def _match_rotation(node: ir.Node, value: ir.Value) -> tuple[int, float, list[ir.Node]]:
    """Block size, size of the matrix's entries and nodes of a rotation that ends in `value`."""
    join = _producer(value)
    if join.op_type != "Reshape":
        return 1, 1.0, []
    _only_reader(value, node)
    product = _only_reader(join.inputs[0], join)
    split = _only_reader(product.inputs[0], product)
    matrix = product.inputs[1].const_value
    if product.op_type != "MatMul" or split.op_type != "Reshape" or matrix is None:
        raise _Refused("is reshaped by no rotation")
    entries = matrix.numpy().astype(np.float32)
    block, factor = len(entries), float(abs(entries.flat[0]))
    if block > LARGEST_BLOCK:
        raise _Refused(f"is rotated in blocks of {block}, more than {LARGEST_BLOCK}")
    if block & (block - 1) or not np.array_equal(entries, np.sign(hadamard(block)) * factor):
        raise _Refused("is turned by another matrix than Hadamard's")
    apart, whole = split.inputs[1].const_value, join.inputs[1].const_value
    if apart is None or whole is None:
        raise _Refused("is reshaped by no rotation")
    groups, size = apart.numpy()[-2:]
    if size != block or whole.numpy()[-1] != groups * block:
        raise _Refused("is not rotated along its last axis")
    return block, factor, [join, product, split]


def _match_side(value: ir.Value, node: ir.Node) -> tuple[ir.Node, ir.Node, list[int]] | None:
    """Mask and Gather of side channels, and their numbers, if `value` is masked."""
    mask = _producer(value)
    if mask.op_type != "Mul" or mask.inputs[1].const_value is None:
        return None
    keep = mask.inputs[1].const_value.numpy()
    _only_reader(value, node)
    source = mask.inputs[0]
    gather = next((user for user in source.consumers() if user.op_type == "Gather"), None)
    chosen = None if gather is None else gather.inputs[1].const_value
    if gather is None or chosen is None or keep.ndim != 1:
        raise _Refused("is multiplied by a constant that is no mask of side channels")
    channels = [int(channel) for channel in chosen.numpy()]
    expected = np.ones_like(keep)
    expected[channels] = 0
    axis = gather.attributes.get("axis")
    last = axis is not None and axis.as_int() in (-1, len(source.shape or []) - 1)
    if not last or not np.array_equal(keep, expected) or len(set(channels)) != len(channels):
        raise _Refused("its mask does not belong to its side channels")
    if len(channels) > MOST_SIDES:
        raise _Refused(f"has more than {MOST_SIDES} side channels")
    _check_readers(source, {mask, gather})
    return mask, gather, channels


def _match_silu(value: ir.Value, readers: set[ir.Node]) -> tuple[list[ir.Value], list[ir.Node]]:
    """gate and up of `value`, which only `readers` may read, and the nodes between."""
    product = _producer(value)
    if product.op_type != "Mul":
        raise _Refused(f"reads {product.op_type}, neither a norm nor a gated product")
    if any(user.op_type == "SinkDetect" for user in value.consumers()):
        raise _Refused("sinks are detected on the product")
    _check_readers(value, readers)
    for active, up in (tuple(product.inputs), tuple(reversed(product.inputs))):
        silu = active.producer()
        if silu is None or silu.op_type != "Mul":
            continue
        for gate, switch in (tuple(silu.inputs), tuple(reversed(silu.inputs))):
            sigmoid = switch.producer()
            if sigmoid is None or sigmoid.op_type != "Sigmoid" or sigmoid.inputs[0] is not gate:
                continue
            _check_readers(active, {product})
            _check_readers(switch, {silu})
            return [gate, up], [product, silu, sigmoid]
    raise _Refused("no product of a SiLU and another value")


def _scale(quantizer: ir.Node) -> float:
    values = [None if v is None else v.const_value for v in (*quantizer.inputs, None)]
    _, scale, zero = values[:3]
    if zero is None or zero.dtype != ir.DataType.INT8:
        raise _Refused("its codes are not int8")
    if scale is None or scale.size != 1 or zero.numpy().any():
        raise _Refused("no constant scale of the whole tensor, or a zero point")
    return float(scale.numpy())


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise _Refused("reads an input of the graph")
    return node


def _only_reader(value: ir.Value, reader: ir.Node) -> ir.Node:
    """The producer of `value`, which nothing but `reader` may read."""
    _check_readers(value, {reader})
    return _producer(value)


def _check_readers(value: ir.Value, readers: set[ir.Node]) -> None:
    others = sorted({user.op_type for user in value.consumers() if user not in readers})
    if others:
        raise _Refused(f"a value within is read by {', '.join(others)} too")


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    """As far as is known: the plugin looks again when it is built."""
    if a.shape is None or b.shape is None:
        return True
    pairs = zip(a.shape, b.shape, strict=False)
    known = [(x, y) for x, y in pairs if isinstance(x, int) and isinstance(y, int)]
    return len(a.shape) == len(b.shape) and all(x == y for x, y in known)


def _is_index(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.INT32


def _depends(value: ir.Value, nodes: list[ir.Node]) -> bool:
    """Whether `value` is computed from an output of `nodes`: a fused op would wait for itself."""
    targets, seen, left = set(nodes), set(), [value]
    while left:
        node = left.pop().producer()
        if node is None or node in seen:
            continue
        if node in targets:
            return True
        seen.add(node)
        left += [source for source in node.inputs if source is not None]
    return False


def _replace(graph: ir.Graph, quantizer: ir.Node, found: _Found) -> None:
    node = ir.node(
        found.op,
        found.inputs,
        {**found.attributes, **PLUGIN_ATTRIBUTES},
        domain=DOMAIN,
        name=f"{quantizer.name}/fused",
        num_outputs=len(found.outputs),
    )
    graph.insert_before(quantizer, node)
    names = [value.name for value in found.outputs]
    for old, new in zip(found.outputs, node.outputs, strict=True):
        new.dtype, new.shape = old.dtype, old.shape
        old.replace_all_uses_with(new)
    graph.remove(found.nodes, safe=True)
    for name, new in zip(names, node.outputs, strict=True):
        new.name = name
