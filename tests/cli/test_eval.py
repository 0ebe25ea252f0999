"""eval measures, stores the table in the manifest and renews the report."""

from __future__ import annotations

import errno
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from iq_export.bundle.package import Bundle, update_manifest
from iq_export.calibrate.data import text_sha256
from iq_export.cli import main
from iq_export.cli.eval import build_references
from iq_export.errors import UsageError
from iq_export.progress import Progress
from tests.test_disk import largest_file

SMALL = ("--windows", "2", "--length", "16", "--bundle-only")


def test_table_goes_into_manifest_and_report(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(bundle), *SMALL]) == 0
    assert "2 windows x 16 tokens of builtin-heldout" in capsys.readouterr().out
    accuracy = Bundle.open(bundle).manifest.accuracy
    assert accuracy is not None
    assert [(r["graph"], r["bos"]) for r in accuracy["rows"]] == [
        ("bundle (w8a8)", True),
        ("bundle (w8a8)", False),
    ]
    assert "bundle (w8a8)" in (bundle / "report.html").read_text(encoding="utf-8")


def test_references_and_timing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    reference = tmp_path / "fp32.onnx"
    reference.write_bytes(b"graph")
    monkeypatch.setattr(
        "iq_export.cli.eval.build_references", lambda *_: {"fp32": reference}, raising=True
    )
    assert main(["eval", str(bundle), "--windows", "2", "--length", "16", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {row["graph"] for row in document["rows"]} == {"fp32", "bundle (w8a8)"}
    assert all(row["ratio"] == pytest.approx(1) for row in document["rows"])
    assert document["speed"]["length"] == 512
    assert Bundle.open(bundle).manifest.speed is not None


def test_broken_bundle_is_exit_code_5_and_recorded(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle / "model.onnx").write_bytes(b"nan")
    update_manifest(Bundle.open(bundle, verify=False), rehash=["model.onnx"])
    assert main(["eval", str(bundle), *SMALL]) == 5
    assert "NaN" in capsys.readouterr().err
    assert Bundle.open(bundle).manifest.accuracy["rows"][0]["error"]


def test_text_too_short(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a few words")
    assert main(["eval", str(bundle), *SMALL, "--text", str(text)]) == 4
    assert "one window needs 16" in capsys.readouterr().err


def test_calibration_text_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever its file lies now, on this machine or on another."""
    text = tmp_path / "copy.txt"
    text.write_text("what it was calibrated on")
    recorded = {
        "calibration": "/elsewhere.txt",
        "calibration_sha256": text_sha256(text.read_text()),
    }
    update_manifest(Bundle.open(bundle), options=recorded)
    assert main(["eval", str(bundle), *SMALL, "--text", str(text)]) == 2
    assert "was used for calibration" in capsys.readouterr().err
    text.write_text("another text")
    assert main(["eval", str(bundle), *SMALL, "--text", str(text)]) == 4  # too short, but taken


def test_a_light_install_is_told_what_it_cannot_compare_with(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = {"torch"}
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in absent else find(name)
    )
    with pytest.raises(UsageError, match="--bundle-only"):
        build_references(Bundle.open(bundle), None, Progress(quiet=True))


@pytest.mark.parametrize(
    "problem", [OSError(errno.EROFS, "Read-only file system", "x"), PermissionError(13, "Denied")]
)
def test_a_bundle_that_may_not_be_written_is_measured_all_the_same(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    problem: OSError,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr("iq_export.cli.eval.update_with_report", fail)
    assert main(["eval", str(bundle), *SMALL, "-q"]) == 0
    printed = capsys.readouterr()
    assert "bundle (w8a8)" in printed.out
    note = f"the figures could not be kept: {bundle} may not be written"
    assert printed.err == f"iq-export: note: {note}\n"


def test_a_full_disk_is_an_error_under_the_table(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with largest_file(0):
        assert main(["eval", str(bundle), *SMALL, "-q"]) == 7
    printed = capsys.readouterr()
    assert "bundle (w8a8)" in printed.out and "larger than is allowed" in printed.err
    Bundle.open(bundle)
