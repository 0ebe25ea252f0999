"""The plugin's sources under other compilers: for aarch64, CUDA 12.6 as on JetPack 6, libFuzzer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from iq_export.engine.plugin import (
    HEADERS_VARIABLE,
    cmake_build,
    find_headers,
    find_nvcc,
    find_sources,
)
from tests import toolchains
from tests.runtime.conftest import compile_

pytestmark = pytest.mark.heavy
SOURCES = find_sources()
WARNINGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]


@pytest.fixture(scope="module")
def headers() -> Path:
    found = find_headers()
    if found is None:
        pytest.skip("TensorRT's headers are missing: run tools/fetch_trt_headers.py")
    return found


def test_aarch64(headers: Path, tmp_path: Path) -> None:
    """Linked whole (--no-undefined); what runs on a CPU runs under QEMU."""
    definitions = {**toolchains.aarch64(tmp_path), HEADERS_VARIABLE: str(headers), "IQ_TESTS": "ON"}
    assert SOURCES is not None
    folder = compile_(SOURCES, tmp_path / "build", definitions)
    assert toolchains.machine(folder / "libiq_plugins.so") == "AArch64"
    said = toolchains.run_aarch64([folder / "iq_plugin_test"])
    assert said.splitlines()[-1] == "0 failures"
    assert toolchains.run_aarch64([folder / "iq_fuzz_creators", 2000, 1]).startswith("2000 runs")


@pytest.mark.parametrize(
    "name",
    ["src/kernels.cu", "runtime/src/choose_kernels.cu", "runtime/src/step_kernels.cu"],
)
def test_cuda_12_kernels(tmp_path: Path, name: str) -> None:
    """clang compiles them against its headers, its ptxas assembles them."""
    clang = toolchains.find_clang()
    cuda = toolchains.cuda_12(tmp_path)
    assert SOURCES is not None
    for side in (["--cuda-host-only"], *(
        ["--cuda-device-only", f"--cuda-gpu-arch=sm_{sm}"] for sm in (75, 80, 86, 87, 89, 90)
    )):  # fmt: skip
        command = [clang, "-x", "cuda", f"--cuda-path={cuda}", *side, "-O2", *WARNINGS,
                   "-Wno-unknown-cuda-version", f"-I{SOURCES / 'include'}", "-c",
                   str(SOURCES / name), "-o", str(tmp_path / "out.o")]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(side)}: {done.stderr[-2000:]}"


def test_cuda_12_host(headers: Path, tmp_path: Path) -> None:
    assert SOURCES is not None
    cuda = toolchains.cuda_12(tmp_path)
    session = [SOURCES / "runtime" / "src" / name for name in ("engine.cpp", "text_session.cpp")]
    sources = [*(SOURCES / "src").glob("*.cpp"), *session]
    assert len(sources) > 5
    for source in sources:
        command = ["c++", *WARNINGS, f"-I{SOURCES / 'include'}", f"-I{SOURCES / 'runtime/include'}",
                   "-isystem", str(headers), "-isystem", str(cuda / "include"),
                   "-fsyntax-only", str(source)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{source.name}: {done.stderr[-2000:]}"


def test_creators_under_libfuzzer(headers: Path, tmp_path: Path) -> None:
    """With clang the seeded driver of `make test` is a coverage-guided one, bounded in runs."""
    assert SOURCES is not None
    clang, nvcc = toolchains.find_clang(), find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is missing: CMake finds CUDA's headers by it")
    folder, corpus = tmp_path / "build", tmp_path / "corpus"
    corpus.mkdir()
    options = {"IQ_PLUGIN": "OFF", "IQ_TESTS": "ON", "IQ_SANITIZE": "ON",
               "CMAKE_BUILD_TYPE": "Debug", "CMAKE_CXX_COMPILER": clang,
               HEADERS_VARIABLE: str(headers)}  # fmt: skip
    reason = cmake_build(SOURCES, folder, nvcc, [86], "iq_fuzz_creators", options)
    if "libclang_rt" in reason:
        pytest.skip("clang's runtime is missing: apt-get install libclang-rt-19-dev")
    assert reason == ""
    command = [str(folder / "iq_fuzz_creators"), "-runs=200000", "-seed=1", str(corpus)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done 200000 runs" in done.stderr
