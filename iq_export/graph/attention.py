"""`Attention` nodes: what they read, how many heads they have, what they multiply with."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Attended:
    """An `Attention` node with the names of its query and key."""

    node: str
    query: str
    key: str
    heads: int
    head_dim: int
    scale: float


def attentions(model: ir.Model) -> list[Attended]:
    """Every `Attention` node whose query has a known number of heads, in graph order."""
    found = []
    for node in model.graph:
        if node.op_type == "Attention":
            try:
                heads, head_dim = query_heads(node)
            except ValueError:
                continue
            query, key = (str(value.name) for value in node.inputs[:2] if value is not None)
            found.append(
                Attended(str(node.name), query, key, heads, head_dim, attention_scale(node))
            )
    return found


def attention_scale(node: ir.Node) -> float:
    """What q.k is multiplied with: the attribute, or `1 / sqrt(head_dim)` without one."""
    given = node.attributes.get("scale")
    return given.as_float() if given is not None else query_heads(node)[1] ** -0.5


def query_heads(node: ir.Node) -> tuple[int, int]:
    """`(heads, head_dim)` of the query of an `Attention` node; ValueError if they are not fixed."""
    match tuple(node.inputs[0].shape or ()):
        case (_, int(heads), _, int(size)):
            return heads, size
        case (_, _, int(features)):
            heads = node.attributes["q_num_heads"].as_int()
            return heads, features // heads
    raise ValueError(f"the heads of {node.name} are not known")
