"""The worker against a stand-in for enterprise TensorRT, which cannot be installed here.

It shows which calls a line gets; that they build an engine is shown with TensorRT for RTX.
"""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from iq_export.engine.build import BuildRequest, Profile, Range
from iq_export.engine.targets import ENTERPRISE
from iq_export.engine.worker import build
from iq_export.errors import EngineError
from iq_export.sinks import ops

PROFILE = Profile(Range(1, 1, 2), Range(1, 4, 8), Range(0, 4, 8))


class _Tensor:
    name, shape = "attention_mask", (-1, -1)

    def get_dimension_name(self, axis: int) -> str:
        return ("batch", "total")[axis]


class _Layer:
    type = "PLUGIN_V3"


class _Network:
    num_layers = num_inputs = 1

    def get_layer(self, _: int) -> _Layer:
        return _Layer()

    def get_input(self, _: int) -> _Tensor:
        return _Tensor()


class _Profile:
    shapes: dict[str, Any]

    def set_shape(self, name: str, *sizes: tuple[int, ...]) -> None:
        self.shapes = {name: sizes}


class _Config:
    """Takes any attribute; TensorRT for RTX's calls are missing, as in enterprise TensorRT."""

    def __init__(self) -> None:
        self.flags: list[str] = []
        self.profiles: list[_Profile] = []

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def add_optimization_profile(self, profile: _Profile) -> None:
        self.profiles.append(profile)


class _Registry:
    all_creators = (types.SimpleNamespace(plugin_namespace="iq"),)

    def load_library(self, path: str) -> object:
        return path


class _Builder:
    last: _Builder

    def __init__(self, logger: object) -> None:
        self.config = _Config()
        self.flags: int | None = None
        _Builder.last = self

    def get_plugin_registry(self) -> _Registry:
        return _Registry()

    def create_network(self, flags: int) -> _Network:
        self.flags = flags
        return _Network()

    def create_builder_config(self) -> _Config:
        return self.config

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes:
        return b"plan"


class _Parser:
    num_errors = 0

    def __init__(self, network: _Network, logger: object) -> None:
        pass

    def parse_from_file(self, path: str) -> bool:
        return True


class _Logger:
    ERROR, INTERNAL_ERROR, WARNING = range(3)


def _install(monkeypatch: pytest.MonkeyPatch, version: str, **members: Any) -> None:
    names = types.SimpleNamespace
    module = types.ModuleType(ENTERPRISE)
    module.__dict__.update(
        __version__=version,
        ILogger=type("ILogger", (), {}),
        Logger=_Logger,
        Builder=_Builder,
        OnnxParser=_Parser,
        LayerType=names(PLUGIN_V3="PLUGIN_V3"),
        ProfilingVerbosity=names(DETAILED="detailed"),
        BuilderFlag=names(VERSION_COMPATIBLE="compatible"),
        NetworkDefinitionCreationFlag=names(**members),
    )
    monkeypatch.setitem(sys.modules, ENTERPRISE, module)


@pytest.fixture
def request_(tmp_path: Path) -> BuildRequest:
    return BuildRequest(
        source="model.onnx",
        model="model.onnx",
        plan=str(tmp_path / "a.plan"),
        target="orin",
        flavour=ENTERPRISE,
        compute_capabilities=(87,),
        profile=PROFILE.to_json(),
        opset=23,
        sink_nodes=1,
        plugin_nodes=1,
        plugin="libiq_plugins.so",
        timing_cache=None,
        version_compatible=False,
        strip_weights=False,
        profiling_verbosity="detailed",
    )


@pytest.mark.parametrize(
    ("version", "members", "flags"),
    [("10.16.0", {"STRONGLY_TYPED": 1}, 2), ("11.4.0", {}, 0)],
)
def test_enterprise_lines(
    monkeypatch: pytest.MonkeyPatch,
    request_: BuildRequest,
    version: str,
    members: dict[str, int],
    flags: int,
) -> None:
    _install(monkeypatch, version, **members)
    report = build(request_)
    builder = _Builder.last
    assert builder.flags == flags
    assert builder.config.profiles[0].shapes == {"attention_mask": ((1, 1), (1, 8), (2, 16))}
    assert builder.config.flags == []
    assert (report.form, report.plugin_layers, report.plugin_embedded) == ("plugin", 1, False)
    assert report.plugin_version == str(ops.VERSION)
    assert (report.tensorrt_version, report.bytes) == (version, 4)
    assert Path(request_.plan).read_bytes() == b"plan"


def test_version_compatible_plans_carry_the_plugin(
    monkeypatch: pytest.MonkeyPatch, request_: BuildRequest
) -> None:
    _install(monkeypatch, "10.16.0", STRONGLY_TYPED=1)
    report = build(replace(request_, version_compatible=True))
    assert report.plugin_embedded
    config: Any = _Builder.last.config
    assert config.flags == ["compatible"]
    assert config.plugins_to_serialize == ["libiq_plugins.so"]


@pytest.mark.parametrize("version", ["10.3.0", "10.13.3"])
def test_an_older_line_is_refused_at_opset_23(
    monkeypatch: pytest.MonkeyPatch, request_: BuildRequest, version: str
) -> None:
    _install(monkeypatch, version, STRONGLY_TYPED=1)
    with pytest.raises(EngineError, match=r"RMSNormalization.* need TensorRT 10\.15"):
        build(request_)
    assert build(replace(request_, opset=21)).form == "plugin"
