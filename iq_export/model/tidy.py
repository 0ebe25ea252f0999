"""Make an exported graph readable, small and deterministic, without changing what it computes.

After `tidy`: every attention is one Attention; experts are MLPs of their own on the tokens that
chose them; every linear is one MatMul on `[batch, seq, features]` whose weight is an initializer
`[in, out]` under its own name (`layers.3.mlp.down_proj.weight`); a tied embedding is stored once,
read by the LM head through a Transpose; nodes are called after the module they come from
(`layers.3/mlp/down_proj`);
what every layer repeats (cosines, shapes, masks) is computed once; torch's metadata is gone.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from iq_export.graph.interface import BATCH, PAST, SEQ, TOTAL, Role, axes_of, name_of
from iq_export.graph.stored import StoredTensor
from iq_export.model.experts import write_experts
from iq_export.model.fuse_attention import fuse_attention
from iq_export.model.fuse_norms import fuse_norms
from iq_export.model.latents import settle_latents
from iq_export.model.scopes import module_scope
from iq_export.model.unflatten import unflatten

# Elements up to which an expression of parameters (Gemma's `1 + weight`) is evaluated: vectors of
# any hidden size, but no matrix.
_FOLD_LIMIT = 1 << 16
_CSE_LIMIT = 64


def tidy(model: ir.Model, *, module_prefix: str) -> None:
    """Clean `model` in place.

    `module_prefix` is what all module names begin with and readers need not see ("model.model").
    """
    _settle_types(model)
    fold_parameter_vectors(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _share_constants(model.graph)
    unflatten(model.graph)
    drop_expands(model.graph)
    store_weights_transposed(model.graph)
    settle_latents(model.graph)
    settle_reshapes(model.graph)
    write_experts(model.graph)
    common.CommonSubexpressionEliminationPass(size_limit=_CSE_LIMIT)(model)
    common.IdentityEliminationPass()(model)
    if any(node.op_type == "ReduceMean" for node in model.graph):  # of a model's own norm
        fuse_norms(model)
    fuse_attention(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.TopologicalSortPass()(model)
    _give_names(model.graph, module_prefix)
    _clear_metadata(model)


def settle_axes(graph: ir.Graph) -> None:
    """Name the axes batch, seq, past, total, and read each size from one input only."""
    _name_total(graph)
    _read_sizes_from_inputs(graph)


def _name_total(graph: ir.Graph) -> None:
    """Call the attention mask's length, and with it every `past + seq`, `total`."""
    mask = next(value for value in graph.inputs if value.name == name_of(Role.MASK))
    aliases = {"past + seq", "seq + past", str(mask.shape[1])} if mask.shape else set()

    def rename(value: ir.Value) -> None:
        if value.shape is None or value.shape.frozen:
            return
        for axis, dim in enumerate(value.shape):
            if not isinstance(dim, int) and str(dim) in aliases:
                value.shape[axis] = ir.SymbolicDim(TOTAL)

    for value in [*graph.inputs, *(out for node in graph for out in node.outputs)]:
        rename(value)


def _read_sizes_from_inputs(graph: ir.Graph) -> None:
    """Let every Shape of one dynamic axis read it from the same input, so that they merge."""
    inputs = {value.name: value for value in graph.inputs}
    homes = ((Role.IDS, BATCH), (Role.IDS, SEQ), (Role.PAST, PAST), (Role.MASK, TOTAL))
    home = {axis: (inputs[name_of(role)], axes_of(role).index(axis)) for role, axis in homes}
    for node in graph:
        source = node.inputs[0] if node.op_type == "Shape" else None
        if source is None or source.shape is None:
            continue
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        rank = len(source.shape)
        end = node.attributes["end"].as_int() if "end" in node.attributes else rank
        dim = source.shape[start] if 0 <= start < rank else None
        if end != start + 1 or isinstance(dim, int) or str(dim) not in home:
            continue
        value, axis = home[str(dim)]
        node.replace_input_with(0, value)
        node.attributes["start"] = ir.AttrInt64("start", axis)
        node.attributes["end"] = ir.AttrInt64("end", axis + 1)


