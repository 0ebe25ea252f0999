from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from iq_export.engine import plugin as plugin_module
from iq_export.engine.build import Profile, Range, build_engine
from iq_export.engine.plugin import (
    PluginBuild,
    build_plugin,
    find_headers,
    find_nvcc,
    headers_version,
    nvcc_architectures,
    provide_plugin,
)
from iq_export.engine.targets import resolve_target
from iq_export.errors import EngineError, UsageError

SMALL = Profile(Range(1, 1, 2), Range(1, 4, 8), Range(0, 4, 8))


def test_library_and_its_report(plugin: PluginBuild) -> None:
    assert plugin.path is not None
    assert plugin.path.name == "libiq_plugins.so"
    assert plugin.sha256 == hashlib.sha256(plugin.path.read_bytes()).hexdigest()
    assert plugin.architectures == (86,)
    assert plugin.reason == ""


def test_exports_what_tensorrt_looks_for_and_needs_no_tensorrt(plugin: PluginBuild) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is missing")
    symbols = subprocess.run(
        [nm, "-D", str(plugin.path)], check=True, capture_output=True, text=True
    ).stdout
    defined = {line.split()[-1] for line in symbols.splitlines() if " T " in line}
    assert defined == {"getCreators", "setLoggerFinder"}
    assert "nvinfer" not in symbols
    assert "cuda" not in symbols  # the library's CUDA runtime stays its own


@pytest.mark.usefixtures("rtx")
class TestPluginForm:
    @pytest.mark.parametrize("name", ["rtx-ampere", "rtx-all"])
    def test_every_sink_node_becomes_a_plugin_layer(
        self, sink_model, plugin: PluginBuild, tmp_path: Path, name: str
    ) -> None:  # type: ignore[no-untyped-def]
        plan = tmp_path / "a.plan"
        report = build_engine(sink_model(), plan, resolve_target(name), SMALL, plugin=plugin.path)
        assert (report.form, report.plugin_layers, report.sink_nodes) == ("plugin", 3, 3)
        assert report.plugin_embedded
        assert plugin.path is not None
        assert plan.stat().st_size > plugin.path.stat().st_size
        body = build_engine(sink_model(), tmp_path / "b.plan", resolve_target(name), SMALL)
        assert (body.form, body.plugin_layers) == ("body", 0)
        assert body.layers > report.layers

    def test_no_body_is_taken_where_the_plugin_is_meant(
        self, sink_model, plugin: PluginBuild, tmp_path: Path
    ) -> None:  # type: ignore[no-untyped-def]
        """TensorRT would, silently, for a node of another namespace; the copy has no bodies."""
        target = resolve_target("rtx-ampere")
        model = sink_model(namespace="other")
        report = build_engine(model, tmp_path / "a.plan", target, SMALL, plugin=plugin.path)
        assert (report.form, report.plugin_layers) == ("plugin", 3)

    @pytest.mark.parametrize(
        ("shape", "reason"),
        [
            ([4, 4], "last axis of 'x' has 8 elements, a template 4"),
            ([3, 8], "16 values, which is not template_shape 3 x 8"),
        ],
    )
    def test_a_table_that_does_not_fit_is_refused_by_the_plugin(
        self, sink_model, plugin: PluginBuild, tmp_path: Path, shape: list[int], reason: str
    ) -> None:  # type: ignore[no-untyped-def]
        onnx = pytest.importorskip("onnx")
        path = sink_model()
        model = onnx.load(path)
        for attribute in model.graph.node[1].attribute:
            if attribute.name == "template_shape":
                attribute.ints[:] = shape
        onnx.save(model, path)
        with pytest.raises(EngineError, match=reason):
            build_engine(
                path, tmp_path / "a.plan", resolve_target("rtx-ampere"), SMALL, plugin=plugin.path
            )


def test_a_missing_library_is_an_error(sink_model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EngineError, match=r"absent\.so' does not exist"):
        build_engine(
            sink_model(),
            tmp_path / "a.plan",
            resolve_target("rtx-ampere"),
            SMALL,
            plugin=tmp_path / "absent.so",
        )


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("find_nvcc", "nvcc was not found"),
        ("find_cmake", "cmake was not found"),
        ("find_sources", "sources are not installed"),
        ("find_headers", "set TENSORRT_INCLUDE_DIR"),
    ],
)
def test_what_is_missing_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str, reason: str
) -> None:
    (tmp_path / "NvInferRuntime.h").touch()
    for name in ("find_nvcc", "find_cmake", "find_sources", "find_headers"):
        monkeypatch.setattr(plugin_module, name, lambda: tmp_path)
    monkeypatch.setattr(plugin_module, missing, lambda: None)
    build = build_plugin(tmp_path / "out", [86])
    assert build.path is None
    assert build.reason.startswith("no plugin:")
    assert reason in build.reason


