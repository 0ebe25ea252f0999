"""A dry run refuses what a compile would refuse, before a weight is read, and says what it leaves
out; a compile whose engine fails at the end keeps everything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from iq_export import precheck
from iq_export.bundle.package import Bundle
from iq_export.cli import main
from iq_export.engine import trt
from iq_export.errors import EngineError, UsageError
from tests import planted

RTX = pytest.mark.skipif("tensorrt_rtx" not in trt.available(), reason="no TensorRT for RTX")
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 264, "max_position_embeddings": 2048,
}  # fmt: skip


def folder(path: Path, kind: str = "llama", **changes: Any) -> Path:
    """A model folder whose weights are a safetensors file of no tensor: nothing may load it."""
    path.mkdir()
    record = {"model_type": kind, **SIZES, **changes}
    record = {key: value for key, value in record.items() if value is not None}
    (path / "config.json").write_text(json.dumps(record))
    (path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (path / "tokenizer.json").write_text("{}")
    return path


class Both:
    """The outcome of a dry run; a compile that must be refused ends the same."""

    def __init__(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.out, self.capsys = tmp_path / "out", capsys

    def plan(self, model: Path, *argv: str) -> dict[str, Any]:
        code = main(["compile", str(model), str(self.out), "--dry-run", "--json", *argv])
        streams = self.capsys.readouterr()
        assert code == 0, streams.err
        plan: dict[str, Any] = json.loads(streams.out)
        return plan

    def refused(self, model: Path, *argv: str) -> tuple[int, str]:
        found = []
        for dry in ((), ("--dry-run",)):
            code = main(["compile", str(model), str(self.out), "--quiet", *dry, *argv])
            found.append((code, self.capsys.readouterr().err))
            assert not list(self.out.parent.glob("*out*"))
        assert found[0] == found[1]
        (line,) = found[0][1].splitlines()
        assert line.startswith("iq-export: error: ")
        return found[0]


@pytest.fixture
def both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Both:
    return Both(tmp_path, capsys)


def test_a_plan_promises_what_is_known(both: Both, tmp_path: Path) -> None:
    plan = both.plan(folder(tmp_path / "m"))
    assert plan["sites"] == "the weighted products of 2 blocks"
    assert plan["notes"] == []
    assert "16 windows of 512 tokens" in plan["calibration"]


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("gpt_oss", {"num_local_experts": 4}, "sinks of its own"),
        ("doge", {}, "not recognised"),
        ("qwen3_next", {}, "layers"),
        ("bert", {}, "encoder"),
        ("llama", {"num_attention_heads": 0}, "'num_attention_heads' is 0"),
        ("llama", {"vocab_size": 10**13}, "GB of memory to be compiled"),
    ],
)
def test_an_architecture(
    both: Both, tmp_path: Path, kind: str, changes: dict[str, Any], says: str
) -> None:
    code, error = both.refused(folder(tmp_path / "m", kind, **changes))
    assert (code, says in error) == (3, True), error


def test_int4_blocks(both: Both, tmp_path: Path) -> None:
    model = folder(tmp_path / "m", intermediate_size=288)
    code, error = both.refused(model, "--recipe", "w4a16")
    assert (code, "288 inputs (intermediate_size)" in error) == (2, True), error
    assert both.plan(model, "--recipe", "w8a8")


@RTX
@pytest.mark.parametrize(
    ("changes", "argv", "says"),
    [
        ({}, ("--dtype", "fp32"), "no Attention kernel in float32"),
        ({"kind": "gemma2", "head_dim": 64}, (), "takes no softcap"),
        ({"head_dim": 20}, (), "no Attention kernel for heads of 20"),
        ({"head_dim": 264}, (), "no Attention kernel for heads of 264"),
    ],
)
def test_what_the_builder_lacks(
    both: Both, tmp_path: Path, changes: dict[str, Any], argv: tuple[str, ...], says: str
) -> None:
    """The default target's engine is left out and that is said; one that was asked for is not."""
    model = folder(tmp_path / "m", **changes)
    plan = both.plan(model, *argv)
    (note,) = plan["notes"]
    assert says in note and "rtx-ampere" in note
    assert says in plan["targets"][0] and "Build engines" not in plan["steps"]
    code, error = both.refused(model, *argv, "--target", "rtx-ada")
    assert (code, says in error, "Without --target" in error) == (6, True, True), error


def test_softcap_on_a_device_elsewhere_is_a_note(both: Both, tmp_path: Path) -> None:
    plan = both.plan(folder(tmp_path / "m", "gemma2", head_dim=64), "--target", "orin")
    assert any("takes no softcap" in note for note in plan["notes"])


@RTX
def test_a_later_tensorrt_is_tried(
    both: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "installed_version", lambda flavour: "1.8.0")
    argv = ("--dtype", "fp32", "--target", "rtx-ada")
    assert both.plan(folder(tmp_path / "m"), *argv)["notes"] == []


