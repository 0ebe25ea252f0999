"""`iq-export package --triton`: one line or one document, and the exit codes of what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from iq_export.cli import main
from tests.triton import parse_config, report, write_bundle


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A bundle with an enterprise engine; building one needs its GPU."""
    return write_bundle(tmp_path / "out", report())


def test_model_is_written_and_found_again(
    served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["package", "--triton", str(served), str(tmp_path / "repo"), "-q"]
    assert main(arguments) == 0
    folder = tmp_path / "repo" / "tiny"
    assert f"{folder}: written, backend tensorrt" in capsys.readouterr().out
    assert parse_config(folder).name == "tiny"
    assert main(arguments) == 0
    assert "there already, the same" in capsys.readouterr().out


def test_json(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["package", "--triton", str(served), str(tmp_path / "repo"), "--json"]
    assert main([*arguments, "--backend", "onnxruntime", "--name", "graph"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "model": "graph",
        "backend": "onnxruntime",
        "folder": str(tmp_path / "repo" / "graph"),
        "files": ["1/model.onnx", "1/model.onnx.data", "README.md", "config.pbtxt"],
        "options": [],
        "written": True,
    }


def test_a_damaged_bundle_is_refused(
    served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (served / "engines" / "h100.plan").write_bytes(b"plan of h10O")
    assert main(["package", "--triton", str(served), str(tmp_path / "repo")]) == 7
    assert "engines/h100.plan" in capsys.readouterr().err
    assert not (tmp_path / "repo").exists()


def test_exit_codes(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repo = str(tmp_path / "repo")
    assert main(["package", "--triton", str(served), repo, "--target", "orin"]) == 2
    rtx = write_bundle(tmp_path / "rtx", report("rtx-ada", flavour="tensorrt_rtx"))
    assert main(["package", "--triton", str(rtx), repo]) == 6
    assert "plan of TensorRT for RTX" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["package", str(served), repo])
    assert stop.value.code == 2
    assert "--triton" in capsys.readouterr().err
    assert not (tmp_path / "repo").exists()
