"""The plugin's kernels compiled for one architecture and taken apart again."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from iq_export.child import find_program
from iq_export.errors import EngineError
from tools.kernel_table.sass import Kernel, parse

# As plugins/CMakeLists.txt and cmake/Defaults.cmake have CMake do it for a release.
_FLAGS = ("-O3", "-DNDEBUG", "-std=c++17", "-Xptxas=-v", "-cubin")


@dataclass(frozen=True)
class Compiled:
    """A kernel, demangled by name, with what ptxas says of it (bytes)."""

    code: Kernel
    registers: int
    spilled: int
    stack: int
    shared: int


def command(nvcc: str, plugins: str, architecture: str, cubin: str) -> list[str]:
    return [
        nvcc, *_FLAGS, f"-arch={architecture}", f"-I{plugins}/include",
        f"{plugins}/src/kernels.cu", "-o", cubin,
    ]  # fmt: skip


def find_nvdisasm(nvcc: Path) -> Path | None:
    """On PATH, beside nvcc, or in the wheel nvidia-cuda-nvdisasm."""
    wheels = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvdisasm")
    for candidate in ("nvdisasm", nvcc.resolve().parent / "nvdisasm", *sorted(wheels)):
        found = find_program(str(candidate))
        if found:
            return found
    return None


def version_of(program: Path) -> str:
    """As 13.0.88. Raises EngineError where it does not say."""
    found = re.search(r"\bV(\d+\.\d+\.\d+)", _output([str(program), "--version"]))
    if found is None:
        raise EngineError(f"'{program} --version' does not say which version it is.")
    return found[1]


def compiled(plugins: Path, architecture: int, nvcc: Path, nvdisasm: Path) -> dict[str, Compiled]:
    """By demangled name. Raises EngineError where a tool fails."""
    with tempfile.TemporaryDirectory(prefix="iq-kernels-") as folder:
        cubin = Path(folder) / "kernels.cubin"
        said = _output(command(str(nvcc), str(plugins), f"sm_{architecture}", str(cubin)))
        listing = _output([str(nvdisasm), str(cubin)])
    kernels, resources = parse(listing), _resources(said)
    names = sorted(kernels.keys() & resources.keys())
    if shutil.which("c++filt") is None:
        raise EngineError("c++filt was not found: install binutils.")
    plain = _output(["c++filt", *names]).splitlines()
    return {
        demangled: Compiled(kernels[name], *resources[name])
        for demangled, name in zip(plain, names, strict=True)
    }


def _resources(said: str) -> dict[str, tuple[int, int, int, int]]:
    """Registers, bytes spilled, of the stack and shared, by mangled name, from ptxas -v."""
    found: dict[str, tuple[int, int, int, int]] = {}
    for part in said.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack|spill)", part)[:3])
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert registers is not None, part
        found[name] = (int(registers[1]), stores + loads, stack, int(shared[1]) if shared else 0)
    return found


def _output(arguments: list[str]) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise EngineError(f"'{arguments[0]}' failed: {' '.join(last)}")
    return done.stdout + done.stderr