def test_old_headers_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "NvInferVersion.h").write_text(
        "#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 6\n#define NV_TENSORRT_PATCH 1\n"
    )
    for name in ("find_nvcc", "find_cmake", "find_sources"):
        monkeypatch.setattr(plugin_module, name, lambda: tmp_path)
    assert "are 8.6.1, 10.3 is needed" in build_plugin(tmp_path, [86], headers=tmp_path).reason


def test_an_unknown_architecture_is_told_and_leaves_nothing(
    plugin: PluginBuild, tmp_path: Path
) -> None:
    build = build_plugin(tmp_path / "out", [13])
    assert build.path is None
    assert build.reason == "no plugin: this nvcc does not compile for sm_13."
    assert not (tmp_path / "out").exists()


def test_each_target_has_the_plugin_or_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An older nvcc than one of the targets' GPUs, as CUDA 12.6 for Thor."""
    for name in ("find_nvcc", "find_cmake", "find_sources"):
        monkeypatch.setattr(plugin_module, name, lambda: tmp_path)
    asked: list[list[int]] = []

    def compile_(_: Path, folder: Path, __: Path, architectures: list[int], *more: object) -> str:
        asked.append(list(architectures))
        (folder / "libiq_plugins.so").touch()
        return ""

    monkeypatch.setattr(plugin_module, "cmake_build", compile_)
    monkeypatch.setattr(plugin_module, "nvcc_architectures", lambda _: {86, 87})
    (tmp_path / "NvInferRuntime.h").touch()
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    build = provide_plugin("auto", tmp_path / "out", [87, 110], 3)
    assert asked == [[87]]
    assert build.covering((87,)) is build
    lacking = build.covering((110,))
    assert lacking.path is None
    assert lacking.reason == "no plugin: this nvcc does not compile for sm_110."
    with pytest.raises(EngineError, match="does not compile for sm_110"):
        provide_plugin("on", tmp_path / "on", [87, 110], 3)
    assert not (tmp_path / "on").exists()
    monkeypatch.setattr(plugin_module, "nvcc_architectures", lambda _: set())  # it does not say
    assert provide_plugin("on", tmp_path / "on", [87, 110], 3).architectures == (87, 110)


def test_nvcc_says_what_it_compiles_for() -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is missing")
    assert {86, 90} <= nvcc_architectures(nvcc)
    assert nvcc_architectures(Path("/absent/nvcc")) == set()


def test_headers_are_taken_from_the_folder_that_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    assert find_headers() is None
    (tmp_path / "NvInferRuntime.h").touch()
    assert find_headers() == tmp_path


@pytest.mark.parametrize("prefix", ["NV_TENSORRT_{}", "TRT_{}_ENTERPRISE"])
def test_headers_version(tmp_path: Path, prefix: str) -> None:
    numbers = zip(("MAJOR", "MINOR", "PATCH"), (10, 16, 2), strict=True)
    text = "".join(f"#define {prefix.format(part)} {value}\n" for part, value in numbers)
    (tmp_path / "NvInferVersion.h").write_text(text + "#define NV_TENSORRT_MAJOR TRT_MAJOR\n")
    assert headers_version(tmp_path) == (10, 16, 2)
    assert headers_version(tmp_path / "absent") == ()


@pytest.mark.parametrize(("mode", "why"), [("auto", "headers are here"), ("on", "asked for")])
def test_the_choice_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, why: str
) -> None:
    made = PluginBuild(path=tmp_path, architectures=(86, 87), headers="10.14.1")
    monkeypatch.setattr(plugin_module, "build_plugin", lambda *_, **__: made)
    reason = provide_plugin(mode, tmp_path, [86, 87], 3).reason
    assert why in reason
    assert "sm_86, sm_87 with headers 10.14.1" in reason


def test_modes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plugin_module, "find_nvcc", lambda: None)
    assert "nvcc" in provide_plugin("auto", tmp_path, [86], 3).reason
    assert "switched off" in provide_plugin("off", tmp_path, [86], 3).reason
    assert "no sink ops" in provide_plugin("on", tmp_path, [86], 0).reason
    with pytest.raises(EngineError, match="nvcc was not found"):
        provide_plugin("on", tmp_path, [86], 3)
    with pytest.raises(UsageError, match="unknown plugin mode 'maybe'"):
        provide_plugin("maybe", tmp_path, [86], 3)
