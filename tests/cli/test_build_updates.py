"""`build` and `eval` beside each other, killed, and on what older versions left; no TensorRT."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from iq_export.bundle.manifest import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    GraphInfo,
    checksum_line,
    record_files,
)
from iq_export.bundle.package import Bundle, atomic_folder, update_manifest
from iq_export.bundle.update import STATE, bundle_lock
from iq_export.checksum import sha256_file
from iq_export.cli import build as build_module
from iq_export.cli import main
from iq_export.engine.build import EngineReport
from iq_export.engine.plugin import PluginBuild
from iq_export.engine.profile import Profile
from iq_export.report.html import update_with_report
from tests import dying
from tests.cli.conftest import VOCAB

TARGETS = ("rtx-ampere", "rtx-ada", "rtx-blackwell", "h100")


def engine(plan: Path, target: str, **more: Any) -> EngineReport:
    return EngineReport(
        target, plan.name, plan.stat().st_size, sha256_file(plan), 1.0, "tensorrt_rtx", "1.7.1.116",
        (86,), "none", 0, 0, False, 1, 23, Profile().to_json(), False, False, 1, **more,
    )  # fmt: skip


@pytest.fixture
def bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle without engines, a builder that takes a moment, and no fsync."""

    def build(model: Path, plan: Path, target: Any, *_: Any, **__: Any) -> EngineReport:
        plan.write_text(f"plan of {target.name} {os.getpid()}")
        return engine(plan, target.name)

    nothing = SimpleNamespace(sink_nodes=0, head_dim=None, softcap=False, opset=23)
    monkeypatch.setattr(build_module, "build_engine", build)
    monkeypatch.setattr(build_module, "read_header", lambda _: nothing)
    monkeypatch.setattr(build_module, "why_not_here", lambda _: None)
    monkeypatch.setattr(build_module, "builder_gap", lambda *_: None)
    monkeypatch.setattr(build_module, "bundle_limit", lambda *_: None)
    monkeypatch.setattr("iq_export.cli.eval.bundle_limit", lambda *_: None)
    monkeypatch.setattr(build_module, "provide_plugin", lambda *_: PluginBuild(None, "none"))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    plans = [f"engines/{plan.name}" for plan in bundle.glob("engines/*")]
    update_manifest(Bundle.open(bundle), graphs=[GraphInfo()], targets=[], drop=plans)
    return bundle


def build(folder: Path, *targets: str) -> int:
    return main(["build", str(folder), "-q", *(f"--target={name}" for name in targets)])


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_build_killed_at_every_file_operation(bundle: Path, tmp_path: Path) -> None:
    assert build(bundle, "rtx-ampere") == 0
    whole = names(bundle)
    for at in range(1, 200, 2):
        folder = shutil.copytree(bundle, tmp_path / str(at))
        code = dying.run(lambda folder=folder: build(folder, "rtx-ampere"), at)
        Bundle.open(folder)
        assert build(folder, "rtx-ampere") == 0
        Bundle.open(folder)
        assert names(folder) == whole
        if code == 0:
            break
    assert at > 15


