"""eval measures, stores the table in the manifest and renews the report."""

from __future__ import annotations

import errno
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iq_export import references
from iq_export.bundle.package import Bundle, update_manifest
from iq_export.cli import main
from iq_export.cli.eval import build_references
from iq_export.compile import CompileOptions
from iq_export.errors import BundleError, UsageError
from iq_export.observe.samples import text_sha256
from iq_export.progress import Progress
from tests import lookup
from tests.cli.conftest import VOCAB, runnable
from tests.test_disk import largest_file

SMALL = ("--windows", "2", "--length", "16", "--bundle-only")


@pytest.fixture(autouse=True)
def model(bundle: Path) -> Path:
    """The bundle's model is a graph that runs."""
    return runnable(bundle)


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
    bundle: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    reference = tmp_path / "fp32.onnx"
    shutil.copy(model, reference)
    monkeypatch.setattr(
        "iq_export.cli.eval.build_references", lambda *_, **__: {"fp32": reference}, raising=True
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
    lookup.save(bundle / "model.onnx", np.full((VOCAB, VOCAB), np.nan))
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


CODE = """
from pathlib import Path
Path({mark!r}).write_text("ran")
"""


@pytest.fixture
def with_code(bundle: Path, tmp_path: Path) -> Path:
    """The bundle as somebody else sealed it: its model is a folder in it that brings code, which
    the recorded options permit. Where that code would leave its mark."""
    mark, model = tmp_path / "ran", bundle / "model"
    model.mkdir()
    names = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (model / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": names}))
    (model / "theirs.py").write_text(CODE.format(mark=str(mark)))
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    options = {"model": str(model), "trust_remote_code": True, "accept_terms": True}
    update_manifest(Bundle.open(bundle), options=options)
    return mark


def test_a_manifest_permits_no_code(
    bundle: Path, with_code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    assert main(["eval", str(bundle), "--windows", "2", "--length", "16"]) == 3
    assert "comes with its own Python code" in capsys.readouterr().err
    assert not with_code.exists()


def test_what_permits_comes_from_the_command_line(
    bundle: Path, with_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    asked: list[CompileOptions] = []

    def check(options: CompileOptions) -> None:
        asked.append(options)
        raise UsageError("far enough")

    monkeypatch.setattr(references, "check", check)
    for flags in ([], ["--trust-remote-code"], ["--accept-terms"]):
        assert main(["eval", str(bundle), *flags]) == 2
    permitted = [(options.trust_remote_code, options.accept_terms) for options in asked]
    assert permitted == [(False, False), (True, False), (False, True)]


def test_only_what_makes_the_references_is_read_from_a_manifest(
    bundle: Path, tmp_path: Path
) -> None:
    def options(**recorded: object) -> CompileOptions:
        changed = update_manifest(Bundle.open(bundle), options=recorded)
        return references._options_of(changed, tmp_path / "work")

    found = options(model="org/name", seed=3, force=True, out="/elsewhere", plugin="on", alpha=1)
    assert (found.model, found.seed, found.force, found.plugin) == ("org/name", 3, False, "auto")
    assert found.out == bundle and found.work == tmp_path / "work"
    for wrong in ({}, {"model": 1}, {"model": "m", "seed": "3"}, {"model": "m", "length": True}):
        with pytest.raises(BundleError, match="--bundle-only"):
            options(**wrong)
