"""verify finds changed files and graphs that do not compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from iq_export.bundle.package import Bundle, update_manifest
from iq_export.cli import main


def test_whole_bundle(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == 3
    assert main(["verify", str(bundle), "-q"]) == 0
    streams = capsys.readouterr()
    assert "3 files" in streams.out
    assert streams.err == ""


def test_changed_file(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "plan.json").write_text("[]")
    assert main(["verify", str(bundle)]) == 7
    assert "plan.json" in capsys.readouterr().err


def test_graph_that_gives_nan(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "model.onnx").write_bytes(b"nan")
    update_manifest(Bundle.open(bundle, verify=False), rehash=["model.onnx"])
    assert main(["verify", str(bundle)]) == 5
    assert "prefill" in capsys.readouterr().err