def test_targets_are_counted_once(both: Both, tmp_path: Path) -> None:
    argv = ("--target", "orin", "--target", "Orin", "--target", "h100", "--target", "orin")
    plan = both.plan(folder(tmp_path / "m"), *argv)
    assert [line.partition(":")[0] for line in plan["targets"]] == ["orin", "h100"]


def test_lengths_beyond_a_table_of_positions(both: Both, tmp_path: Path) -> None:
    table = folder(tmp_path / "m", "gpt_bigcode", n_positions=256, max_position_embeddings=None)
    plan = both.plan(table)
    assert "16 windows of 256 tokens" in plan["calibration"]
    assert plan["shapes"].endswith("seq 1 to 128, past 0 to 128")
    assert len(plan["notes"]) == 2 and all("256 positions" in note for note in plan["notes"])
    code, error = both.refused(table, "--length", "300")
    assert (code, "256 positions" in error) == (2, True), error
    code, error = both.refused(table, "--maxShapes", "seq:200,past:100")
    assert (code, "at most 256" in error) == (2, True), error
    assert both.plan(table, "--length", "64", "--maxShapes", "seq:64,past:192")["notes"] == []


def test_lengths_beyond_what_a_rotation_was_trained_for(both: Both, tmp_path: Path) -> None:
    model = folder(tmp_path / "m", max_position_embeddings=64)
    plan = both.plan(model, "--length", "128", "--maxShapes", "seq:4096,past:32768")
    assert "windows of 128 tokens" in plan["calibration"] and len(plan["notes"]) == 2
    assert "windows of 64 tokens" in both.plan(model)["calibration"]


def test_a_hub_model_is_checked_before_its_download(
    both: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    import huggingface_hub

    model = folder(tmp_path / "m", "gpt_oss", num_local_experts=4)
    names = {"config.json": 10, "tokenizer.json": 10, "model.safetensors": 4_000_000_000}

    class Api:
        def model_info(self, *_: Any, **__: Any) -> Any:
            return SimpleNamespace(
                siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in names.items()]
            )

    def fetch(name: str, file: str, **_: Any) -> str:
        return str(model / file)

    def download(*_: Any, **__: Any) -> str:
        raise AssertionError("it was downloaded")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    code, error = both.refused(Path("org/name"))
    assert (code, "sinks of its own" in error) == (3, True), error
    del names["model.safetensors"]
    names["pytorch_model.bin"] = 4_000_000_000
    code, error = both.refused(Path("org/name"))
    assert (code, "pytorch_model.bin" in error) == (3, True), error
    model = folder(tmp_path / "good")
    names["model.safetensors"] = 4_000_000_000
    plan = both.plan(Path("org/name"))
    assert plan["model"] == "org/name (hub)" and plan["memory"].startswith("about")


