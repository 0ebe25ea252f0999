"""The whole command on a model of two random layers: what comes out, and what an interrupt leaves.

The model has no spikes, so these runs also show that such a model gets no sink ops.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from iq_export import carry
from iq_export.bundle.package import Bundle, update_manifest
from iq_export.bundle.recipe import recipe_of
from iq_export.cli import main
from iq_export.errors import BundleError, GraphError
from iq_export.recipe import load_recipe
from iq_export.work import Work
from tests.forks import Forks

SMALL = ("--samples", "4", "--length", "64", "--quiet")
SHAPES = ("--maxShapes", "batch:2,seq:64,past:64", "--optShapes", "seq:32,past:32")
EVAL = ("--windows", "4", "--length", "64", "--quiet")


@pytest.fixture(scope="module")
def compiled(
    tiny_model: Path,
    export_once: Callable[..., int | None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A W8A8 bundle of the tiny model with its work folder beside it."""
    folder = tmp_path_factory.mktemp("compiled")
    work = str(folder / "work")
    argv = ["compile", str(tiny_model), str(folder / "bundle"), *SMALL, *SHAPES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iq_export.model.trace._export", export_once)
        assert main([*argv, "--work", work, "--keep-work"]) == 0
    return folder / "bundle"


def test_bundle_is_whole(compiled: Path) -> None:
    assert main(["verify", str(compiled), "--quiet"]) == 0
    manifest = Bundle.open(compiled).manifest
    assert manifest.recipe == "w8a8" and recipe_of(manifest) == load_recipe("w8a8")
    assert {"model.onnx", "plan.json", "report.html", "tokenizer.json"} <= set(manifest.files)
    assert (
        manifest.graph.inputs and manifest.graph.outputs and manifest.timings and manifest.versions
    )
    assert not list(compiled.parent.glob(".*"))


def test_no_spikes_no_sink_ops(compiled: Path) -> None:
    assert Bundle.open(compiled).manifest.graph.lifecycles == []
    assert b"SinkClampInsert" not in (compiled / "model.onnx").read_bytes()


def only_traced(compiled: Path, folder: Path) -> Path:
    """A work folder in which the traced graph of the fixture is found, and nothing else."""
    work = folder / "work"
    shutil.copytree(compiled.parent / "work", work, ignore=shutil.ignore_patterns("w8a8*"))
    return work


def test_decisions_of_a_bundle_make_its_graph_again(
    compiled: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Nothing is calibrated: the same file to the bit, and one of another dtype."""
    again, wide = tmp_path / "again", tmp_path / "wide"
    argv = ["compile", str(tiny_model), "--work", str(only_traced(compiled, tmp_path))]
    more = ["--decisions", str(compiled), "--target", "orin", *SMALL]
    assert main([*argv, str(again), *more]) == 0
    for name in ("model.onnx", "model.onnx.data", "sinks.safetensors"):
        assert (again / name).read_bytes() == (compiled / name).read_bytes()
    manifest = Bundle.open(again).manifest
    assert manifest.targets == ["orin"] and manifest.recipe == "w8a8"
    assert manifest.graph.lifecycles == Bundle.open(compiled).manifest.graph.lifecycles
    assert "Calibrate quantizers" not in manifest.timings
    # With them `eval` can make the round-to-nearest graph again.
    assert Bundle.open(again).plan()["absmax"] == Bundle.open(compiled).plan()["absmax"] != {}
    assert main([*argv, str(wide), *more, "--dtype", "fp32"]) == 0
    check = Bundle.open(wide).manifest.check
    assert check is not None and check["top1"] > 0.9


def test_decisions_for_something_else_are_refused(
    compiled: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compile", str(tiny_model), str(tmp_path / "out"), *SMALL]
    assert main([*argv, "--decisions", str(compiled), "--recipe", "w4a16"]) == 2
    assert "are for recipe 'w8a8', and 'w4a16' is another" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    argv[1] = str(other)
    assert main([*argv, "--decisions", str(compiled)]) == 3
    assert "is not the model that" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_decisions_that_change_while_they_are_used(
    compiled: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails: bool,
) -> None:
    """Codes are read after the bundle was verified: the wrong graph ships nowhere, and what it
    fails at is not what is said."""
    old = tmp_path / "old"
    shutil.copytree(compiled, old)
    real = carry.load_decisions

    def load(*args: Any) -> Any:
        found = real(*args)
        with (old / "model.onnx.data").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        if fails:
            raise GraphError("this graph is broken")
        return found

    monkeypatch.setattr(carry, "load_decisions", load)
    argv = ["compile", str(tiny_model), str(tmp_path / "out"), "--decisions", str(old), *SMALL]
    argv += ["--work", str(compiled.parent / "work")]  # it holds the traced graph
    assert main(argv) == BundleError.exit_code
    assert f"another program changed {old / 'model.onnx.data'}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_opens_the_decisions(
    compiled: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what such a run does, and refuses what that would refuse before its first step."""
    argv = ["compile", str(tiny_model), str(tmp_path / "out"), *SMALL, "--target", "orin"]
    assert main([*argv, "--decisions", str(compiled), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == ["Trace", "Quantize", "Check the quantized graph"]
    assert plan["decisions"] == f"those of {compiled}"
    older, wide = tmp_path / "older", tmp_path / "wide"
    for changed in (older, wide):
        shutil.copytree(compiled, changed)
    record = Bundle.open(older).plan()
    del record["decisions"]
    (older / "plan.json").write_text(json.dumps(record))
    update_manifest(Bundle.open(older, verify=False), rehash=["plan.json"])
    update_manifest(Bundle.open(wide), dtype="fp32")
    for folder, more, says in (
        (compiled, ("--recipe", "w4a16"), "'w4a16' is another"),
        (compiled, ("--budget", "1.1"), "--budget is among what was decided"),
        (older, (), "is of an older version"),
        (wide, (), "was decided for fp32"),
        (tmp_path / "none", (), "none"),
    ):
        told = []
        for dry in ((), ("--dry-run",)):
            code = main([*argv, "--decisions", str(folder), *more, *dry])
            told.append((code, capsys.readouterr().err))
        assert told[0] == told[1] and told[0][0] and says in told[0][1], told
    assert not (tmp_path / "out").exists()


def test_engine_is_recorded(compiled: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    manifest = Bundle.open(compiled).manifest
    assert manifest.graph.engines["rtx-ampere"]["form"] == "none"
    assert "engines/rtx-ampere.plan" in manifest.files


def test_eval_against_the_work_folder(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = str(compiled.parent / "work")
    assert main(["eval", str(compiled), "--work", work, "--json", *EVAL]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["bos"] for row in rows} == {True, False}
    assert all(row["ratio"] == pytest.approx(1, abs=0.05) for row in rows)
    assert main(["verify", str(compiled), "--quiet"]) == 0


def test_no_copy_of_all_weights_is_kept(compiled: Path, tiny_model: Path) -> None:
    """Where the source is safetensors: the traced graph refers to it, and others are lowered."""
    source = (tiny_model / "model.safetensors").stat().st_size
    kept = sorted((compiled.parent / "work").rglob("*"))
    assert [p.name for p in kept if p.suffix in (".onnx", ".data")] == ["model.onnx"]
    (graph,) = [p for p in kept if p.suffix == ".onnx"]
    assert graph.stat().st_size < source / 2


def test_eval_lowers_the_graphs_again_where_none_were_kept(
    compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the decisions in the bundle: nothing is calibrated, and the figures are the same."""
    moved = tmp_path / "bundle"
    shutil.copytree(compiled, moved)
    found = []
    traced = only_traced(compiled, tmp_path)
    for bundle, work in ((compiled, compiled.parent / "work"), (moved, traced)):
        capsys.readouterr()
        assert main(["eval", str(bundle), *EVAL[:-1], "--work", str(work), "--json"]) == 0
        told = capsys.readouterr()
        found.append(
            [(r["graph"], r["bos"], r["perplexity"]) for r in json.loads(told.out)["rows"]]
        )
    assert "Prepare the graphs" in told.err and "Calibrate" not in told.err
    assert len(found[0]) > 4 and found[1] == found[0]


def test_same_input_same_files(compiled: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The engine's bytes are TensorRT's affair: its hash is recorded."""
    argv = ["compile", str(tiny_model), str(tmp_path / "again"), *SMALL, *SHAPES]
    assert main([*argv, "--work", str(compiled.parent / "work"), "--keep-work"]) == 0
    ours, again = Bundle.open(compiled).manifest, Bundle.open(tmp_path / "again").manifest
    for name in ("model.onnx", "model.onnx.data", "plan.json", "sinks.safetensors"):
        assert ours.files[name] == again.files[name]
    for target, engine in again.graph.engines.items():
        assert engine["sha256"] == again.files[f"engines/{target}.plan"].sha256


def test_a_full_disk_behind_the_bundle_keeps_it(
    tiny_model: Path, tmp_path: Path, export_once: Callable[..., int | None],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Only the graph that was to be kept is lost, and that is said."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Work, "keep_trace", full)
    monkeypatch.setattr("iq_export.model.trace._export", export_once)
    argv = ["compile", str(tiny_model), str(tmp_path / "out"), "--recipe", "fp16", "--target",
            "h100", "--samples", "1", "--length", "32", "--insertion", "norm",
            "--keep-work"]  # fmt: skip
    assert main(argv) == 7
    assert "is complete, but the graph to compare it with was not kept" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_int8_cache_through_every_command(
    compiled: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kv8"
    argv = ["compile", str(tiny_model), str(out), "--recipe", "w8a8kv8", *SMALL, *SHAPES]
    assert main([*argv, "--work", str(compiled.parent / "work"), "--keep-work"]) == 0
    manifest = Bundle.open(out).manifest
    caches = [
        t for t in (*manifest.graph.inputs, *manifest.graph.outputs) if t.name.endswith(".key")
    ]
    assert {(t.dtype, len(t.shape)) for t in caches} == {("int8", 4)}
    plan = json.loads((out / "plan.json").read_text())
    assert len(plan["kv_cache"]) == 4
    assert all(found["scale"] > 0 for found in plan["kv_cache"].values())
    for command in (["verify"], ["eval", "--bundle-only", *EVAL], ["inspect"],
                    ["run", "--prompt", "The", "--raw", "--max-new-tokens", "3"]):  # fmt: skip
        capsys.readouterr()
        assert main([command[0], str(out), *command[1:]]) == 0, capsys.readouterr().err


def test_dry_run_writes_nothing(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compile", str(tiny_model), str(out), "--dry-run", "--json", *SMALL]) == 0
    assert json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())


def test_calibration_shorter_than_one_window(
    tiny_model: Path, tmp_path: Path, export_once: Callable[..., int | None],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("iq_export.model.trace._export", export_once)
    text = tmp_path / "short.txt"
    text.write_text("A few words only.")
    argv = ["compile", str(tiny_model), str(tmp_path / "out"), "--calibration", str(text), *SMALL]
    assert main(argv) == 4
    assert "one window needs 64" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_calibration_of_one_repeated_token(
    compiled: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It compiles, but nobody can overlook what is missing."""
    text = tmp_path / "text.txt"
    text.write_text(" the" * 3000)
    argv = ["compile", str(tiny_model), str(tmp_path / "out"), "--calibration", str(text),
            *SMALL[:4], *SHAPES]  # fmt: skip
    assert main([*argv, "--work", str(compiled.parent / "work"), "--keep-work"]) == 0
    notes = Bundle.open(tmp_path / "out").manifest.notes
    (warning,) = [note for note in notes if "distinct tokens" in note]
    assert "(' the' alone is 100% of it)" in warning
    assert f"warning: {warning}" in capsys.readouterr().err


@pytest.fixture
def heeding_interrupts() -> Iterator[None]:
    """A suite that a shell has put into the background ignores them, and so would its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(stderr: TextIO, process: int, step: int) -> str:
    """What it says after a Ctrl-C as soon as the step's line appears; "" if it never does."""
    seen = ""
    while f"[{step}/" not in seen:
        character = stderr.read(1)
        if not character:
            return ""
        seen += character
    os.kill(process, signal.SIGINT)
    return stderr.read()


def left_nothing(code: int, said: str, folder: Path) -> None:
    assert code == 130, said
    assert {path.name for path in folder.iterdir()} <= {"work"}
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.usefixtures("heeding_interrupts")
def test_interrupt_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "iq_export.cli", "compile", str(tiny_model),
               str(tmp_path / "out"), *SMALL[:4], *SHAPES]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = interrupted(process.stderr, process.pid, 1)
    left_nothing(process.returncode, said, tmp_path)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as `heeding_interrupts`
    with Forks() as forks:
        signal.signal(signal.SIGINT, before)
        yield forks


@pytest.mark.slow
@pytest.mark.parametrize("step", range(2, 12))
def test_interrupt_of_a_later_step_leaves_nothing(
    compiled: Path, tiny_model: Path, tmp_path: Path, forks: Forks, step: int
) -> None:
    # The traced graph is found there, which saves most of the time.
    shutil.copytree(compiled.parent / "work", tmp_path / "work")
    process, stderr = forks.start(
        ["compile", str(tiny_model), str(tmp_path / "out"), *SMALL[:4], *SHAPES,
         "--work", str(tmp_path / "work")]
    )  # fmt: skip
    with stderr:
        said = interrupted(stderr, process, step)
    code = forks.code()
    if not said:
        assert code == 0
        pytest.skip(f"this compile has fewer than {step} steps")
    left_nothing(code, said, tmp_path)


IMAGE = "<image_soft_token>"


def add_token(folder: Path) -> None:
    """One token more than the model has rows, as Gemma's text models have for images."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"].append(
        {"id": 512, "content": IMAGE, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
    )  # fmt: skip
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.txt"
    path.write_text(f"{IMAGE} see the picture " * 300, encoding="utf-8")
    return str(path)


def names_the_token(capsys: pytest.CaptureFixture[str], *argv: str) -> bool:
    code, error = main(list(argv)), capsys.readouterr().err.splitlines()[-1]
    says = f"the token '{IMAGE}' with id 512, and the model's embedding table has 512 rows"
    return code == 4 and says in error


def test_a_token_beyond_the_table(
    compiled: Path, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named before the graph runs; a text without it is no trouble."""
    bundle = tmp_path / "bundle"
    shutil.copytree(compiled, bundle)
    add_token(bundle)
    update_manifest(Bundle.open(bundle, verify=False), rehash=["tokenizer.json"])
    small = ("--windows", "2", "--length", "64", "--bundle-only")
    assert names_the_token(capsys, "eval", str(bundle), "--text", picture, *small)
    assert names_the_token(capsys, "run", str(bundle), "--raw", "--prompt", f"hi {IMAGE}")
    assert main(["run", str(bundle), "--raw", "--prompt", "hi", "--max-new-tokens", "2"]) == 0


def test_calibration_with_a_token_beyond_the_table(
    tiny_model: Path, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "bundle"
    shutil.copytree(tiny_model, model)
    add_token(model)
    argv = ("compile", str(model), str(out), "--calibration", picture)
    assert names_the_token(capsys, *argv, "--samples", "4", "--length", "64")
    assert not out.exists()
