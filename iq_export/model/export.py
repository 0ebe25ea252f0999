"""torch module -> `onnx_ir` model with single RMSNormalization, RotaryEmbedding and Attention ops.

Parameters stay what they are, under their own names: no constant folding touches them here, so
that `replicate` can swap one layer's parameters for another's and `tidy` can name every weight.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from iq_export.errors import ModelError
from iq_export.model.capture import CacheShape
from iq_export.model.tidy import SCOPES

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

# Example sizes: all different from each other and from 1, so that no axis is taken for another
# or specialised away.
_BATCH, _SEQ, _PAST = 2, 5, 3
# Rewrites leave identities behind that hide the rotary pattern until they are folded away.
_LOWERING_ROUNDS = 2


def input_names(layers: int) -> list[str]:
    """Names of the graph's inputs for a model of `layers` layers."""
    past = [f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    return ["input_ids", "attention_mask", "position_ids", *past]


def output_names(layers: int) -> list[str]:
    """Names of the graph's outputs for a model of `layers` layers."""
    return ["logits", *(f"present.{i}.{k}" for i in range(layers) for k in ("key", "value"))]


def example_inputs(cache: CacheShape, vocab_size: int) -> tuple[Any, ...]:
    """Small inputs of the right shapes for `flat_module`; the values do not matter to a trace."""
    import torch

    kv = (_BATCH, cache.kv_heads, _PAST, cache.head_dim)
    past = tuple(torch.zeros(kv) for _ in range(2 * cache.num_layers))
    ids = torch.arange(_BATCH * _SEQ).reshape(_BATCH, _SEQ) % vocab_size
    mask = torch.ones(_BATCH, _PAST + _SEQ, dtype=torch.long)
    positions = torch.arange(_PAST, _PAST + _SEQ)[None].repeat(_BATCH, 1)
    return ids, mask, positions, past


def export_module(
    module: torch.nn.Module, cache: CacheShape, vocab_size: int, *, opset: int
) -> ir.Model:
    """Export a `flat_module` with dynamic batch, seq and past axes.

    Raises ModelError with torch's own first line when the architecture cannot be traced.
    """
    import torch

    batch, seq, past = (torch.export.Dim(name) for name in ("batch", "seq", "past"))
    args = example_inputs(cache, vocab_size)
    shapes = (
        {0: batch, 1: seq},
        {0: batch, 1: torch.export.Dim.DYNAMIC},
        {0: batch, 1: seq},
        tuple({0: batch, 2: past} for _ in args[3]),
    )
    with _quiet():
        try:
            program = torch.onnx.export(
                module,
                args,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                input_names=input_names(cache.num_layers),
                output_names=output_names(cache.num_layers),
                optimize=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise _explained(error) from error
        if program is None:
            raise ModelError("The model cannot be traced: torch.onnx.export returned nothing.")
        model = program.model
        _lower(model)
    return model


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
        onnxscript.rewriter.rewrite(model)
    onnx_fusions.fuse(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    _inherit_scopes(model.graph)


def _inherit_scopes(graph: ir.Graph) -> None:
    """Let nodes that a rewrite made without saying where belong to the module that reads them."""
    for node in reversed(list(graph)):
        if SCOPES in node.metadata_props:
            continue
        for reader in (use.node for out in node.outputs for use in out.uses()):
            if SCOPES in reader.metadata_props:
                node.metadata_props[SCOPES] = reader.metadata_props[SCOPES]
                break


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter: its warnings concern torch's own internals, not the user's model."""
    loggers: Sequence[logging.Logger] = [
        logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _explained(error: BaseException) -> ModelError:
    """First line of the innermost exception: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, ModelError):
        return error
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0].strip() if lines else 'no message'}"
    return ModelError(f"The model cannot be traced: {reason}")
