"""A model loaded as the compiler does, with all its weights in memory."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from iq_export.graph import io
from iq_export.model import load
from iq_export.model.trace import MODEL_FILE, TracedModel


def load_model(source: load.ModelSource) -> load.LoadedModel:
    """As `load.load_model`; the model can be computed with."""
    with TemporaryDirectory() as folder:
        loaded = load.load_model(source, Path(folder))
        model = loaded.model
        loaded.weights.fill(chain(model.parameters(), model.buffers()))
    return loaded


def whole_graph(traced: TracedModel) -> Path:
    """A graph that ONNX Runtime loads: the traced one, or its copy with all weights beside it."""
    folder = traced.folder.with_name(f"{traced.folder.name}.whole")
    folder.mkdir(exist_ok=True)
    return io.whole(traced.model, folder / MODEL_FILE)
