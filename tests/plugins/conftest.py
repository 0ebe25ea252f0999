"""The test library of the kernels' arithmetic, compiled once per session."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from iq_export.engine.plugin import cmake_build, find_cmake, find_nvcc, find_sources


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """plugins/test/rows_test.cu; needs nvcc and cmake, but neither TensorRT nor a GPU."""
    nvcc, sources = find_nvcc(), find_sources()
    if nvcc is None or sources is None or find_cmake() is None:
        pytest.skip("nvcc or cmake is missing: the kernels' arithmetic cannot be compiled")
    folder: Path = tmp_path_factory.mktemp("rows")
    options = {"IQ_PLUGIN": "OFF", "IQ_TESTS": "ON", "IQ_WERROR": "ON"}
    # PTX of the lowest architecture, so that any GPU at hand can run the kernels.
    reason = cmake_build(sources, folder, nvcc, [80], "iq_rows_test", options)
    assert not reason, reason
    return ctypes.CDLL(str(folder / "libiq_rows_test.so"))
