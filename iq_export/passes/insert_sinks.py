"""Rewrite the graph so that a lifecycle's spike is never computed (docs/design.md).

Per lifecycle, in the norm form:
1. SinkDetect reads the birth block's down-projection input and gives the index of every row. Where
   tokens spike earlier, another one stands there and what it finds stays.
2. SinkClampInsert with zero templates clamps the down-projection inputs of `clamp_blocks`.
3. SinkClampInsert writes the template after every norm of the persistence phase, or in front of
   the products of a branch with no norm in front.
4. SinkRestore adds what the clamped residual lacks after the last block. A lifecycle that ends in
   its own block, in a norm that the stream passes, has this alone: no product reads its spike.

In the kv form 3 writes zeros, SinkClampInsert writes the templates of keys and values in front of
every attention product and of the KV cache, and one more sets the residual after the last block.
The norm+kv form is the norm form with the templates of keys and values besides: a quantizer behind
a norm clips the template, and what other tokens see of a sink are its keys and values.

Precondition: the traced graph; a causal one with a mask and positions. Postcondition: semantic
rows are computed exactly as before.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from iq_export.errors import GraphError
from iq_export.graph import io
from iq_export.graph.edit import constant, insert_behind, shared_constant
from iq_export.graph.interface import Interface, Role, name_of
from iq_export.graph.sites import Sites
from iq_export.sinks.ops import DOMAIN, PLUGIN_ATTRIBUTES
from iq_export.sinks.templates import KV, NORM, SinkTemplates


def index_name(lifecycle: int) -> str:
    """Name of the int32 `[batch, seq]` sink index of lifecycle number `lifecycle`."""
    return f"iq.sinks.{lifecycle}.index"


def index_scopes(number: int, sinks: SinkTemplates, sites: Sites) -> dict[str, set[str]]:
    """Every sink index of lifecycle `number` -> the products (node names) whose inputs it clamps.

    One index per site of detection; the last one is the frozen union.
    """
    early = [_early_index_name(number, site.site.block) for site in sinks.early]
    scopes = [nodes for nodes, _ in sinks.lifecycle.scopes(sites)]
    return dict(zip([*early, index_name(number)], scopes, strict=True))


def _early_index_name(lifecycle: int, block: int) -> str:
    return f"{index_name(lifecycle)}.{block}"


def insert_sinks(model: ir.Model, sites: Sites, sinks: Sequence[SinkTemplates]) -> bool:
    """Insert the ops of every lifecycle of `sinks`; returns whether the graph changed."""
    if not sinks:
        return False
    io.add_sink_functions(model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    masks = _row_masks(model.graph, values[sites.embedding])
    for number, templates in enumerate(sinks):
        _insert_one(model.graph, values, sites, number, templates, masks)
    if any(branch.is_mixture for branch in sites.branches):
        model.graph.sort()  # all experts wait for the detection that reads them together
    return True


def _row_masks(graph: ir.Graph, stream: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """`first` (position 0 of a causal model's sequence), `never` and `valid` (not a pad), bool
    `[batch, seq]`.

    A row is valid if its column of the attention mask is set: the last `seq` columns, since
    earlier ones belong to the KV cache. Left pads may have position 0 too, hence `first & valid`.
    Without positions no row is the first, and without a mask all of `stream`, the residual before
    the first block, are valid.
    """
    interface = Interface.of_graph(graph)
    inputs = {value.name: value for value in graph.inputs}
    roles = (Role.IDS, Role.MASK, Role.POSITIONS)
    found = [interface.find(role) for role in roles]
    ids, mask, positions = (None if each is None else inputs[each.name] for each in found)
    if ids is None or mask is None or positions is None:
        if interface.is_causal:
            missing = sorted(
                name_of(role) for role, each in zip(roles, found, strict=True) if not each
            )
            raise GraphError(
                f"The graph lacks the inputs {missing}; sinks are found by position and mask."
            )
        return _masks_of_whole(graph, stream, mask)
    zero = constant(graph, "iq.zero", np.zeros([1], np.int64))
    nodes = [
        ir.node("Shape", [ids], {"start": 1, "end": 2}, name="iq/seq"),
    ]
    nodes.append(ir.node("Neg", [nodes[0].outputs[0]], name="iq/minus_seq"))
    end = constant(graph, "iq.end", np.array([np.iinfo(np.int64).max]))
    axis = constant(graph, "iq.axis", np.ones([1], np.int64))
    nodes.append(
        ir.node("Slice", [mask, nodes[1].outputs[0], end, axis], name="iq/current_columns")
    )
    nodes.append(ir.node("Greater", [nodes[2].outputs[0], zero], name="iq/valid"))
    nodes.append(ir.node("Equal", [positions, zero], name="iq/first"))
    nodes.append(ir.node("Not", [nodes[3].outputs[0]], name="iq/never"))
    for node in nodes:
        node.outputs[0].name = node.name.replace("/", ".")
    graph.insert_before(graph[0], nodes)
    valid, first, never = (node.outputs[0] for node in nodes[3:])
    return first, never, valid


def _masks_of_whole(
    graph: ir.Graph, stream: ir.Value, mask: ir.Value | None
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """As `_row_masks`, where each row is as near to all others."""
    zero = constant(graph, "iq.zero", np.zeros([1], np.int64))
    no = constant(graph, "iq.false", np.zeros([1, 1], bool))
    size = ir.node("Shape", [stream], {"start": 0, "end": 2}, name="iq/rows")
    never = ir.node("Expand", [no, size.outputs[0]], name="iq/never")
    if mask is None:
        valid = ir.node("Not", [never.outputs[0]], name="iq/valid")
    else:
        valid = ir.node("Greater", [mask, zero], name="iq/valid")
    nodes = [size, never, valid]
    for node in nodes:
        node.outputs[0].name = node.name.replace("/", ".")
    never.outputs[0].dtype = valid.outputs[0].dtype = ir.DataType.BOOL
    insert_behind(graph, stream, nodes)
    return never.outputs[0], never.outputs[0], valid.outputs[0]


def _insert_one(
    graph: ir.Graph,
    values: dict[str, ir.Value],
    sites: Sites,
    number: int,
    sinks: SinkTemplates,
    masks: tuple[ir.Value, ir.Value, ir.Value],
) -> None:
    first, never, valid = masks
    life = sinks.lifecycle
    prefix = f"iq/sinks.{number}"
    bare = sites.bare_readers

    def detection(
        block: int, force_first: bool, table: np.ndarray, threshold: float, suffix: str = ""
    ) -> ir.Node:
        # `never` is the mask of pads, which `valid` rules out again: only the threshold decides.
        force = first if force_first else never
        inputs = [values[sites.blocks[block].mlp.inner], force, valid]
        name = f"{prefix}/detect{suffix}"
        return _op("SinkDetect", inputs, table, name, threshold=float(threshold))

    index: ir.Value | None = None
    ends = [*(site.site.block for site in sinks.early[1:]), life.birth]
    for early, end in zip(sinks.early, ends, strict=False):
        site = early.site
        detect = detection(
            site.block, site.force_first, early.detection, early.threshold, f".{site.block}"
        )
        index = _add_detection(graph, detect, _early_index_name(number, site.block), index)
        clamped = [block for block in life.clamp_blocks if site.block <= block < end]
        _clamp(graph, values, sites, number, clamped, sinks.count, index, detected_at=site.block)
        for name, templates in early.norms.items():
            _insert_rows(graph, values[name], bare.get(name), number, templates, index)
    detect = detection(life.birth, life.force_first, sinks.detection, sinks.threshold)
    index = _add_detection(graph, detect, index_name(number), index)

    clamped = [block for block in life.clamp_blocks if block >= life.birth]
    _clamp(graph, values, sites, number, clamped, sinks.count, index, detected_at=life.birth)
    for name, templates in sinks.norms.items() if life.insert_blocks else ():
        rows = np.zeros_like(templates) if sinks.form == KV else templates
        _insert_rows(graph, values[name], bare.get(name), number, rows, index)
    if sinks.form != NORM:
        _insert_key_values(graph, values, sites, number, sinks, index)
    residual = values[sites.blocks[life.end].mlp.residual]
    if sinks.form == KV:
        assert sinks.key_values is not None
        rows, name = sinks.key_values.residual, f"{prefix}/set.{life.end}"
        op = _op("SinkClampInsert", [residual, index], rows, name)
        _interpose(graph, residual, op, number)
        if residual.name in bare:  # products have one name for what they read in every form
            op.outputs[0].name = _output_name(residual, "SinkRestore", number)
        return
    restore = sinks.restore
    if not restore.size:
        restore = np.zeros((sinks.count, sites.hidden), np.float32)
    op = _op("SinkRestore", [residual, index], restore, _restore_name(number, sinks))
    _interpose(graph, residual, op, number)


def _add_detection(
    graph: ir.Graph, detect: ir.Node, name: str, before: ir.Value | None
) -> ir.Value:
    """Place `detect` and return the index called `name`; who is in the index `before` stays so."""
    detection, index = detect.inputs[0], detect.outputs[0]
    index.dtype, index.shape = ir.DataType.INT32, ir.Shape(detection.shape[:-1])
    index.name = name if before is None else f"{name}.here"
    nodes = [detect]
    if before is not None:
        none = shared_constant(graph, "iq.no_sink", np.array(0, np.int32))
        caught = ir.node("Greater", [before, none], name=f"{detect.name}.caught")
        union = ir.node("Where", [caught.outputs[0], before, index], name=f"{detect.name}.union")
        caught.outputs[0].name, union.outputs[0].name = f"{name}.caught", name
        caught.outputs[0].dtype, caught.outputs[0].shape = ir.DataType.BOOL, index.shape
        union.outputs[0].dtype, union.outputs[0].shape = index.dtype, index.shape
        nodes += [caught, union]
    graph.insert_after(detection.producer(), nodes)
    return nodes[-1].outputs[0]


def _clamp(
    graph: ir.Graph,
    values: dict[str, ir.Value],
    sites: Sites,
    number: int,
    blocks: Sequence[int],
    count: int,
    index: ir.Value,
    *,
    detected_at: int,
) -> None:
    """Zero the sink rows of the down-projection inputs of `blocks`; of experts', those of the
    sinks that chose them."""
    for block in blocks:
        mlp, after = sites.blocks[block].mlp, index.producer() if block == detected_at else None
        for place, route in enumerate(mlp.routes):
            name = f"iq/sinks.{number}/clamp.{block}" + f".{place}" * mlp.is_mixture
            clamped, own = values[route.output.input], index
            if route.rows is not None:
                own = _index_of_rows(graph, index, values[route.rows], name)
            zeros = np.zeros((count, route.output.in_features), np.float32)
            op = _op("SinkClampInsert", [clamped, own], zeros, name)
            _interpose(graph, clamped, op, number, after=after, shown=mlp.is_mixture)


def _index_of_rows(graph: ir.Graph, index: ir.Value, rows: ir.Value, name: str) -> ir.Value:
    """The index of the tokens that an expert takes, `[1, n]`, where `rows` are their numbers."""
    flat = shared_constant(graph, "iq.flat", np.array([1, -1], np.int64))
    axis = shared_constant(graph, "iq.batch", np.zeros([1], np.int64))
    nodes = [
        ir.node("Reshape", [index, flat], name=f"{name}/flat"),
        ir.node("Squeeze", [rows, axis], name=f"{name}/rows"),
    ]
    taken = [node.outputs[0] for node in nodes]
    nodes.append(ir.node("Gather", taken, {"axis": 1}, name=f"{name}/index"))
    for node, dtype in zip(nodes, (index.dtype, rows.dtype, index.dtype), strict=True):
        node.outputs[0].name, node.outputs[0].dtype = f"{node.name}/out", dtype
    nodes[-1].outputs[0].shape = rows.shape
    graph.insert_after(rows.producer(), nodes)
    return nodes[-1].outputs[0]


def _insert_rows(
    graph: ir.Graph,
    value: ir.Value,
    bare: Collection[str] | None,
    number: int,
    rows: np.ndarray,
    index: ir.Value,
) -> None:
    """Behind a norm for all that read `value`; where the nodes `bare` read the stream itself, for
    these alone: the residual addition goes on with the spike."""
    name = f"iq/sinks.{number}/insert.{value.name}"
    if bare is None:
        op = _op("SinkClampInsert", [value, index], rows, name)
        _interpose(graph, value, op, number)
        return
    readers = [node for node in graph if node.name in bare]
    read = readers[0].inputs[0]  # another lifecycle may have inserted or restored here
    op = _op("SinkClampInsert", [read, index], rows, name)
    _name_output(op, value, number)
    for reader in readers:
        reader.replace_input_with(0, op.outputs[0])
    insert_behind(graph, read, op)


def _insert_key_values(
    graph: ir.Graph,
    values: dict[str, ir.Value],
    sites: Sites,
    number: int,
    sinks: SinkTemplates,
    index: ir.Value,
) -> None:
    assert sinks.key_values is not None, "the form needs templates of keys and values"
    by_heads: dict[int | None, ir.Value] = {None: index}
    done: set[str] = set()  # layers may share keys and values
    for block in sinks.lifecycle.insert_blocks:
        site = sites.blocks[block].attention.attention
        assert site is not None
        if site.heads is not None and site.heads not in by_heads:
            by_heads[site.heads] = index_per_head(graph, index, site.heads)
        for name in (site.key, site.value):
            if name in done:
                continue
            done.add(name)
            rows = sinks.key_values.rows[name]
            if site.heads is not None:  # [K, heads * head_dim] -> [K * heads, head_dim]
                rows = rows.reshape(sinks.count * site.heads, -1)
            inputs = [values[name], by_heads[site.heads]]
            op = _op("SinkClampInsert", inputs, rows, f"iq/sinks.{number}/attend.{name}")
            _interpose(graph, values[name], op, number)


def index_per_head(graph: ir.Graph, index: ir.Value, heads: int) -> ir.Value:
    """The index for values `[batch, heads, seq, head_dim]`: int32 `[batch, heads, seq]`.

    Template k of head h is row `k * heads + h` of the op's table, so its index is that plus one;
    0 stays 0. So the op needs no other layout, and keys are not transposed for it.
    """
    name = f"{index.name}.heads{heads}"
    axis = shared_constant(graph, "iq.axis", np.ones([1], np.int64))
    step = shared_constant(graph, f"iq.heads{heads}.step", np.array(heads, np.int32))
    offsets = np.arange(1 - heads, 1, dtype=np.int32)[:, None]
    offset = shared_constant(graph, f"iq.heads{heads}.offset", offsets)
    zero = shared_constant(graph, "iq.no_sink", np.array(0, np.int32))
    nodes = [ir.node("Unsqueeze", [index, axis], name=f"{name}/column")]
    nodes.append(ir.node("Mul", [nodes[0].outputs[0], step], name=f"{name}/scaled"))
    nodes.append(ir.node("Add", [nodes[1].outputs[0], offset], name=f"{name}/shifted"))
    nodes.append(ir.node("Max", [nodes[2].outputs[0], zero], name=f"{name}/bounded"))
    for node in nodes:
        node.outputs[0].name = f"{node.name}/out"
        node.outputs[0].dtype = ir.DataType.INT32
    nodes[-1].outputs[0].name = name
    producer = index.producer()
    assert producer is not None
    graph.insert_after(producer, nodes)
    return nodes[-1].outputs[0]


def set_restore(model: ir.Model, sinks: Sequence[SinkTemplates]) -> None:
    """Write the `restore` vectors of `sinks` into the SinkRestore nodes of a rewritten graph."""
    nodes = {node.name: node for node in model.graph}
    for number, templates in enumerate(sinks):
        if templates.form == KV:
            continue  # it sets the residual
        node = nodes[_restore_name(number, templates)]
        if not templates.restore.size:
            continue  # not measured yet: it adds zero
        flat = templates.restore.ravel().tolist()
        node.attributes["templates"] = ir.AttrFloat32s("templates", flat)


def _restore_name(number: int, sinks: SinkTemplates) -> str:
    return f"iq/sinks.{number}/restore.{sinks.lifecycle.end}"


def _op(
    kind: str, inputs: list[ir.Value], templates: np.ndarray, name: str, **attributes: float
) -> ir.Node:
    return ir.node(
        kind,
        inputs,
        {
            "templates": ir.AttrFloat32s("templates", templates.ravel().tolist()),
            "template_shape": list(templates.shape),
            **attributes,
            **PLUGIN_ATTRIBUTES,
        },
        domain=DOMAIN,
        name=name,
    )


def _interpose(
    graph: ir.Graph,
    value: ir.Value,
    op: ir.Node,
    number: int,
    *,
    after: ir.Node | None = None,
    shown: bool = False,
) -> None:
    """Let every consumer of `value` but the detections read `op`'s output instead; and but the
    Concat in front of these, if it is `shown` to them through one (a mixture's).

    Where another lifecycle passes the same site, its op is one of these consumers.
    """
    new = _name_output(op, value, number)
    for consumer, position in list(value.uses()):
        detects = consumer.op_type == "SinkDetect" or (shown and consumer.op_type == "Concat")
        if consumer is not op and not detects:
            consumer.replace_input_with(position, new)
    graph.insert_after(after or value.producer(), op)


def _output_name(value: ir.Value, kind: str, number: int) -> str:
    return f"{value.name}.{kind}.{number}"


def _name_output(op: ir.Node, value: ir.Value, number: int) -> ir.Value:
    new = op.outputs[0]
    new.name = _output_name(value, op.op_type, number)
    new.dtype, new.shape = value.dtype, value.shape
    return new
