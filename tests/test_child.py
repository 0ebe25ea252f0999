"""Nothing that lies in the current folder runs: no module, no program, no library."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from iq_export import child
from iq_export.engine import plugin
from iq_export.errors import ModelError
from iq_export.model import fetch
from iq_export.run import chat_template

MARK = "ran"


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder holds modules and programs that leave a mark, and the search paths have
    the empty entries that a shell's `$X:$Y` makes. Where the mark would be."""
    mark = tmp_path / MARK
    folder = tmp_path / "here"
    folder.mkdir()
    for name in ("pip", "json", "jinja2", "onnx", "iq_export", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    for name in ("cmake", "nvcc", "ninja", "c++"):
        (folder / name).write_text(f"#!/bin/sh\n: > '{mark}'\n")
        (folder / name).chmod(0o755)
    monkeypatch.chdir(folder)
    for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, f":{os.environ.get(name, '')}:")
    return mark


def test_search_paths_are_absolute(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "lib::/usr/lib")
    monkeypatch.setenv("LD_LIBRARY_PATH", ":")
    monkeypatch.setenv("PIP_FIND_LINKS", "pip.py https://index.example")
    found = child.environment()
    assert found["PYTHONPATH"] == f"{Path.cwd() / 'lib'}:/usr/lib"
    assert "LD_LIBRARY_PATH" not in found and not found["PATH"].startswith(":")
    assert found["PIP_FIND_LINKS"] == f"{Path.cwd() / 'pip.py'} https://index.example"
    package = child.environment(package=True)["PYTHONPATH"]
    assert package.startswith(f"{Path(child.__file__).parents[1]}:")


def test_a_download_runs_the_pip_that_is_installed(
    trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match="Cannot download no-such-thing"):
        fetch._download("no-such-thing==1.0", tmp_path)
    assert not trap.exists()


def test_a_chat_template_runs_this_package(trap: Path) -> None:
    assert chat_template.render("{{ messages[0].content }}", [{"content": "hi"}], {}, "m") == "hi"
    assert not trap.exists()


def test_a_build_runs_this_package(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from iq_export.engine import build

    with Path(os.devnull).open("w") as nowhere, build._worker(nowhere) as process:
        process.communicate("{}")
    assert process.returncode == 1 and not trap.exists()


def test_programs_are_not_looked_for_here(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    here = Path.cwd()
    found = (plugin.find_cmake(), plugin.find_nvcc(), child.find_program("ninja"))
    assert all(program is None or program.parent != here for program in found)
    monkeypatch.setenv("CUDACXX", "./nvcc")  # unless it is named
    assert plugin.find_nvcc() == here / "nvcc"
