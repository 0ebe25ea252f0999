"""The test libraries of the plugin's sources, each compiled once per session if asked for."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from iq_export.engine.plugin import (
    HEADERS_VARIABLE,
    cmake_build,
    find_cmake,
    find_headers,
    find_nvcc,
    find_sources,
)


def _build(folder: Path, target: str, options: dict[str, str]) -> None:
    nvcc, sources = find_nvcc(), find_sources()
    if nvcc is None or sources is None or find_cmake() is None:
        pytest.skip("nvcc or cmake is missing: the plugin's sources cannot be compiled")
    # PTX of the lowest architecture, so that any GPU at hand can run the kernels.
    options = {"IQ_PLUGIN": "OFF", "IQ_WERROR": "ON", **options}
    reason = cmake_build(sources, folder, nvcc, [80], target, options)
    assert not reason, reason


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels' arithmetic on the CPU; needs CUDA's headers, but neither TensorRT nor a GPU."""
    folder = tmp_path_factory.mktemp("rows")
    _build(folder, "iq_host_test", {"IQ_TESTS": "ON"})
    return ctypes.CDLL(str(folder / "libiq_host_test.so"))


@pytest.fixture(scope="session")
def gpu_rows(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The same functions through the kernels."""
    folder = tmp_path_factory.mktemp("gpu-rows")
    _build(folder, "iq_gpu_test", {"IQ_GPU_TESTS": "ON"})
    library = ctypes.CDLL(str(folder / "libiq_gpu_test.so"))
    if not library.iq_gpu_count():
        pytest.skip("no usable GPU")
    return library


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that runs on a CPU, under AddressSanitizer and UBSan."""
    headers = find_headers()
    if headers is None:
        pytest.skip("TensorRT's headers are missing: run tools/fetch_trt_headers.py")
    folder = tmp_path_factory.mktemp("sanitized")
    options = {"IQ_TESTS": "ON", "IQ_SANITIZE": "ON", HEADERS_VARIABLE: str(headers)}
    # Little time goes into optimizing what runs for seconds.
    _build(folder, "all", {**options, "CMAKE_BUILD_TYPE": "Debug"})
    return folder
