"""Compiles the test libraries of the plugin's sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from iq_export.engine.plugin import cmake_build, find_cmake, find_nvcc, find_sources


def build(folder: Path, target: str, options: dict[str, str]) -> None:
    nvcc, sources = find_nvcc(), find_sources()
    if nvcc is None or sources is None or find_cmake() is None:
        pytest.skip("nvcc or cmake is missing: the plugin's sources cannot be compiled")
    # PTX of the lowest architecture, so that any GPU at hand can run the kernels.
    options = {"IQ_PLUGIN": "OFF", "IQ_WERROR": "ON", **options}
    reason = cmake_build(sources, folder, nvcc, [80], target, options)
    assert not reason, reason
