"""Compilers for other machines than this one; what they lack comes from PyPI and Debian.

Tests that need them are `heavy`, and skip with the reason where a part is not to be had.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from iq_export.engine.plugin import find_nvcc, find_sources

CUDA_12 = (
    "nvidia-cuda-nvcc-cu12==12.6.85",
    "nvidia-cuda-runtime-cu12==12.6.77",
    "nvidia-cuda-cccl-cu12==12.6.77",
    "nvidia-curand-cu12==10.3.7.77",  # clang includes one header of it
)
_RUN = ("qemu-aarch64-static", "qemu-aarch64")


def aarch64(folder: Path) -> dict[str, str]:
    """CMake definitions that cross-compile for aarch64; `folder` gets a CUDA with its libraries."""
    for command in ("aarch64-linux-gnu-g++", "readelf"):
        if shutil.which(command) is None:
            pytest.skip(f"{command} is missing: apt-get install g++-aarch64-linux-gnu")
    nvcc, sources = find_nvcc(), find_sources()
    if nvcc is None or sources is None:
        pytest.skip("nvcc is missing")
    # find_nvcc may give a script beside which there is nothing.
    said = _output([nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"])
    here = re.search(r"TOP=(.*)", said)
    version = re.search(r"release (\d+)\.(\d+)", _output([nvcc, "--version"]))
    if here is None or version is None:
        pytest.skip(f"'{nvcc}' does not say where its toolkit and which its version is")
    major, minor = version.groups()
    if int(major) < 13:
        pytest.skip(f"PyPI has no static CUDA runtime {major}.{minor} for aarch64")
    top, cuda = Path(here.group(1)).resolve(), folder / "cuda"
    libraries = _unpack(
        (f"nvidia-cuda-runtime=={major}.{minor}.*",), folder, "--platform", "manylinux2014_aarch64"
    ) / "nvidia" / f"cu{major}" / "lib"  # fmt: skip
    (libraries / "libcudart.so").symlink_to(f"libcudart.so.{major}")
    target = cuda / "targets" / "aarch64-linux"
    target.mkdir(parents=True)
    for part in ("include", "nvvm"):
        (cuda / part).symlink_to(top / part)
    (cuda / "bin").mkdir()  # a folder: nvcc looks for the rest in `bin/..`
    for command in (top / "bin").iterdir():
        if command.name != "nvcc":
            (cuda / "bin" / command.name).symlink_to(command)
    shutil.copy(top / "bin" / "nvcc", cuda / "bin")  # CMake follows links to find its toolkit
    (target / "include").symlink_to(top / "include")
    (target / "lib").symlink_to(libraries)
    return {
        "CMAKE_TOOLCHAIN_FILE": str(sources / "cmake" / "aarch64.cmake"),
        "CMAKE_CUDA_COMPILER": str(cuda / "bin" / "nvcc"),
        "CMAKE_CUDA_ARCHITECTURES": "87-real;110",  # Orin, Thor
        "IQ_WERROR": "ON",
    }


def aarch64_openssl(folder: Path) -> tuple[dict[str, str], Path]:
    """CMake definitions of OpenSSL for aarch64 in `folder`, and where its libraries lie."""
    scratch = folder / "debs"
    scratch.mkdir()
    command = ["apt-get", "download", "-q", "libssl-dev:arm64", "libssl3:arm64"]
    if (
        shutil.which(command[0]) is None
        or subprocess.run(command, cwd=scratch, capture_output=True, check=False).returncode
    ):
        pytest.skip("no libssl-dev:arm64: dpkg --add-architecture arm64 && apt-get update")
    for package in scratch.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(folder / "root")], check=True)
    usr = folder / "root" / "usr"
    libraries = usr / "lib" / "aarch64-linux-gnu"
    return {
        "OPENSSL_CRYPTO_LIBRARY": str(libraries / "libcrypto.so"),
        "OPENSSL_SSL_LIBRARY": str(libraries / "libssl.so"),
        "OPENSSL_INCLUDE_DIR": str(usr / "include"),
        "CMAKE_CXX_FLAGS": f"-isystem {usr / 'include' / 'aarch64-linux-gnu'}",
    }, libraries


def run_aarch64(command: Sequence[object], libraries: Sequence[Path] = ()) -> str:
    """What a program for aarch64 prints, under QEMU; fails the test if it fails."""
    emulator = next(filter(None, map(shutil.which, _RUN)), None)
    if emulator is None:
        pytest.skip("QEMU is missing: apt-get install qemu-user-static")
    paths = ":".join(map(str, libraries))
    words = [emulator, "-L", "/usr/aarch64-linux-gnu", "-E", f"LD_LIBRARY_PATH={paths}", *command]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def machine(path: Path) -> str:
    """The processor that an ELF file is for."""
    found = re.search(r"Machine:\s*(\S+)", _output(["readelf", "--file-header", path]))
    assert found, path
    return found.group(1)


def cuda_12(folder: Path) -> Path:
    """CUDA 12.6 without nvcc, which PyPI lacks: headers, ptxas, libdevice. For clang."""
    wheels = _unpack(CUDA_12, folder) / "nvidia"
    cuda = folder / "cuda-12.6"
    for part in ("cuda_runtime", "cuda_cccl", "curand", "cuda_nvcc"):
        shutil.copytree(wheels / part, cuda, dirs_exist_ok=True)
    (cuda / "bin" / "ptxas").chmod(0o755)
    return cuda


def find_clang() -> str:
    """A clang that knows CUDA 12."""
    for version in range(25, 17, -1):
        if found := shutil.which(f"clang++-{version}"):
            return found
    pytest.skip("no clang of version 18 or later: apt-get install clang-19")


def _unpack(requirements: Sequence[str], folder: Path, *options: str) -> Path:
    """The contents of wheels, none of which is installed."""
    wheels, out = folder / "wheels", folder / "unpacked"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
    command += ["--only-binary", ":all:", *options, *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot fetch {', '.join(requirements)}: {done.stderr[-300:]}")
    for wheel in wheels.glob("*.whl"):
        shutil.unpack_archive(wheel, out, format="zip")
    return out


def _output(command: Sequence[object]) -> str:
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
