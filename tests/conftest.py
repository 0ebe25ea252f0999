"""Fixtures for the whole suite. The real model is compiled once per session, by the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MODEL = "smollm2-135m"


@pytest.fixture(scope="session")
def smollm2_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M compiled to W8A8 for one target, as a user does it. Tests must not write in it.

    The work folder with the other graphs stands beside it as `work`.
    """
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "iq_export.cli", "compile", MODEL, str(folder / "bundle"),
               "--recipe", "w8a8", "--target", "rtx-ampere", "--keep-work",
               "--work", str(folder / "work")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"compile of {MODEL} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return folder / "bundle"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests, with the reason, where there is no GPU."""
    from iq_export.engine.trt import device_compute_capability

    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and device_compute_capability() is None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))
