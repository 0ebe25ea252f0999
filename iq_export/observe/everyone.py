"""What an expert would make of all tokens, whoever chose it."""

from __future__ import annotations

import onnx_ir as ir


def for_everyone(model: ir.Model, name: str, rows: str) -> str:
    """Add a value to `model` that is as the one called `name`, of one expert, but of all tokens;
    returns its name. `rows` names the value that numbers the expert's tokens.

    Weights are shared, so this is for a graph that is only looked at. What is there is not made
    again.
    """
    values = {value.name: value for node in model.graph for value in node.outputs}
    readers = {node for node in values[rows].consumers() if node.op_type == "Squeeze"}
    return str(_everyone(values[name], _behind(values[rows]), readers, values).name)


def _behind(rows: ir.Value) -> set[ir.Node]:
    """The nodes that depend on `rows`."""
    seen: set[ir.Node] = set()
    todo = list(rows.consumers())
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [reader for out in node.outputs for reader in out.consumers()]
    return seen


def _everyone(
    value: ir.Value,
    its: set[ir.Node],
    readers: set[ir.Node],
    values: dict[str | None, ir.Value],
) -> ir.Value:
    node = value.producer()
    if node is None or node not in its:
        return value
    if node.op_type == "Gather" and _index(node) in readers:
        taken = node.inputs[0]
        assert taken is not None
        return taken  # its tokens' rows are taken here
    name = f"{value.name}.everyone"
    if name not in values:
        inputs = [None if v is None else _everyone(v, its, readers, values) for v in node.inputs]
        copy = ir.Node(
            node.domain, node.op_type, inputs, list(node.attributes.values()),
            num_outputs=len(node.outputs), version=node.version, name=f"{node.name}.everyone",
        )  # fmt: skip
        assert node.graph is not None
        node.graph.insert_after(node, copy)
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type = f"{old.name}.everyone", old.type
            values[new.name] = new
    return values[name]


def _index(gather: ir.Node) -> ir.Node | None:
    """What makes the index of a Gather."""
    value = gather.inputs[1]
    return None if value is None else value.producer()
