"""`iq-export build` on a bundle of a tiny real graph, with the real TensorRT builder."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iq_export.bundle.manifest import Manifest, record_files
from iq_export.bundle.package import Bundle, atomic_folder
from iq_export.cli import main
from iq_export.engine import plugin as plugin_module
from iq_export.engine.plugin import PluginBuild
from iq_export.errors import EngineError
from iq_export.recipe import load_recipe
from tests.tiny_bundle import REQUIRED, fill

SHAPES = ["--maxShapes", "batch:2,seq:8,past:8"]


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A bundle whose model.onnx clamps rows of x [batch, seq, 8] with one sink op."""
    onnx = pytest.importorskip("onnx")
    from iq_export.sinks import ops

    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    clamp = node(
        "SinkClampInsert",
        ["x", "index"],
        ["y"],
        domain=ops.DOMAIN,
        templates=[float(v) for v in np.arange(8)],
        template_shape=[1, 8],
        **ops.PLUGIN_ATTRIBUTES,
    )
    rows = ["batch", "seq"]
    graph = onnx.helper.make_graph(
        [clamp],
        "g",
        [info("x", 10, [*rows, 8]), info("index", 6, rows)],
        [info("y", 10, [*rows, 8])],
    )
    imports = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(ops.DOMAIN, 1)]
    model = onnx.helper.make_model(
        graph, functions=ops.functions(23), opset_imports=imports, ir_version=11
    )
    out = tmp_path / "bundle"
    with atomic_folder(out) as folder:
        onnx.save(model, folder / "model.onnx")
        fill(folder)
        Manifest(
            name="tiny", recipe="w8a8", dtype="fp16", opset=23, files=record_files(folder)
        ).write(folder)
    return out


def _manifest(folder: Path) -> Manifest:
    return Bundle.open(folder).manifest


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_module, "find_nvcc", lambda: None)


