"""A tiny bundle on disk whose model is a fake: commands are tested without ONNX Runtime."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iq_export.bundle.manifest import TensorInfo, record_files
from iq_export.bundle.package import Bundle, atomic_folder, update_manifest
from iq_export.run.ort import Step
from tests import lookup
from tests.tiny_bundle import engine_record, fill, manifest

VOCAB = 50


class FakeModel:
    """Logits depend on the current token; a file whose content is `nan` gives NaN."""

    vocab_size, num_layers = VOCAB, 2
    embedding_rows = VOCAB

    def __init__(self, path: Path, **_: Any) -> None:
        self.table = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32)
        if path.read_bytes() == b"nan":
            self.table[:] = np.nan

    def forward(self, ids: np.ndarray, *_: Any, **__: Any) -> Step:
        return Step(self.table[ids % VOCAB], [])


class FakeTokenizer:
    """One token per word; its id is the word's length."""

    bos_id = 1

    def __init__(self, folder: Path) -> None:
        pass

    def encode(self, text: str, add_bos: bool) -> list[int]:
        return [len(word) % VOCAB for word in text.split()]


@pytest.fixture(scope="session")
def export_once(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., int | None]:
    """For the place of a trace's `_export`: torch exports `tiny_model`, in seven seconds, once."""
    from iq_export.model.trace import MODEL_FILE, _export

    kept, layers = tmp_path_factory.mktemp("exported"), dict[bool, int | None]()

    def export(model: Any, weights: Any, folder: Path, opset: int, short_cut: bool) -> int | None:
        place = weights.place(model.get_input_embeddings().weight)
        assert place.folder == tiny_model
        graph, copy = folder / MODEL_FILE, kept / str(short_cut)
        if short_cut in layers:
            if copy.exists():  # the short cut may not be possible
                shutil.copy(copy, graph)
        else:
            layers[short_cut] = _export(model, weights, folder, opset, short_cut)
            if graph.exists():
                shutil.copy(graph, copy)
        return layers[short_cut]

    return export


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete bundle folder; `CausalLM` and `Tokenizer` are the fakes above."""
    monkeypatch.setattr("iq_export.run.ort.CausalLM", FakeModel)
    monkeypatch.setattr("iq_export.run.generate.Tokenizer", FakeTokenizer)
    monkeypatch.setattr("iq_export.evaluate.final_check.finite_values", lambda path, ids: len(ids))
    out = tmp_path / "bundle"
    with atomic_folder(out) as folder:
        (folder / "model.onnx").write_bytes(b"graph")
        (folder / "plan.json").write_text("{}")
        (folder / "report.html").write_text("old")
        (folder / "engines").mkdir()
        with (folder / "engines" / "rtx-ampere.plan").open("wb") as plan:
            plan.truncate(2_500_000)
        files = record_files(fill(folder))
        manifest(
            name="tiny",
            recipe="w8a8",
            dtype="float16",
            opset=23,
            options={"calibration": "builtin"},
            inputs=[
                TensorInfo("input_ids", "int64", ["batch", "seq"]),
                TensorInfo("past_key_values.0.key", "float16", ["batch", 3, "past", 64]),
                TensorInfo("past_key_values.1.key", "float16", ["batch", 3, "past", 64]),
            ],
            targets=["rtx-ampere"],
            engines={"rtx-ampere": engine_record(
                **asdict(files["engines/rtx-ampere.plan"]), plugin_layers=0, seconds=12.3,
                form_reason="no plugin: nvcc was not found.",
            )},
            lifecycles=[{"birth": 11, "death": 29}],
            timings={"trace": 82.0},
            peak_rss_bytes=3_200_000_000,
            notes=["one note"],
            files=files,
        ).write(folder)  # fmt: skip
    return out


def runnable(bundle: Path) -> Path:
    """Make a graph that runs of the bundle's model."""
    path = lookup.save(bundle / "model.onnx", np.random.default_rng(0).normal(size=(VOCAB, VOCAB)))
    update_manifest(Bundle.open(bundle, verify=False), rehash=["model.onnx"])
    return path
