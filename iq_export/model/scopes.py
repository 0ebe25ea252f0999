"""The torch modules that a node of an exported graph was traced in."""

from __future__ import annotations

import ast

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"


def all_scopes(node: ir.Node) -> list[str]:
    """Qualified names of the torch modules that `node` was traced in, outermost first."""
    text = node.metadata_props.get(SCOPES, "")
    # The last entry is the torch operator's own name.
    scopes = ast.literal_eval(text)[:-1] if text else []
    return [scope for scope in scopes if not scope.startswith("_empty_nn")]


def module_scope(node: ir.Node) -> str:
    """Qualified name of the innermost module of `node` ('' at the top or unknown)."""
    return ["", *all_scopes(node)][-1]