@pytest.mark.usefixtures("no_nvcc")
def test_a_target_that_is_named_twice_is_built_once(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def refuse(*args: Any, **_: Any) -> None:
        seen.append(args[2].name)
        raise EngineError("it does not like it.")

    monkeypatch.setattr("iq_export.cli.build.why_not_here", lambda target: None)
    monkeypatch.setattr("iq_export.cli.build.build_engine", refuse)
    names = ("rtx-ada", "RTX-Ada", "rtx-turing", "rtx-ada")
    argv = [word for name in names for word in ("--target", name)]
    assert main(["build", str(built), *argv, *SHAPES, "-q"]) == 6
    assert seen == ["rtx-ada", "rtx-turing"]
    capsys.readouterr()


@pytest.mark.usefixtures("no_nvcc")
def test_engine_is_added_and_rebuilt(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert main(["build", str(built), "--target", "rtx-ampere", *SHAPES, "--json"]) == 0
    streams = capsys.readouterr()
    (report,) = json.loads(streams.out)
    assert (report["form"], report["sink_nodes"]) == ("body", 1)
    assert report["profile"]["seq"]["max"] == 8
    assert "nvcc was not found" in streams.err
    manifest = _manifest(built)
    assert manifest.graph.engines["rtx-ampere"]["sha256"] == report["sha256"]
    assert manifest.files["engines/rtx-ampere.plan"].sha256 == report["sha256"]
    assert manifest.targets == ["rtx-ampere"]
    # Again, with the bundle's own targets and another one beside them.
    assert main(["build", str(built), *SHAPES, "-q"]) == 0
    assert main(["build", str(built), "--target", "rtx-all", *SHAPES]) == 0
    assert list(_manifest(built).graph.engines) == ["rtx-ampere", "rtx-all"]
    assert "sink ops as function bodies" in capsys.readouterr().out
    assert sorted(path.name for path in built.iterdir()) == [
        "engines",
        "manifest.json",
        "manifest.json.sha256",
        *REQUIRED,
    ]


@pytest.mark.usefixtures("no_nvcc")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "names no target"),
        (["--target", "rtx-amper"], 2, "did you mean rtx-ampere"),
        (["--target", "rtx-ampere", "--minShapes", "seq:9", *SHAPES], 2, "min <= opt <= max"),
        (["--target", "orin-jetpack6"], 6, "JetPack 6"),
        (["--target", "rtx-ampere", "--versionCompatible"], 2, "no lean runtime"),
    ],
)
def test_refusals(
    built: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    before = (built / "manifest.json").read_text()
    assert main(["build", str(built), *arguments]) == code
    assert message in capsys.readouterr().err
    assert (built / "manifest.json").read_text() == before


@pytest.mark.usefixtures("no_nvcc")
def test_plugin_on_needs_the_plugin(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    arguments = ["build", str(built), "--target", "rtx-ampere", "--plugin", "on"]
    assert main(arguments) == 6
    assert "nvcc was not found" in capsys.readouterr().err
    assert [path.name for path in built.iterdir() if path.name.startswith(".")] == []


def test_four_bit_weights_on_turing(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = replace(_manifest(built), recipe="w4a16")
    manifest.write(built)
    assert main(["build", str(built), "--target", "rtx-turing"]) == 2
    assert "cannot run 4-bit weights" in capsys.readouterr().err


def _made_by(folder: Path, name: str, like: str) -> None:
    """Record in the manifest of `folder` a recipe `name` with the settings of the recipe `like`."""
    settings = replace(load_recipe(like), name=name).record()
    replace(_manifest(folder), recipe=name, recipe_settings=settings).write(folder)


@pytest.mark.parametrize("name", ["mine", "w8a8-but-not-really"])
def test_the_recipes_settings_decide_and_not_its_name(
    built: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _made_by(built, name, "w4a16")
    assert main(["build", str(built), "--target", "rtx-turing"]) == 2
    assert "cannot run 4-bit weights" in capsys.readouterr().err


def test_no_engine_is_built_of_a_recipe_for_study(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _made_by(built, "mine", "w4a8")
    assert main(["build", str(built), "--target", "rtx-ampere"]) == 2
    assert "recipe 'mine' is for study: no kernel multiplies" in capsys.readouterr().err


def test_that_an_older_bundle_tells_only_the_recipes_name_is_said(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(_manifest(built), recipe="w4a16").write(built)
    assert main(["build", str(built), "--target", "rtx-turing"]) == 2
    said = capsys.readouterr().err
    assert "of an older version: its number formats are taken from the recipe's name, w4a16" in said


def test_settings_that_are_no_recipe_are_refused(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for settings in (
        {"name": "mine"},
        {"colour": 1},
        load_recipe("w8a8").record() | {"cache": "int3"},
    ):
        replace(_manifest(built), recipe_settings=settings).write(built)
        assert main(["build", str(built), "--target", "rtx-ampere"]) == 7
        assert "recipe_settings" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["w8a6", "w4a8"])
def test_recipe_for_study_has_no_engine(
    built: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(_manifest(built), recipe=recipe).write(built)
    assert main(["build", str(built), "--target", "rtx-ampere"]) == 2
    assert f"recipe '{recipe}' is for study" in capsys.readouterr().err


def test_plugin_form(built: Path, plugin: PluginBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the plugin that other tests have compiled."""
    pytest.importorskip("tensorrt_rtx")

    def build_plugin(out: Path, architectures: list[int], *, whole: bool) -> PluginBuild:
        assert plugin.path is not None and tuple(architectures) == plugin.architectures and whole
        out.mkdir(parents=True, exist_ok=True)
        return replace(plugin, path=Path(shutil.copy(plugin.path, out)))

    monkeypatch.setattr(plugin_module, "build_plugin", build_plugin)
    assert main(["build", str(built), "--target", "rtx-ampere", "--plugin", "on", *SHAPES]) == 0
    manifest = _manifest(built)
    assert manifest.graph.engines["rtx-ampere"]["form"] == "plugin"
    assert "plugins/libiq_plugins.so" in manifest.files
    # And back: the form is that of the last build.
    assert main(["build", str(built), "--target", "rtx-ampere", "--plugin", "off", *SHAPES]) == 0
    assert _manifest(built).graph.engines["rtx-ampere"]["form"] == "body"


def test_a_timing_cache_that_is_no_file(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is replaced: the name of a pipe or a device would be lost."""
    pipe = bundle.parent / "pipe"
    os.mkfifo(pipe)
    assert main(["build", str(bundle), "--timingCacheFile", str(pipe)]) == 2
    assert "is not a file" in capsys.readouterr().err and pipe.is_fifo()


def test_a_timing_cache_that_is_too_large(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of it is read: a sparse file of a tebibyte."""
    with (bundle.parent / "cache").open("wb") as stream:
        stream.truncate(1 << 40)
    assert main(["build", str(bundle), "--timingCacheFile", stream.name]) == 2
    assert f"more than {1 << 30} bytes" in capsys.readouterr().err
