from __future__ import annotations

import ctypes
import subprocess
import sys
import types

import pytest

from iq_export.engine import trt
from iq_export.engine.soname import alias_library
from iq_export.engine.targets import ENTERPRISE, RTX, resolve_target
from iq_export.errors import EngineError


def _module(version: str, **members: object) -> types.ModuleType:
    module = types.ModuleType("tensorrt")
    module.__dict__.update(__version__=version, **members)
    return module


@pytest.mark.parametrize(
    ("text", "version"),
    [("1.7.1.116", (1, 7, 1, 116)), ("10.3.0", (10, 3, 0)), ("11.1.0b1", (11, 1, 0)), ("x", ())],
)
def test_parse_version(text: str, version: tuple[int, ...]) -> None:
    assert trt.parse_version(text) == version


@pytest.mark.parametrize(("flavour", "extra"), [(RTX, "rtx"), (ENTERPRISE, "tensorrt")])
def test_missing_tensorrt_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, flavour: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, flavour, None)
    with pytest.raises(EngineError, match=rf"not installed: .*pip install 'iq-export\[{extra}\]'"):
        trt.load(flavour)


def test_old_enterprise_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, ENTERPRISE, _module("8.6.1"))
    with pytest.raises(EngineError, match=r"TensorRT 8\.6\.1 is too old: 10\.3 or later"):
        trt.load(ENTERPRISE)


@pytest.mark.parametrize(
    ("version", "members", "flags"),
    [
        ("10.3.0", {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, 2),
        ("10.16.1", {"STRONGLY_TYPED": 1}, 2),
        ("11.1.0", {}, 0),
    ],
)
def test_networks_are_strongly_typed_on_every_line(
    monkeypatch: pytest.MonkeyPatch, version: str, members: dict[str, int], flags: int
) -> None:
    kinds = types.SimpleNamespace(**members)
    module = _module(version, NetworkDefinitionCreationFlag=kinds)
    monkeypatch.setitem(sys.modules, ENTERPRISE, module)
    assert trt.load(ENTERPRISE).network_flags() == flags


def test_unknown_builder_flag_is_an_error() -> None:
    tensorrt = trt.TensorRT(ENTERPRISE, _module("11.1.0", BuilderFlag=types.SimpleNamespace()))
    with pytest.raises(EngineError, match="has no builder flag STRIP_PLAN"):
        tensorrt.set_flag(None, "STRIP_PLAN")


def test_why_not_here_tells_how_to_get_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "available", list)
    reason = trt.why_not_here(resolve_target("rtx-ampere"))
    assert reason is not None
    assert "pip install 'iq-export[rtx]'" in reason


@pytest.mark.parametrize(("sm", "fits"), [(87, True), (86, False), (None, False)])
def test_enterprise_plans_are_built_on_the_device(
    monkeypatch: pytest.MonkeyPatch, sm: int | None, fits: bool
) -> None:
    monkeypatch.setattr(trt, "available", lambda: [ENTERPRISE])
    monkeypatch.setattr(trt, "device_compute_capability", lambda: sm)
    reason = trt.why_not_here(resolve_target("orin"))
    assert (reason is None) == fits
    if reason is not None:
        assert "iq-export build BUNDLE --target orin" in reason
        assert (f"has sm_{sm}" if sm else "no NVIDIA GPU") in reason


def test_log_puts_errors_of_a_missing_gpu_last() -> None:
    log = trt.BuildLog()
    log.add_error("checkMacros: Cuda Runtime (cudaError 35: driver is insufficient)")
    log.add_error("no kernel")
    log.add_error("no kernel")
    assert log.summary().startswith("no kernel | checkMacros")
    assert log.summary().count("no kernel") == 1
    log.add_warning("A node named a already exists, the output tensors of this new instance will")
    assert log.warnings == []


def test_alias_library_is_found_under_the_other_name() -> None:
    # In a process of its own: a loaded alias stays for good.
    script = (
        "import ctypes\n"
        "from iq_export.engine.soname import provide_alias\n"
        "ctypes.CDLL('libz.so.1')\n"
        "provide_alias('libiq-alias-test.so', 'libz.so.1')\n"
        "assert ctypes.CDLL('libiq-alias-test.so').zlibVersion\n"
    )
    try:
        ctypes.CDLL("libz.so.1")
    except OSError:
        pytest.skip("no libz.so.1 to make an alias of")
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_alias_library_of_an_unknown_machine_is_an_os_error() -> None:
    with pytest.raises(OSError, match="riscv64"):
        alias_library("a.so", "b.so", "riscv64")
    assert alias_library("a.so", "b.so", "aarch64")[18] == 183
