"""The installed CMake package: the example finds it, builds against it and runs."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from iq_export.engine.plugin import find_cmake, find_headers, find_nvcc
from tests.runtime.conftest import SANITIZED, SOURCES, compile_, execute


def test_the_example_builds_against_the_installed_package(
    built: Path, bundle: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "prefix"
    command = [find_cmake(), "--install", built, "--prefix", prefix]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    definitions = {**SANITIZED, "CMAKE_PREFIX_PATH": str(prefix)}
    folder = compile_(SOURCES / "example", tmp_path / "example", definitions)
    done = execute([folder / "iq_example", bundle])
    assert done.code == 6  # whole, but no GPU to run it on
    assert "tiny is whole" in done.out and "built without CUDA" in done.out
    (bundle / "tokenizer.json").unlink()
    done = execute([folder / "iq_example", bundle])
    assert done.code == 7 and "tokenizer.json" in done.out
    installed = execute([prefix / "bin" / "iq_run", "--help"])
    assert installed.code == 0 and "--check" in installed.out


@pytest.fixture
def with_session(built: Path) -> Iterator[Path]:
    """The build folder with sessions while the test lasts: nothing else is compiled anew."""
    nvcc, headers = find_nvcc(), find_headers()
    if nvcc is None or headers is None:
        pytest.skip("nvcc or TensorRT's headers are missing: the session cannot be compiled")
    definitions = {
        "IQ_SESSION": "ON",
        "CMAKE_CUDA_COMPILER": str(nvcc), "TENSORRT_INCLUDE_DIR": str(headers),
        "CMAKE_CUDA_ARCHITECTURES": "86",  # one of those that it is for by default
    }  # fmt: skip
    try:
        yield compile_(SOURCES, built, definitions, "iq_run")
    finally:
        compile_(SOURCES, built, {"IQ_SESSION": "OFF"})


def test_the_session_compiles_without_a_warning(with_session: Path, bundle: Path) -> None:
    """With nvcc and TensorRT's own headers; then it also says why it cannot run here."""
    folder = with_session
    environment = {"LD_LIBRARY_PATH": "", "PATH": os.environ["PATH"]}
    done = execute(
        [folder / "iq_run", bundle, "--ids", "1", "--engine", "rtx-ampere"], **environment
    )
    assert done.code == 6 and re.search("build it with the headers|no engine", done.error)
    done = execute([folder / "iq_run", bundle, "--check"], **environment)
    assert done.code == 0
    needed = subprocess.run(
        ["ldd", folder / "libiq_runtime.so"], capture_output=True, text=True, check=True
    )
    assert "nvinfer" not in needed.stdout and "cuda" not in needed.stdout
