"""What a manifest of an older version says is understood, and what no compile takes is refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from iq_export.errors import UsageError

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
    options = compile_module._options_of(bundle, tmp_path / "work")
    assert (options.samples, options.length, options.work) == (4, 64, tmp_path / "work")
    assert "alpha" not in compile_module._option_record(options)
    assert recorded["alpha"] == 64.0


def test_a_seed_that_no_generator_takes(tmp_path: Path) -> None:
    """It would fail after minutes, at the first draw."""
    with pytest.raises(UsageError, match="seed -1 must not be negative"):
        compile_module.dry_run(
            compile_module.CompileOptions("smollm2-135m", tmp_path / "out", seed=-1)
        )
