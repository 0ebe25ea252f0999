"""The test libraries of the plugin's sources, each compiled once per session if asked for."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from iq_export.engine.plugin import HEADERS_VARIABLE, find_headers
from tests.host import build


@pytest.fixture(scope="session")
def rows(host: ctypes.CDLL) -> ctypes.CDLL:
    """The kernels' arithmetic on the CPU."""
    return host


@pytest.fixture(scope="session")
def gpu_rows(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The same functions through the kernels."""
    folder = tmp_path_factory.mktemp("gpu-rows")
    build(folder, "iq_gpu_test", {"IQ_GPU_TESTS": "ON"})
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
    build(folder, "all", {**options, "CMAKE_BUILD_TYPE": "Debug"})
    return folder