def test_without_the_hub_a_dry_run_says_what_it_does_not_know(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def fail(*_: Any, **__: Any) -> str:
        raise errors.LocalEntryNotFoundError("no")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    plan = both.plan(Path("org/name"))
    assert "checked after its download" in plan["notes"][0]
    assert plan["memory"] == "known after download"


@pytest.fixture(scope="module")
def without_engine(
    tiny_model: Path,
    export_once: Callable[..., int | None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A bundle for two targets of which one was refused at the end, and what `--json` printed."""
    if "tensorrt_rtx" not in trt.available():
        pytest.skip("no TensorRT for RTX")
    import contextlib
    import io
    import sys

    from iq_export import compile as module_or_function  # noqa: F401

    module = sys.modules["iq_export.compile"]
    real = module.build_engine  # type: ignore[attr-defined]

    def refuse(onnx: Path, plan: Path, target: Any, *args: Any, **options: Any) -> Any:
        if target.name == "rtx-ampere":
            raise EngineError(f"TensorRT cannot parse '{onnx}': it does not like it.")
        return real(onnx, plan, target, *args, **options)

    out = tmp_path_factory.mktemp("failed") / "bundle"
    argv = ["compile", str(tiny_model), str(out), "--recipe", "fp16", "--samples", "1",
            "--length", "32", "--insertion", "norm", "--maxShapes", "batch:2,seq:64,past:64",
            "--target", "rtx-ampere", "--target", "rtx-ada", "--json"]  # fmt: skip
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "build_engine", refuse)
        patch.setattr("iq_export.model.trace._export", export_once)
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            assert main(argv) == 6
    error = stderr.getvalue().splitlines()[-1]
    assert error.startswith(f"iq-export: error: {out} is complete but for the engine of rtx-ampere")
    assert f"iq-export build {out} --target rtx-ampere" in error
    assert ".partial" not in stderr.getvalue()
    yield out, json.loads(stdout.getvalue())


def test_the_bundle_is_whole_without_the_engine(
    without_engine: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, document = without_engine
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    assert main(["verify", str(out), "--quiet"]) == 0
    manifest = Bundle.open(out).manifest
    assert list(manifest.graph.engines) == ["rtx-ada"]
    assert list(manifest.graph.engine_failures) == ["rtx-ampere"]
    reason = manifest.graph.engine_failures["rtx-ampere"]
    assert reason == "TensorRT cannot parse 'model.onnx': it does not like it."
    assert f"no engine for 'rtx-ampere': {reason}" in manifest.notes
    assert document["graphs"][0]["engine_failures"] == manifest.graph.engine_failures
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    assert f"rtx-ampere: FAILED: {reason}" in capsys.readouterr().out


def test_a_later_build_clears_the_failure(
    without_engine: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = shutil.copytree(without_engine[0], tmp_path / "copy")
    assert main(["build", str(out), "--target", "rtx-ampere", "--quiet"]) == 0
    manifest = Bundle.open(out).manifest
    assert sorted(manifest.graph.engines) == ["rtx-ada", "rtx-ampere"]
    assert manifest.graph.engine_failures == {}
    assert not any("rtx-ampere" in note for note in manifest.notes)
    assert main(["verify", str(out), "--quiet"]) == 0


def test_a_target_that_fails_to_build_stops_no_other(
    without_engine: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from iq_export.cli import build

    real = build.build_engine

    def refuse(onnx: Path, plan: Path, target: Any, *args: Any, **options: Any) -> Any:
        if target.name == "rtx-turing":
            raise EngineError("it does not like it.")
        return real(onnx, plan, target, *args, **options)

    monkeypatch.setattr(build, "build_engine", refuse)
    out = shutil.copytree(without_engine[0], tmp_path / "copy")
    argv = ["build", str(out), "--target", "rtx-turing", "--target", "rtx-ampere", "--quiet"]
    assert main(argv) == 6
    streams = capsys.readouterr()
    assert "it does not like it" in streams.err and "rtx-ampere.plan" in streams.out
    assert sorted(Bundle.open(out).manifest.graph.engines) == ["rtx-ada", "rtx-ampere"]


@RTX
def test_a_plugin_that_cannot_be_compiled_keeps_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--plugin on` is said to lack nvcc before the first step, and costs the engines at most."""
    import importlib

    from iq_export.engine import plugin
    from iq_export.progress import Progress

    monkeypatch.setattr(plugin, "find_nvcc", lambda: None)
    module = importlib.import_module("iq_export.compile")
    options = module.CompileOptions(
        str(folder(tmp_path / "m")), tmp_path / "out", targets=("rtx-ampere",), plugin="on"
    )
    checked = precheck.check(options)
    (note,) = checked.notes
    assert note.startswith("with --plugin on there is no engine if the model has sinks: nvcc")
    built = module._build(tmp_path, checked.options, checked, 1, Progress(quiet=True))
    assert built.engines == {}
    assert "nvcc was not found" in built.failures["rtx-ampere"]


def test_a_limit_that_only_the_traced_model_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a GGUF file: defaults are shortened then, and what was asked for is refused."""
    import importlib
    from dataclasses import replace

    from iq_export.model.limits import PositionLimit
    from iq_export.progress import Progress

    module = importlib.import_module("iq_export.compile")
    options = precheck.CompileOptions(str(folder(tmp_path / "m")), tmp_path / "out")
    known = precheck.check(options)
    checked = replace(known, known=replace(known.known, limit=None))
    limit, progress = PositionLimit(256, True, "so it is"), Progress(quiet=True)
    soft = replace(limit, hard=False)  # the file stated one; only a table in the graph outdoes it
    assert precheck.with_limit(known, soft, progress) is known
    assert precheck.with_limit(known, limit, progress).options.length == 256
    assert module._not_yet(checked) == []
    gguf = replace(checked, source=replace(known.source, kind="gguf"))
    assert "shows when the GGUF file is loaded" in module._not_yet(gguf)[0]
    settled = precheck.with_limit(checked, limit, progress)
    assert (settled.options.length, settled.options.profile.seq.max) == (256, 128)
    assert len(settled.notes) == len(known.notes) + 2
    asked = replace(checked, asked=replace(options, length=300))
    with pytest.raises(UsageError, match="--length 256 or less"):
        precheck.with_limit(asked, limit, progress)


def test_onnx_files(both: Both, tmp_path: Path) -> None:
    """Broken ones are the model's fault; what their Attention asks for is read in the graph."""
    onnx = pytest.importorskip("onnx")
    from onnx import helper

    model = tmp_path / "m.onnx"
    model.write_bytes(b"no protobuf")
    tokenizer = ("--tokenizer", str(folder(tmp_path / "t", n_positions=256)))
    code, error = both.refused(model, *tokenizer)
    assert (code, "not an ONNX file" in error) == (3, True), error
    shape = ["batch", 1, "past", 20]
    info = helper.make_tensor_value_info("past_key_values.0.key", 1, shape)
    node = helper.make_node("Attention", [info.name] * 3, ["y"], softcap=50.0)
    graph = helper.make_graph([node], "g", [info], [helper.make_tensor_value_info("y", 1, shape)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), model)
    assert any("softcap" in note for note in both.plan(model, *tokenizer)["notes"])
    (tmp_path / "p").mkdir()
    table = planted.save(planted.Decoder(positions=64), tmp_path / "p")
    assert "windows of 64 tokens" in str(both.plan(table, *tokenizer)["notes"])
