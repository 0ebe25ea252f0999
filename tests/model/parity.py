"""Trace a model in memory, for the tests of the check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iq_export.model.capture import settled_rotations
from iq_export.model.quiet import quiet
from iq_export.model.trace import MODEL_FILE, OPSET, _export
from iq_export.model.weights import Weights


def export(model: Any, folder: Path) -> Path:
    """The traced graph of a transformers model, as `trace` writes it."""
    with quiet(), settled_rotations(model):
        if _export(model, Weights(), folder, OPSET, True) is None:
            _export(model, Weights(), folder, OPSET, False)
    return folder / MODEL_FILE
