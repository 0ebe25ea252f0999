"""The plugin registers itself at dlopen, as Triton needs it, only where it is asked to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from iq_export.engine.plugin import PluginBuild, find_headers, find_nvcc
from iq_export.sinks.ops import FUSED_OPS, OPS

STAND_IN = Path(__file__).parents[2] / "plugins" / "test" / "registry_test.cpp"
CREATORS = [f"iq iq {op} 1" for op in (*OPS, *FUSED_OPS)]
# Triton's backend links TensorRT, is opened with RTLD_LOCAL, and opens what `plugins` names.
_OPEN = "import ctypes, os, sys\nfor path in sys.argv[1:]: ctypes.CDLL(path, os.RTLD_LOCAL)"
_RTX = "import tensorrt_rtx, ctypes, os, sys\nctypes.CDLL(sys.argv[1], os.RTLD_LOCAL)"
_LOAD = """
import sys
import tensorrt_rtx
registry = tensorrt_rtx.get_plugin_registry()
assert registry.load_library(sys.argv[1]) is not None
assert registry.get_creator("SinkDetect", "1", "iq") is not None
"""


@pytest.fixture
def library(plugin: PluginBuild) -> Path:
    assert plugin.path is not None
    return plugin.path


def stand_in(folder: Path, major: int | None = None) -> Path:
    """A libnvinfer.so that prints what is registered; of another major version if one is given."""
    headers, nvcc = find_headers(), find_nvcc()
    assert headers is not None and nvcc is not None
    path = folder / "libnvinfer.so.10"
    # nvcc as the C++ compiler: it knows where CUDA's headers are.
    command = [str(nvcc), "-std=c++17", "-shared", "-Xcompiler=-fPIC"]
    command += ["-isystem", str(headers)]
    command += [] if major is None else [f"-DIQ_STAND_IN_MAJOR={major}"]
    subprocess.run([*command, str(STAND_IN), "-o", str(path)], check=True)
    return path


def outcome(program: str, wish: str | None, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run `program` in a process of its own: what is loaded and registered is the process's."""
    environment = {k: v for k, v in os.environ.items() if k != "IQ_REGISTER_PLUGINS"}
    if wish is not None:
        environment["IQ_REGISTER_PLUGINS"] = wish
    command = [sys.executable, "-c", program, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def test_dlopen_registers_where_it_is_asked_to(library: Path, tmp_path: Path) -> None:
    tensorrt = stand_in(tmp_path)
    done = outcome(_OPEN, "1", tensorrt, library)
    assert (done.stdout.splitlines(), done.stderr) == (CREATORS, "")
    for wish in (None, "", "0"):
        done = outcome(_OPEN, wish, tensorrt, library)
        assert (done.stdout, done.stderr) == ("", "")


def test_another_librarys_creators_are_not_taken(library: Path, tmp_path: Path) -> None:
    """Every plugin library exports getCreators; a host may have made one's visible to all."""
    source, other = tmp_path / "other.cpp", tmp_path / "libother.so"
    source.write_text('extern "C" void* const* getCreators(int& n) { n = 0; return nullptr; }')
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(other)], check=True)
    program = f"import ctypes; ctypes.CDLL({str(other)!r}, ctypes.RTLD_GLOBAL)\n{_OPEN}"
    done = outcome(program, "1", stand_in(tmp_path), library)
    assert (done.stdout.splitlines(), done.stderr) == (CREATORS, "")


def test_another_major_version_is_left_alone(library: Path, tmp_path: Path) -> None:
    """Its registry is laid out otherwise: a call would go anywhere."""
    done = outcome(_OPEN, "1", stand_in(tmp_path, major=99), library)
    assert done.stdout == "" and "loaded has major version 99" in done.stderr


def test_tensorrt_rtx_is_left_alone_and_loads_it_as_before(library: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert "loaded has major version 1," in outcome(_RTX, "1", library).stderr
    assert outcome(_LOAD, None, library).stderr == ""


def test_without_tensorrt_it_says_so(library: Path) -> None:
    assert "no TensorRT is loaded yet" in outcome(_OPEN, "1", library).stderr
    assert outcome(_OPEN, None, library).stderr == ""
