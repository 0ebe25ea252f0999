"""What the oldest supported ONNX Runtime must compute right, and that older ones are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from iq_export.errors import EngineError
from iq_export.run.ort import OLDEST_RELEASE, open_session
from tests.run import attention

_OLDEST = ".".join(map(str, OLDEST_RELEASE))


@pytest.mark.parametrize("case", attention.CASES, ids=str)
def test_softcaps_masks_and_grouped_heads(case: attention.Case) -> None:
    assert attention.error(case) <= attention.tolerance(case)


def test_the_declared_floor_is_the_one_that_is_checked() -> None:
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"onnxruntime>={_OLDEST}; ' in declared
    assert f'"onnxruntime-gpu>={_OLDEST}"' in declared


@pytest.mark.parametrize("release", ("1.24.4", "1.26.0"))
def test_older_releases_are_refused(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", release)
    with pytest.raises(EngineError, match=rf"{release} computes .* 'onnxruntime>={_OLDEST}'"):
        open_session(Path("model.onnx"), ["CPUExecutionProvider"])


def test_a_python_without_onnxruntime_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match="not installed: pip install"):
        open_session(Path("model.onnx"), ["CPUExecutionProvider"])


@pytest.mark.heavy
@pytest.mark.parametrize(("release", "right"), ((f"{_OLDEST}.0", True), ("1.26.0", False)))
def test_the_floor_is_where_it_must_be(release: str, right: bool, tmp_path: Path) -> None:
    """Downloads two releases of ONNX Runtime, about 40 MB together."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    done = subprocess.run([*pip, str(tmp_path), f"onnxruntime=={release}"], check=False)
    if done.returncode != 0:
        pytest.skip(f"onnxruntime {release} cannot be downloaded")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    script = [sys.executable, attention.__file__]
    run = subprocess.run(
        script, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert f"ONNX Runtime {release}" in run.stdout, run.stderr
    assert (run.returncode == 0) == right, run.stdout