def _settle_types(model: ir.Model) -> None:
    """Make a Cast of each CastLike, which nothing folds: what it casts is a constant as a rule."""
    alike = [node for node in model.graph if node.op_type == "CastLike"]
    if any(node.inputs[1].dtype is None for node in alike):
        common.ShapeInferencePass()(model)
    for node in alike:
        kind = node.inputs[1].dtype
        if kind is not None:
            node.op_type = "Cast"
            node.attributes["to"] = ir.AttrInt64("to", kind)
            node.resize_inputs(1)


def fold_parameter_vectors(model: ir.Model) -> None:
    """Evaluate constant expressions, but leave transposes: `store_weights_transposed` has them."""
    import onnxscript.optimizer

    def vectors_only(node: ir.Node) -> bool | None:
        return False if node.op_type == "Transpose" else None

    onnxscript.optimizer.fold_constants_ir(
        model,
        should_fold=vectors_only,
        input_size_limit=_FOLD_LIMIT,
        output_size_limit=_FOLD_LIMIT,
    )


def _share_constants(graph: ir.Graph) -> None:
    """Keep one copy of each small integer or scalar constant; parameters are never merged."""
    seen: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or value.is_graph_output():
            continue
        small = tensor.size <= _CSE_LIMIT and (
            tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
            or len(tensor.shape) == 0
        )
        if not small:
            continue
        key = (tensor.dtype.name, tuple(tensor.shape.numpy()), tensor.tobytes())
        kept = seen.setdefault(key, value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del graph.initializers[value.name]


def store_weights_transposed(graph: ir.Graph) -> None:
    """Turn MatMul(x, Transpose(weight)) into MatMul(x, weight'), if nothing else uses the weight.

    The transposed tensor is made only while it is written: no weight is in memory twice.
    """
    for node in list(graph):
        if node.op_type != "Transpose" or node.inputs[0] is None:
            continue
        weight, out = node.inputs[0], node.outputs[0]
        users = weight.uses()
        if not weight.is_initializer() or len(weight.shape or ()) != 2 or len(users) != 1:
            continue
        if not all(use.node.op_type == "MatMul" and use.idx == 1 for use in out.uses()):
            continue
        source = weight.const_value
        stored = ir.Value(
            name=weight.name,
            shape=_swapped(source),
            type=weight.type,
            const_value=_lazy_transpose(source),
        )
        out.replace_all_uses_with(stored)
        graph.remove(node, safe=True)
        del graph.initializers[weight.name]
        graph.initializers.add(stored)


def drop_expands(graph: ir.Graph) -> None:
    """Let an addition spread a bias itself, where it is stretched to the other operand's shape."""
    for node in list(graph):
        if node.op_type != "Expand" or not node.inputs[0].is_initializer():
            continue
        vector, wide = node.inputs[0], node.outputs[0]
        others = [
            (use.node, operand)
            for use in wide.uses()
            for operand in use.node.inputs
            if operand is not wide
        ]
        if len(vector.shape or ()) == 1 and all(
            reader.op_type == "Add" and operand is not None and operand.shape == wide.shape
            for reader, operand in others
        ):
            wide.replace_all_uses_with(vector)
            graph.remove(node, safe=True)


def settle_reshapes(graph: ir.Graph) -> None:
    """Give a Reshape constant sizes (0 = as the input) where each axis is fixed or kept.

    A size of -1 leaves TensorRT to work out the number of heads, which it cannot behind an op with
    two dynamic inputs; and the Concat of sizes goes.
    """
    for node in graph:
        if node.op_type != "Reshape":
            continue
        before, after = node.inputs[0].shape, node.outputs[0].shape
        if before is None or after is None:
            continue
        sizes = [
            size if isinstance(size, int)
            else 0 if axis < len(before) and str(before[axis]) == str(size)
            else None
            for axis, size in enumerate(after)
        ]  # fmt: skip
        if None in sizes or sizes == list(after):
            continue
        name = f"shape_{'_'.join(map(str, sizes))}"
        value = graph.initializers.get(name)
        if value is None:
            tensor = ir.tensor(np.array(sizes, np.int64), name=name)
            value = ir.Value(
                name=name,
                const_value=tensor,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape([len(sizes)]),
            )
            graph.register_initializer(value)
        node.replace_input_with(1, value)
        node.attributes.pop("allowzero", None)


def _lazy_transpose(source: ir.TensorProtocol) -> ir.LazyTensor:
    if isinstance(source, StoredTensor):
        return source.swapped()
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(source.numpy().T)),
        dtype=source.dtype,
        shape=_swapped(source),
        name=source.name,
    )


