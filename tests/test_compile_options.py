"""What a manifest of an older version says is understood, and holds for what is made again; what no
compile takes is refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from iq_export import references
from iq_export.bundle.manifest import FileRecord, Manifest
from iq_export.errors import DataError, ModelError, UsageError
from iq_export.options import record
from iq_export.progress import Progress

compile_module = importlib.import_module("iq_export.compile")


def test_options_of_an_older_manifest(tmp_path: Path) -> None:
    """`--alpha` is gone; bundles that name it can still be evaluated."""
    recorded = {
        "model": "smollm2-135m", "recipe": "w8a8", "calibration": "builtin", "samples": 4,
        "length": 64, "opset": 23, "dtype": "fp16", "seed": 0, "device": "cpu",
        "max_relative_deviation": 0.1, "alpha": 64.0, "insertion": "auto", "budget": None,
        "trust_remote_code": False, "calibration_sha256": "0" * 64,
    }  # fmt: skip
    bundle = SimpleNamespace(folder=tmp_path, manifest=SimpleNamespace(options=recorded))
    options = references._options_of(bundle, tmp_path / "work")
    assert (options.samples, options.length, options.work) == (4, 64, tmp_path / "work")
    assert "alpha" not in record(options)
    assert recorded["alpha"] == 64.0


def test_a_seed_that_no_generator_takes(tmp_path: Path) -> None:
    """It would fail after minutes, at the first draw."""
    with pytest.raises(UsageError, match="seed -1 must not be negative"):
        compile_module.dry_run(
            compile_module.CompileOptions("smollm2-135m", tmp_path / "out", seed=-1)
        )


@dataclass(frozen=True)
class Rewritten:
    """What calibrating gives, as far as it counts here."""

    traced: Path | None = None
    sinks: tuple[()] = ()


@pytest.fixture
def rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Make the references of a bundle again, up to its quantization; returns what was said."""

    def run(*, model: str = "same", text: str = "same", name: str = "c.txt") -> list[str]:
        recorded = {"model": "m", "calibration": name, "calibration_sha256": "same"}
        manifest = Manifest(
            "m", "w8a8", "float16", 23, source={"model": "m", "sha256": "same"}, options=recorded,
            files={"plan.json": FileRecord(1, "plan")},
        )  # fmt: skip
        checked = SimpleNamespace(calibration_sha256=text, recipe=None)
        monkeypatch.setattr(references, "check", lambda options: checked)
        traced = SimpleNamespace(source_sha256=model)
        monkeypatch.setattr(references, "trace_model", lambda *args: traced)
        done = Rewritten()
        monkeypatch.setattr(references, "calibrate_and_rewrite", lambda *args: done)
        monkeypatch.setattr(references, "_hold", lambda *args: tmp_path / "model.onnx")
        monkeypatch.setattr("iq_export.baselines.baselines", lambda done: {})
        said: list[str] = []
        progress = Progress(quiet=True)
        monkeypatch.setattr(progress, "note", said.append)
        bundle = SimpleNamespace(folder=tmp_path / "out", manifest=manifest, plan=dict)
        references.reference_graphs(bundle, tmp_path / "work", progress)
        return said

    return run


def test_a_text_from_a_pipe_is_not_read_from_this_runs_pipes(
    rebuilt: Callable[..., list[str]],
) -> None:
    with pytest.raises(DataError, match=r"out came from a pipe and cannot be read again: .*only"):
        rebuilt(name="/dev/fd/63")


def test_a_bundle_is_not_compared_with_another_model(rebuilt: Callable[..., list[str]]) -> None:
    with pytest.raises(
        ModelError, match=r"m is not what .*out was made of: its files have changed"
    ):
        rebuilt(model="other")
    assert len(rebuilt()) == 1


def test_another_calibration_text_is_said(rebuilt: Callable[..., list[str]]) -> None:
    assert "the calibration text c.txt has changed" in rebuilt(text="other")[1]
