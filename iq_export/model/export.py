"""torch module -> `onnx_ir` model with single RMSNormalization, RotaryEmbedding and Attention ops.

Parameters stay what they are, under their own names: no constant folding touches them here, so
that `replicate` can swap one layer's parameters for another's and `tidy` can name every weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from iq_export.errors import ModelError, root_cause
from iq_export.graph.interface import BATCH, PAST, SEQ, input_names, output_names
from iq_export.model.capture import CacheShape
from iq_export.model.scopes import SCOPES

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

# Example sizes: all different from each other and from 1, so that no axis is taken for another
# or specialised away.
_BATCH, _SEQ, _PAST = 2, 5, 3
# Rewrites leave identities behind that hide the rotary pattern until they are folded away.
_LOWERING_ROUNDS = 2
_TINY = 1e-7  # above what onnxscript's rules take for zero
_LONGEST = 300  # characters of torch's own words in an error


def example_inputs(cache: CacheShape, vocab_size: int) -> tuple[Any, ...]:
    """Small inputs of the right shapes for `flat_module`; the values do not matter to a trace."""
    import torch

    past = tuple(torch.zeros(_BATCH, heads, _PAST, features) for heads, features in cache.sizes)
    ids = torch.arange(_BATCH * _SEQ).reshape(_BATCH, _SEQ) % vocab_size
    mask = torch.ones(_BATCH, _PAST + _SEQ, dtype=torch.long)
    positions = torch.arange(_PAST, _PAST + _SEQ)[None].repeat(_BATCH, 1)
    return ids, mask, positions, past


def export_module(
    module: torch.nn.Module, cache: CacheShape, vocab_size: int, *, opset: int
) -> ir.Model:
    """Export a `flat_module` with dynamic batch, seq and past axes.

    Raises ModelError, in one sentence that names the model type, when it cannot be traced.
    """
    import torch

    kind = str(getattr(getattr(module.model, "config", None), "model_type", "unknown"))
    names = input_names(cache.num_layers), output_names(cache.num_layers)
    args = example_inputs(cache, vocab_size)
    batch = torch.export.Dim(BATCH)
    most: int | None = None  # the bound of seq and of past that the code needs
    while True:
        seq, past = (torch.export.Dim(name, max=most) for name in (SEQ, PAST))
        shapes = (
            {0: batch, 1: seq},
            {0: batch, 1: torch.export.Dim.DYNAMIC},
            {0: batch, 1: seq},
            tuple({0: batch, 2: past} for _ in args[3]),
        )
        try:
            return exported(module, args, shapes, *names, opset=opset, kind=kind)
        except ModelError as error:
            rows = _table_rows(error)
            if most is not None or rows is None:
                raise
            most = rows // 2  # of both: the graph has no bound, and `limits` states the model's


def exported(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    shapes: tuple[Any, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    opset: int,
    kind: str,
) -> ir.Model:
    """The graph of a module of type `kind`, with these names. Raises as `export_module`."""
    import torch

    try:
        program = torch.onnx.export(
            module,
            args,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            input_names=list(inputs),
            output_names=list(outputs),
            custom_translation_table={
                torch.ops.aten.scaled_dot_product_attention.default: _attention,
                torch.ops.aten.slice_scatter.default: _slice_scatter,
            },
            optimize=False,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise _explained(error, kind) from error
    if program is None:
        raise ModelError(f"Model type '{kind}' cannot be traced: torch gives no graph.")
    model = program.model
    _lower(model)
    return model


def _table_rows(error: BaseException) -> int | None:
    """How long a table is that the code looks up by lengths, from torch's words; None if that is
    not what an export failed by."""
    found = re.findall(_TABLE, str(root_cause(error)))
    return min((int(rows) for rows in found), default=None)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """torch's attention as one `Attention`, which repeats keys and values for all heads of queries:
    the exporter has that only where it is asked for, and torch broadcasts a single head anyway."""
    from onnxscript import opset23

    found = opset23.Attention(query, key, value, attn_mask, scale=scale, is_causal=is_causal)
    return found[0]


def _slice_scatter(
    whole: Any, part: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    """A part of a tensor written anew, as a Concat where its place is fixed."""
    from onnxscript import opset23
    from onnxscript.function_libs.torch_lib.ops.core import aten_slice_scatter

    op: Any = opset23
    size, begin, length = whole.shape[dim], 0 if start is None else start, part.shape[dim]
    if step != 1 or not all(isinstance(number, int) for number in (size, begin, length)):
        return aten_slice_scatter(whole, part, dim, start, end, step)
    begin += size * (begin < 0)
    parts, rest = [part], begin + length
    if begin:
        parts.insert(0, op.Slice(whole, [0], [begin], [dim]))
    if rest < size:
        parts.append(op.Slice(whole, [rest], [size], [dim]))
    return op.Concat(*parts, axis=dim)


def _lower(model: ir.Model) -> None:
    """Inline torchlib's functions, fold shape arithmetic, fuse norms and rotary embeddings."""
    import onnxscript.optimizer
    import onnxscript.rewriter
    from onnx_ir.passes import common
    from onnxscript.rewriter import onnx_fusions

    parameters = set(model.graph.initializers.values())

    def keeps_parameters(node: ir.Node) -> bool | None:
        return False if any(value in parameters for value in node.inputs) else None

    common.InlinePass()(model)
    for _ in range(_LOWERING_ROUNDS):
        onnxscript.optimizer.fold_constants_ir(model, should_fold=keeps_parameters)
        with _kept_epsilons(model.graph):
            onnxscript.rewriter.rewrite(model)
    onnx_fusions.fuse(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    _inherit_scopes(model.graph)


@contextmanager
def _kept_epsilons(graph: ir.Graph) -> Iterator[None]:
    """onnxscript's rules take 1e-8 for zero, which some norms add: they do not see it here."""
    import onnx_ir as ir

    hidden = []
    for node in graph:
        for value in node.inputs if node.op_type == "Add" else ():
            tensor = ir.convenience.get_const_tensor(value) if value is not None else None
            if tensor is not None and tensor.size == 1 and 0 < tensor.numpy().item() < _TINY:
                hidden.append(node)
    for node in hidden:
        node.domain = "hidden"
    try:
        yield
    finally:
        for node in hidden:
            node.domain = ""


def _inherit_scopes(graph: ir.Graph) -> None:
    """Let nodes that a rewrite made without saying where belong to the module that reads them."""
    for node in reversed(list(graph)):
        if SCOPES in node.metadata_props:
            continue
        for reader in (use.node for out in node.outputs for use in out.uses()):
            if SCOPES in reader.metadata_props:
                node.metadata_props[SCOPES] = reader.metadata_props[SCOPES]
                break


_TABLE = r"specified range satisfy the generated guard .*\.size\(\)\[\d+\] <=? (\d+)"
# What torch says when it fails -> what that means; the groups of a pattern fill the sentence.
_REASONS = (
    (r"No ONNX function found for <?(?:OpOverload\(op='|torch\.ops\.)?([\w.]+)",
     "ONNX has nothing for its operation '{0}'"),
    (_TABLE, "its code works up to a fixed length only (tables of {0} positions)"),
    (r"is inconsistent", "its code makes masks or biases whose size torch cannot follow"),
    (r"data-dependent|DataDependent", "its code branches on the values of its inputs"),
    (r"inferred to be a constant|[Ss]pecializ", "its code works with one fixed size only"),
    (r"unpack|has no attribute|unexpected keyword|NoneType",
     "its code handles masks or caches in a way of its own"),
)  # fmt: skip


def _explained(error: BaseException, kind: str) -> ModelError:
    """One sentence of the innermost exception: the exporter wraps it in pages of advice."""
    cause = root_cause(error)
    if isinstance(cause, ModelError):
        return cause
    said = str(cause)
    for pattern, sentence in _REASONS:
        match = re.search(pattern, said)
        if match:
            reason = sentence.format(*match.groups())
            break
    else:
        reason = f"torch's exporter stops ({type(cause).__name__}: {_first_sentence(said)})"
    return ModelError(
        f"Model type '{kind}' cannot be traced: {reason}; this architecture is not supported."
    )


def _first_sentence(text: str) -> str:
    """The first line; where that announces a list, its first entry as well."""
    lines = [line.strip(" -*\t.") for line in text.splitlines() if line.strip(" -*\t.")]
    head = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return head[:_LONGEST] or "no message"
