"""A graph of another exporter -> the single ops that the rest of the compiler knows.

Files of opset 13 to 22 write norms, GELU, SiLU, rotary embeddings and attention as primitive ops,
and products as Gemm, with tokens flattened, or with weights behind a Transpose. `recompose` lifts
such a graph to opset 23 and makes LayerNormalization, RMSNormalization, Gelu, RotaryEmbedding,
Attention and MatMul of them, by onnxscript's rules where it has them. What it does not recognise
stays as it is. `check_same` then compares what both graphs compute.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from iq_export.errors import GraphError
from iq_export.graph.interface import Interface, random_windows
from iq_export.graph.vocabulary import read_vocabulary
from iq_export.model.copied_sizes import copy_sizes
from iq_export.model.fuse_activations import fuse_activations
from iq_export.model.fuse_attention import fuse_attention
from iq_export.model.fuse_norms import fuse_norms
from iq_export.model.tidy import fold_parameter_vectors, settle_reshapes, store_weights_transposed
from iq_export.model.unflatten import unflatten
from iq_export.model.written_out import as_matmul, is_plain

OPSET = 23
LOWEST_OPSET = 13
# Ops of written out forms, which a graph of single ops lacks.
_WRITTEN_OUT = frozenset({"Softmax", "ReduceMean", "Erf", "Tanh", "Exp", "Gemm"})
_OLDEST_FORMAT = 11  # of ONNX files with opset 23
_SMALL = 64  # elements up to which equal constants are one
# Of what `check_same` runs: tokens of a row, those of the first step, what is padded of the second
# row; and the largest error, as a fraction of the range of logits.
_TOKENS, _FIRST, _PADDING, _TOLERANCE = 8, 5, 2, 1e-4
_ROUNDS = 2  # what one round of folding leaves is seen by the next


def is_written_out(model: ir.Model) -> bool:
    """Whether `model` has an older opset, or primitive ops where single ones may stand."""
    opset = model.opset_imports.get("", 0)
    return LOWEST_OPSET <= opset < OPSET or (
        opset == OPSET and any(node.op_type in _WRITTEN_OUT for node in model.graph)
    )


def recompose(model: ir.Model, where: str) -> None:
    """Change `model`, a graph of opset 13 to 23 called `where` in messages, in place.

    Weights are not read, but for vectors. Raises GraphError if it cannot be lifted or understood.
    """
    try:
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        _lift(model, where)
        _rewrite(model)
    except GraphError:
        raise
    except Exception as error:  # of the rules, which expect what exporters write
        said = " ".join((str(error).splitlines() or [""])[0].split()).rstrip(".")[:200]
        raise GraphError(
            f"{where} cannot be rewritten in single ops ({type(error).__name__}: {said}); export "
            f"it again with opset_version={OPSET}."
        ) from error


def check_same(original: ir.Model, made: Path, where: str) -> None:
    """Compare what the graph at `made` gives with what `original` does: two rows of random tokens,
    one of them padded, in two steps, or two random windows for a graph without a cache.

    Raises GraphError if they differ by more than float32 explains, or one does not run.
    """
    if not Interface.of_graph(original.graph).is_causal:
        _check_whole(original, made, where)
        return
    from iq_export.run.ort import left_pad
    from iq_export.run.parts import Call, logits_in_parts, logits_of

    for tensor in Interface.of_graph(original.graph).past:
        tensor.empty(1)  # sizes that are not fixed are refused
    rows = read_vocabulary(made).rows or 1
    tokens = np.random.default_rng(0).integers(0, rows, (2, _TOKENS)).tolist()
    ids, mask, positions = left_pad([tokens[0], tokens[1][_PADDING:]], 0)
    bounds = ((0, _FIRST), (_FIRST, _TOKENS))
    call = Call(tuple((ids[:, a:b], mask[:, :b], positions[:, a:b]) for a, b in bounds))
    common.ShapeInferencePass()(original)
    (expected,), (found,) = logits_of(original, where, [call]), logits_in_parts(made, [call])
    seen = mask.astype(bool)
    exact, same = (np.concatenate(logits, axis=1)[seen] for logits in (expected, found))
    _check_near(exact, same, "logits", where)


def _check_whole(original: ir.Model, made: Path, where: str) -> None:
    from iq_export.graph import io
    from iq_export.run.parts import outputs_of

    interface = Interface.of_graph(original.graph)
    rows = read_vocabulary(made).rows or 1
    feeds = [interface.feeds(window) for window in random_windows(interface, rows, count=2)]
    common.ShapeInferencePass()(original)
    expected = outputs_of(original, where, feeds)
    found = outputs_of(io.load(made), made.name, feeds)
    for exact, same in zip(expected, found, strict=True):
        for name, value in exact.items():
            _check_near(value, same[name], f"values of '{name}'", where)


def _check_near(
    exact: NDArray[np.float32], same: NDArray[np.float32], what: str, where: str
) -> None:
    error = float(np.abs(exact - same).max() / max(np.ptp(exact), np.finfo(np.float32).tiny))
    if not error <= _TOLERANCE:
        raise GraphError(
            f"{where} was not understood: written in single ops it gives other {what} (by "
            f"{error:.2g} of their range); export it again with opset_version={OPSET}."
        )


def _rewrite(model: ir.Model) -> None:
    _simplify(model)
    for node in list(model.graph):
        if node.op_type == "Gemm" and is_plain(node):
            as_matmul(node)
    store_weights_transposed(model.graph)
    fuse_norms(model)
    fuse_activations(model.graph)
    unflatten(model.graph)
    _simplify(model)
    fuse_attention(model)
    _rotations(model)
    settle_reshapes(model.graph)
    common.CommonSubexpressionEliminationPass(size_limit=_SMALL)(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.TopologicalSortPass()(model)


def _lift(model: ir.Model, where: str) -> None:
    from onnxscript.version_converter import ConvertVersionPass

    opset = model.opset_imports.get("")
    with _silent():  # onnxscript says which converter it takes, and why one fails
        ConvertVersionPass(OPSET, fallback=True)(model)
    if model.opset_imports.get("") != OPSET:
        raise GraphError(
            f"{where} has opset {opset} and an operator that cannot be lifted to opset {OPSET}; "
            f"export it again with opset_version={OPSET}."
        )
    model.ir_version = max(model.ir_version, _OLDEST_FORMAT)


@contextmanager
def _silent() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _simplify(model: ir.Model) -> None:
    """Fold what is computed of constants and of fixed sizes; drop what changes nothing."""
    import onnxscript.rewriter

    for _ in range(_ROUNDS):
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.ShapeInferencePass()(model)
        fold_parameter_vectors(model)
        with _silent():
            onnxscript.rewriter.rewrite(model)
        copy_sizes(model.graph)
        common.IdentityEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.ShapeInferencePass()(model)


def _rotations(model: ir.Model) -> None:
    from onnxscript.rewriter.rules.fusion._rotary_embedding import (
        fuse_partial_rotary_embedding,
        fuse_rotary_embedding,
    )

    fuse_rotary_embedding(model)
    fuse_partial_rotary_embedding(model)