def _swapped(matrix: ir.TensorProtocol) -> ir.Shape:
    rows, columns = matrix.shape.numpy()
    return ir.Shape([columns, rows])


def _give_names(graph: ir.Graph, module_prefix: str) -> None:
    """Name initializers after their parameters, nodes after their modules, values after nodes."""
    parameters = {
        value: _short(value.name, module_prefix)
        for value in graph.initializers.values()
        if "." in (value.name or "")
    }
    taken: Counter[str] = Counter()
    node_names = {}
    for node in graph:
        node_names[node] = _unique(_node_name(node, parameters, module_prefix), taken)
    names = _parameter_names(graph, parameters, node_names)
    old = list(graph.initializers.values())
    graph.initializers.clear()
    for value in old:
        value.name = names[value]
    for value in sorted(old, key=lambda v: _natural(v.name)):
        graph.initializers.add(value)
    for node, name in node_names.items():
        node.name = name
        for index, out in enumerate(node.outputs):
            if not out.is_graph_output():
                out.name = f"{name}/out" if index == 0 else f"{name}/out{index}"


def _parameter_names(
    graph: ir.Graph, parameters: dict[ir.Value, str], node_names: dict[ir.Node, str]
) -> dict[ir.Value, str]:
    names: dict[ir.Value, str] = {}
    taken: Counter[str] = Counter()
    constants = 0
    for value in graph.initializers.values():
        readers = [use.node for use in value.uses()]
        gather = next((node for node in readers if node.op_type == "Gather"), None)
        if value in parameters:
            name = parameters[value]
            if gather is not None and len(readers) > 1:
                # A tied embedding: called after the table, not after the head that shares it.
                name = node_names[gather].replace("/", ".") + ".weight"
        elif readers and len(value.shape or ()) == 1 and "Normalization" in readers[0].op_type:
            name = node_names[readers[0]].replace("/", ".") + ".weight"
        else:
            name, constants = f"const.{constants}", constants + 1
        names[value] = _unique(name, taken)
    return names


def _node_name(node: ir.Node, parameters: dict[ir.Value, str], module_prefix: str) -> str:
    scope = _short(module_scope(node), module_prefix)
    path = re.sub(r"\.(?!\d+(\.|$))", "/", scope)
    weighted = any(_stored(value) in parameters for value in node.inputs if value is not None)
    main = node.op_type in ("MatMul", "Gather", "Gemm", "Conv") or "Normalization" in node.op_type
    if path and main and (weighted or "Normalization" in node.op_type):
        return path
    return f"{path}/{node.op_type}" if path else node.op_type


def _stored(value: ir.Value) -> ir.Value | None:
    """The value itself, or what it is the transpose of."""
    producer = value.producer()
    return producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else value


def _short(name: str | None, module_prefix: str) -> str:
    """Drop the prefix, or as much of its beginning as there is."""
    name = name or ""
    parts = module_prefix.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if name == prefix:
            return ""
        if name.startswith(prefix + "."):
            return name[len(prefix) + 1 :]
    return name


def _unique(name: str, taken: Counter[str]) -> str:
    taken[name] += 1
    if taken[name] == 1:
        return name
    return _unique(f"{name}_{taken[name]}", taken)


def _natural(name: str | None) -> list[tuple[int, int, str]]:
    """Sort key under which layer 10 comes after layer 9."""
    parts = re.split(r"(\d+)", name or "")
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts]


def _clear_metadata(model: ir.Model) -> None:
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "causal_lm"
    model.producer_name, model.producer_version, model.doc_string = "iq-export", None, None
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for value in [*values, *(out for node in model.graph for out in node.outputs)]:
        value.metadata_props.clear()
        value.doc_string = None
