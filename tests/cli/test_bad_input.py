"""What is wrong is said in one sentence before any work, with an exit code and nothing left."""

from __future__ import annotations

from pathlib import Path

import pytest

from iq_export.bundle.manifest import Manifest
from iq_export.cli import main
from iq_export.errors import BundleError
from iq_export.run.ort import PROVIDERS
from iq_export.work import work_folder

MODEL = "smollm2-135m"


def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *argv: str, model: str = MODEL
) -> tuple[int, str]:
    """Exit code and stderr of a compile that must fail and leave nothing."""
    before = sorted(tmp_path.rglob("*"))
    code = main(["compile", model, str(tmp_path / "out"), "--quiet", *argv])
    assert sorted(tmp_path.rglob("*")) == before
    error = capsys.readouterr().err
    assert error.startswith("iq-export: error: ")
    return code, error


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (("--recipe", "w8a9"), 2, "w8a8"),
        (("--target", "rtx-ampre"), 2, "rtx-ampere"),
        (("--minShapes", "seq:600", "--maxShapes", "seq:512"), 2, "seq"),
        (("--optShapes", "tokens:1"), 2, "tokens"),
        (("--recipe", "w4a16", "--target", "rtx-turing"), 2, "rtx-turing"),
        (("--calibration", "no-such-file.txt"), 4, "does not exist"),
        (("--opset", "17"), 2, "opset"),
        (("--opset", "22", "--dry-run"), 2, "Opset 22"),
        (("--budget", "0.99"), 2, "not above 1"),
        (("--budget", "1.005", "--recipe", "w4a16"), 2, "quantizes no activations"),
        (("--recipe", "w8a8kv4"), 2, "w8a8kv8"),
    ],
)
def test_wrong_options(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argv: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    found, error = refused(tmp_path, capsys, *argv)
    assert (found, says in error) == (code, True), error


def test_a_device_that_onnx_runtime_lacks_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROVIDERS, "cuda", ("NoSuchProvider",))
    code, error = refused(tmp_path, capsys, "--device", "cuda", "--dry-run")
    assert (code, "has no NoSuchProvider" in error) == (6, True), error


def test_a_work_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"/taken is there and is no folder"):
        (tmp_path / "taken").write_text("")
        with work_folder(tmp_path / "out", tmp_path / "taken", keep=True):
            pass


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "empty"), (b"\xff\xfe\0", "not UTF-8"), (b"\0", "NUL")]
)
def test_wrong_calibration_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, says: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    found, error = refused(tmp_path, capsys, "--calibration", str(text))
    assert (found, says in error) == (4, True), error


@pytest.mark.parametrize("model", ["smolm2-135m", "./no/such/folder", "no-such-file.gguf"])
def test_unknown_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    found, error = refused(tmp_path, capsys, model=model)
    assert found == 3, error
    assert len(error.splitlines()) <= 2


def test_corrupt_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF" + bytes(40))
    found, error = refused(tmp_path, capsys, model=str(model))
    assert found == 3, error


def test_existing_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Manifest("m", "w8a8", "fp16", 23).write(out)
    found, error = refused(tmp_path, capsys)
    assert (found, "--force" in error) == (7, True), error
