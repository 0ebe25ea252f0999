"""The CMake side: where TensorRT's headers are found, and what an installed plugin gives others."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from iq_export.engine.plugin import (
    HEADER,
    HEADERS_VARIABLE,
    PluginBuild,
    find_cmake,
    find_headers,
    find_nvcc,
    find_sources,
)

_LOOK = """
cmake_minimum_required(VERSION 3.22)
project(look LANGUAGES NONE)
set(TENSORRT_INCLUDE_DIR "" CACHE PATH "")
include({module})
message(STATUS "found=${{TensorRTHeaders_FOUND}} in=${{TENSORRT_INCLUDE_DIR}}.")
"""

_CONSUMER = """
cmake_minimum_required(VERSION 3.22)
project(consumer LANGUAGES CXX)
find_package(iq_plugins 1 REQUIRED)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE iq::iq_plugins)
"""

_MAIN = """
#include <cstdint>
#include <cstdio>
extern "C" void* const* getCreators(std::int32_t& count);
int main()
{
    std::int32_t count = 0;
    getCreators(count);
    std::printf("%d creators", count);
}
"""


def _cmake(*arguments: object, environment: dict[str, str] | None = None) -> str:
    cmake = find_cmake()
    if cmake is None:
        pytest.skip("cmake is missing")
    command = [str(cmake), *map(str, arguments)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **environment}
        if environment else None,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("definition", "variable"),
    [("TENSORRT_INCLUDE_DIR", ""), ("TensorRT_ROOT", ""), ("TENSORRT_ROOT", ""),
     ("", "TENSORRT_INCLUDE_DIR"), ("", "TensorRT_ROOT"), ("", "TENSORRT_ROOT"), ("", "TRT_ROOT")],
)  # fmt: skip
def test_headers_are_found(tmp_path: Path, definition: str, variable: str) -> None:
    include = tmp_path / "sdk" / "include"
    include.mkdir(parents=True)
    (include / HEADER).touch()
    given = include if "INCLUDE" in definition + variable else include.parent
    assert f"found=TRUE in={include}." in _look(tmp_path, given, definition, variable)


def test_no_other_folder_is_taken_for_the_one_that_is_named(tmp_path: Path) -> None:
    words = _look(tmp_path, tmp_path / "empty", "TENSORRT_INCLUDE_DIR", "")
    assert f"found=FALSE in={tmp_path / 'empty'}." in words


def _look(tmp_path: Path, given: Path, definition: str, variable: str) -> str:
    sources = find_sources()
    assert sources is not None
    module = sources / "cmake" / "FindTensorRTHeaders.cmake"
    (tmp_path / "CMakeLists.txt").write_text(_LOOK.format(module=module))
    options = [f"-D{definition}={given}"] if definition else []
    environment = {variable: str(given)} if variable else None
    return _cmake(
        "-S", tmp_path, "-B", tmp_path / "build", *options, environment=environment
    )  # fmt: skip


def test_find_package(plugin: PluginBuild, tmp_path: Path) -> None:
    nvcc, headers = find_nvcc(), find_headers()
    assert plugin.path is not None
    built, prefix, consumer = (tmp_path / name for name in ("built", "prefix", "consumer"))
    options = [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-D{HEADERS_VARIABLE}={headers}"]
    _cmake("-S", find_sources(), "-B", built, *options, "-DCMAKE_CUDA_ARCHITECTURES=86")
    shutil.copy(plugin.path, built)  # what this folder would be compiled to
    _cmake("--install", built, "--prefix", prefix)
    consumer.mkdir()
    (consumer / "CMakeLists.txt").write_text(_CONSUMER)
    (consumer / "main.cpp").write_text(_MAIN)
    folder = tmp_path / "out"
    _cmake("-S", consumer, "-B", folder, f"-DCMAKE_PREFIX_PATH={prefix}")
    _cmake("--build", folder)
    words = subprocess.run([folder / "consumer"], check=True, capture_output=True, text=True)
    assert words.stdout == "11 creators"