def _many(bundle: Path, commands: list[list[str]]) -> list[int | None]:
    children = [
        multiprocessing.get_context("fork").Process(target=lambda c=c: os._exit(main(c)))
        for c in commands
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


def test_builds_and_an_eval_at_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two builds lost an engine's record, and a build beside an eval damaged the bundle."""
    # ONNX Runtime's threads do not survive a fork.
    monkeypatch.setattr(
        "iq_export.evaluate.compare.window_logits",
        lambda _, windows, **__: (
            (number, np.zeros((len(window.ids), VOCAB), np.float32))
            for number, window in enumerate(windows)
        ),
    )
    commands = [["build", str(bundle), "-q", f"--target={name}"] for name in TARGETS]
    small = ["--windows", "2", "--length", "16", "--bundle-only"]
    commands.append(["eval", str(bundle), "-q", *small])
    assert _many(bundle, commands) == [0] * 5
    manifest = Bundle.open(bundle).manifest
    assert sorted(manifest.graph.engines) == sorted(TARGETS) == sorted(manifest.targets)
    assert manifest.accuracy is not None
    assert all(f"engines/{name}.plan" in manifest.files for name in TARGETS)


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_a_build_that_waits_says_for_whom(
    bundle: Path, capsys: pytest.CaptureFixture[str], quiet: tuple[str, ...]
) -> None:
    """Also a quiet one: who stands still without a word seems to hang."""
    child = os.fork()
    if child == 0:
        with bundle_lock(bundle):
            (bundle / "held").touch()
            time.sleep(0.3)
            (bundle / "held").unlink()
        os._exit(0)
    while not (bundle / "held").exists():
        time.sleep(0.01)
    assert main(["build", str(bundle), "--target=rtx-ada", *quiet]) == 0
    os.waitpid(child, 0)
    said = capsys.readouterr().err
    assert f"waiting for {bundle / STATE}" in said and f"process {child} on" in said
    assert said.count("\n") == 1 or not quiet


def older_build(bundle: Path, name: str = "rtx-ampere") -> None:
    """An older version, killed between the plan and the manifest."""
    (bundle / "engines" / f"{name}.plan").write_text("newer plan")


def test_build_mends_a_plan_that_the_manifest_does_not_describe(bundle: Path) -> None:
    assert build(bundle, "rtx-ampere", "rtx-ada") == 0
    whole = names(bundle)
    older_build(bundle)
    (bundle / "report.html").write_text("newer report")
    (bundle / ".build-a1b2c3d4").mkdir()
    (bundle / ".report.html.a1b2c3d4").write_text("x")
    assert main(["verify", str(bundle), "-q"]) == 7
    assert build(bundle, "rtx-ada") == 0
    manifest = Bundle.open(bundle).manifest
    assert sorted(manifest.graph.engines) == ["rtx-ada", "rtx-ampere"]
    assert names(bundle) == whole


def test_an_engine_that_cannot_be_built_here_is_dropped(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(bundle, "rtx-ampere", "rtx-ada") == 0
    older_build(bundle)
    monkeypatch.setattr(
        build_module, "why_not_here", lambda t: "no" if t.name == "rtx-ampere" else None
    )
    assert main(["build", str(bundle), "--target=rtx-ada"]) == 0
    assert "engine of rtx-ampere is not the one that was recorded" in capsys.readouterr().err
    assert list(Bundle.open(bundle).manifest.graph.engines) == ["rtx-ada"]
    assert not (bundle / "engines" / "rtx-ampere.plan").exists()


def test_a_damaged_library_takes_the_engines_that_need_it(bundle: Path) -> None:
    assert build(bundle, "rtx-ampere", "rtx-ada") == 0
    (bundle / "plugins").mkdir()
    (bundle / "plugins" / "libiq_plugins.so").write_text("old")
    graph = Bundle.open(bundle).manifest.graph
    graph.engines["rtx-ada"] |= {"form": "plugin", "plugin_embedded": False, "plugin_version": "1"}
    opened = update_manifest(
        Bundle.open(bundle), rehash=["plugins/libiq_plugins.so"], graphs=[graph]
    )
    assert opened.mismatches() == []
    (bundle / "plugins" / "libiq_plugins.so").write_text("new")
    assert build(bundle, "rtx-ampere") == 0
    manifest = Bundle.open(bundle).manifest
    assert manifest.graph.engines["rtx-ada"]["form"] == "none"  # built again
    assert "plugins/libiq_plugins.so" not in manifest.files


def test_a_checksum_that_was_not_yet_in_place(bundle: Path) -> None:
    """The manifest was; only what the killed run had written itself is taken."""
    before = (bundle / CHECKSUM_NAME).read_text()
    assert build(bundle, "rtx-ampere") == 0
    whole = names(bundle)
    line = (bundle / CHECKSUM_NAME).read_text()
    (bundle / CHECKSUM_NAME).write_text(before)
    assert build(bundle, "rtx-ampere") == 7
    (bundle / f".{CHECKSUM_NAME}.a1b2c3d4").write_text(line)
    assert build(bundle, "rtx-ampere") == 0
    assert names(bundle) == whole


def test_build_mends_nothing_else(bundle: Path) -> None:
    (bundle / "model.onnx").write_text("other")
    before = names(bundle)
    assert build(bundle, "rtx-ampere") == 7
    assert names(bundle) == before


def test_an_eval_of_a_bundle_that_was_replaced_meanwhile(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from iq_export.cli import eval as eval_module

    compare = eval_module.compare

    def slow(*args: Any, **options: Any) -> Any:
        manifest = Bundle.open(bundle).manifest
        with atomic_folder(bundle, force=True) as folder:
            shutil.copytree(bundle, folder, dirs_exist_ok=True)
            (folder / "model.onnx").write_bytes(b"newer")
            replace(manifest, files=record_files(folder)).write(folder)
        return compare(*args, **options)

    monkeypatch.setattr(eval_module, "compare", slow)
    argv = ["eval", str(bundle), "--windows", "2", "--length", "16", "--bundle-only"]
    assert main(argv) == 7
    streams = capsys.readouterr()
    assert "was replaced while it was measured" in streams.err and not streams.out
    assert Bundle.open(bundle).manifest.accuracy is None


def test_the_table_is_printed_though_it_cannot_be_kept(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("iq_export.bundle.update.claim", refuse)
    argv = ["eval", str(bundle), "--windows", "2", "--length", "16", "--bundle-only", "-q"]
    main(argv)
    assert "bundle (w8a8)" in capsys.readouterr().out


def test_readers_beside_updates_and_replacements(bundle: Path) -> None:
    """Every one of them sees one whole bundle."""
    child = os.fork()
    if child == 0:
        manifest = Bundle.open(bundle).manifest
        end = time.monotonic() + 1.5
        number = 0
        while time.monotonic() < end:
            number += 1
            if number % 3 == 0:
                with atomic_folder(bundle, force=True) as folder:
                    shutil.copytree(bundle, folder, dirs_exist_ok=True)
                    (folder / "model.onnx").write_text(f"graph {number}")
                    replace(manifest, files=record_files(folder)).write(folder)
            else:
                update_with_report(Bundle.open(bundle), notes=[f"note {number}"])
        os._exit(0)
    opened = 0
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        Bundle.open(bundle)
        Bundle.open(bundle, verify=False)
        opened += 1
    assert opened > 5
    assert checksum_line((bundle / MANIFEST_NAME).read_bytes()) == (
        (bundle / CHECKSUM_NAME).read_text()
    )
