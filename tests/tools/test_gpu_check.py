"""The GPU check as far as it goes without a GPU: the folder, its parts, the record, the verdict."""

from __future__ import annotations

import ctypes
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from iq_export.engine.plugin import PluginBuild
from iq_export.engine.targets import RTX
from iq_export.engine.trt import TensorRT
from iq_export.errors import BundleError, UsageError
from iq_export.graph import io
from iq_export.pipeline import rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.run.ort import CausalLM
from iq_export.sinks.ops import DOMAIN
from tests import planted
from tests.plugins.calls import Rows
from tests.test_pipeline import calibration
from tools.gpu_check import __main__ as command
from tools.gpu_check import (
    bandwidth,
    engines,
    kernels,
    pack,
    report,
    run,
    sampling,
    statistics,
    steps,
)
from tools.gpu_check.parts import SUMS, split

# --- numbers --------------------------------------------------------------------------------------


def test_spread_and_paired_ratio_by_hand() -> None:
    assert statistics.spread([1, 2, 3, 4, 100]) == {"median": 3, "q1": 2, "q3": 4, "n": 5}
    # The machine is ten times slower in the second round: the ratio does not see it.
    assert statistics.paired_ratio([2, 20, 2], [1, 10, 1])["median"] == 2


def test_distance_by_hand() -> None:
    expected = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    found = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32)) + 3  # a shift is no KL
    far = statistics.distance(found, expected)
    kl = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert far["kl"] == pytest.approx(kl / 2, rel=1e-5)
    assert far["max_abs"] == pytest.approx(3 + np.log(1.5), rel=1e-5)
    assert (far["top1"], far["rows"]) == (0.5, 2)


# --- the folder -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A planted model in half precision and in W8A8, as the two bundles have them."""
    decoder = planted.WITH_DELIMITER
    found = {}
    for recipe in ("fp16", "w8a8"):
        folder = tmp_path_factory.mktemp(recipe)
        (folder / "work").mkdir()
        data = replace(calibration(decoder), insertion="norm")
        done = rewrite(
            planted.save(decoder, folder), folder / "work", load_recipe(recipe), "fp16", data,
            Progress(quiet=True),
        )  # fmt: skip
        found[recipe] = folder / "bundle"
        found[recipe].mkdir()
        io.save(io.load(done.quantized), found[recipe] / "model.onnx")
    return found


class _Tokenizer:
    def __init__(self, folder: Path) -> None:
        pass

    def encode(self, text: str, add_bos: bool) -> list[int]:
        return [1 + ord(letter) % 20 for letter in text]


@pytest.fixture
def packed(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[Any]]:
    """What `pack` makes, and the plans it asked for; compiling and fetching are fakes."""
    asked = []

    def build_plugin(folder: Path, architectures: list[int]) -> PluginBuild:
        folder.mkdir()
        (folder / "plugin.so").touch()
        asked.append(architectures)
        return PluginBuild(path=folder / "plugin.so")

    def build_engine(graph: Path, plan: Path, *_: Any, plugin: Path | None) -> None:
        asked.append((graph.parent.name, graph.name, plan.name, plugin is not None))
        plan.write_bytes(plan.name.encode())

    headers = tmp_path / "headers"
    headers.mkdir()
    (headers / "NvInferRuntime.h").touch()
    monkeypatch.setattr(pack, "_bundles", lambda _: bundles)
    monkeypatch.setattr(pack, "_wheels", lambda work, python, tensorrt: None)
    monkeypatch.setattr(pack, "find_headers", lambda: headers)
    monkeypatch.setattr(pack, "build_plugin", build_plugin)
    monkeypatch.setattr(pack, "build_engine", build_engine)
    monkeypatch.setattr(pack, "Tokenizer", _Tokenizer)
    monkeypatch.setattr(pack.metadata, "version", lambda _: "1.2.3")
    folder = pack.pack(pack.Options(tmp_path / "folder", [Path("given")]))
    return folder, asked


def test_pack(packed: tuple[Path, list[Any]], bundles: dict[str, Path]) -> None:
    folder, asked = packed
    index = run.read_index(folder)
    assert [e["name"] for e in index["engines"]] == [
        "fp16", "w8a8-body", "w8a8-plugin", "w8a8-body-bare", "w8a8-plugin-bare",
    ]  # fmt: skip
    # Plans of what ships, each from the graph that ships.
    assert asked == [
        [80, 86, 89, 120],
        ("fp16", "model.onnx", "fp16.plan", False),
        ("w8a8", "model.onnx", "w8a8-body.plan", False),
        ("w8a8", "model.onnx", "w8a8-plugin.plan", True),
    ]
    plans = {e["name"]: e["plan"] for e in index["engines"]}
    assert plans["w8a8-plugin"] == "plans/w8a8-plugin.plan" and not plans["w8a8-plugin-bare"]
    assert not list(folder.rglob("plugin.so"))
    # Weights are there once per bundle.
    assert sorted(p.parent.name for p in folder.rglob("*.data")) == ["fp16", "w8a8"]
    stored = np.load(folder / "reference" / "w8a8.npz")
    assert stored["ids"].shape == (4, pack.LENGTH)
    assert stored["logits"].shape[:2] == (4, pack.DECODED + 1)
    model = CausalLM(bundles["w8a8"] / "model.onnx", round_half=True)
    step = model.forward(
        stored["ids"], np.ones_like(stored["ids"]), np.arange(pack.LENGTH)[None].repeat(4, 0)
    )
    assert np.array_equal(step.logits[:, -1], stored["logits"][:, -1])


def test_engines_and_their_graphs(packed: tuple[Path, list[Any]]) -> None:
    folder, _ = packed
    found = {e["name"]: e for e in run.read_index(folder)["engines"]}

    def ops(name: str) -> list[str]:
        model = io.load(folder / found[name]["graph"])
        return [node.op_type for node in model.graph if node.domain == DOMAIN]

    assert "SinkDetect" in ops("w8a8-body") and found["w8a8-body"]["plugin_nodes"] == 0
    assert ops("w8a8-body-bare") == []
    assert any("Insert" in op and op.startswith("Add") for op in ops("w8a8-plugin"))
    assert found["w8a8-plugin"]["plugin_nodes"] == len(ops("w8a8-plugin"))
    bare = ops("w8a8-plugin-bare")
    assert bare and not any("Sink" in op or "Insert" in op or "Clamp" in op for op in bare)
    assert len(bare) == found["w8a8-plugin-bare"]["plugin_nodes"]
    assert found["fp16"]["linears"] == []
    decoder = planted.WITH_DELIMITER
    assert len(found["w8a8-body"]["linears"]) == 7 * decoder.blocks
    assert set(found["w8a8-body"]["linears"]) == set(found["w8a8-plugin-bare"]["linears"])


def test_indices_that_are_joined_go_as_well(staggered: planted.Planted) -> None:
    model = staggered.load_inserted()
    assert sum(node.op_type == "SinkDetect" for node in model.graph) > 1
    pack.remove_sinks(model)
    assert not [node for node in model.graph if node.domain == DOMAIN]
    bare = staggered.save_beside(model, "bare.onnx")
    assert np.isfinite(pack.reference(bare, np.ones((1, 12), np.int64), 3)).all()


def test_without_sink_ops_the_graph_runs(packed: tuple[Path, list[Any]]) -> None:
    folder, _ = packed
    ids = np.ones((1, 12), np.int64)
    logits = pack.reference(folder / "graphs" / "w8a8" / "bare.onnx", ids, 3)
    assert logits.shape == (1, 4, planted.WITH_DELIMITER.vocab) and np.isfinite(logits).all()


def test_the_folder_stands_alone(packed: tuple[Path, list[Any]]) -> None:
    """Its own code runs from it, with nothing of this checkout on the path."""
    folder, _ = packed
    arguments = ["run", ".", "--json", str(folder.parent / "out.json")]
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu_check", *arguments], cwd=folder, capture_output=True,
        text=True, check=False, env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    modules = ["kernels", "steps", "engines", "bandwidth", "report"]
    code = "; ".join(f"import tools.gpu_check.{m} as m; print(m.__file__)" for m in modules)
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin"},
    ).stdout.split()  # fmt: skip
    assert all(Path(path).is_relative_to(folder) for path in found)
    if done.returncode != run.SKIP_EXIT_CODE:
        pytest.skip("there is a GPU here")
    assert "no NVIDIA GPU" in done.stdout
    assert not (folder.parent / "out.json").exists()


def test_a_changed_or_missing_file_is_named(packed: tuple[Path, list[Any]]) -> None:
    folder, _ = packed
    path = folder / "reference" / "fp16.npz"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    with pytest.raises(BundleError, match=r"fp16\.npz' is not what was packed"):
        run.read_index(folder)
    path.unlink()
    with pytest.raises(BundleError, match=r"fp16\.npz' is missing"):
        run.read_index(folder)


def test_bundles_are_one_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_(folder: Path) -> Any:
        return SimpleNamespace(manifest=SimpleNamespace(recipe=folder.name))

    monkeypatch.setattr(pack.Bundle, "open", staticmethod(open_))
    assert list(pack._bundles([Path("a/w8a8"), Path("b/fp16")])) == ["fp16", "w8a8"]
    with pytest.raises(UsageError, match="these are: w8a8"):
        pack._bundles([Path("a/w8a8"), Path("b/w8a8")])


def test_bad_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["pack", "--out", str(tmp_path / "x"), "--target", "h100"]) == 2
    assert "builds on the device only" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_parts_fit_together(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    content = np.random.default_rng(0).bytes(2_500_000)
    (folder / "deep" / "big").write_bytes(content)
    (folder / "small").write_text("x")
    parts = split(folder, tmp_path / "parts", 1_000_000)
    assert [part.stat().st_size for part in parts[:-1]] == [1_000_000] * (len(parts) - 1)
    assert len(parts) == 3
    lines = (tmp_path / "parts" / SUMS).read_text().splitlines()
    assert lines[1] == f"{hashlib.sha256(parts[1].read_bytes()).hexdigest()}  {parts[1].name}"
    join = f"sha256sum -c --quiet {SUMS} && cat gpu_check.tar.* | tar -x -C {tmp_path / 'there'}"
    (tmp_path / "there").mkdir()
    subprocess.run(join, shell=True, check=True, cwd=tmp_path / "parts")
    assert (tmp_path / "there" / "folder" / "deep" / "big").read_bytes() == content


# --- steps ----------------------------------------------------------------------------------------


def _child(code: str) -> dict[str, Any]:
    return steps.child([sys.executable, "-c", code], {"PATH": "/usr/bin"}, Path())


def test_a_failing_step_hides_no_other(tmp_path: Path) -> None:
    record = steps.Record(tmp_path / "out.json", {"command": ["x"]})

    def skip() -> None:
        raise steps.Skipped("no tool")

    actions: dict[str, Callable[[], Any]] = {
        "dies": lambda: _child("import os; print('last', flush=True); os.abort()"),
        "reports": lambda: _child("print('words'); print('{\"error\": \"no SM90\"}'); exit(1)"),
        "raises": lambda: 1 // 0,
        "skips": skip,
        "works": lambda: _child("print('noise'); print('{\"a\": 1}')"),
    }
    for name, action in actions.items():
        record.step(name, action)
    record.step("behind", lambda: 1, after="dies")
    found = json.loads((tmp_path / "out.json").read_text())["steps"]
    assert {name: step["status"] for name, step in found.items()} == {
        "dies": "failed", "reports": "failed", "raises": "failed", "skips": "skipped",
        "works": "ok", "behind": "skipped",
    }  # fmt: skip
    assert found["dies"]["reason"].startswith("died of SIGABRT")
    assert "last" in found["dies"]["output"]
    assert found["reports"]["reason"] == "no SM90" and "words" in found["reports"]["output"]
    assert "ZeroDivisionError" in found["raises"]["reason"]
    assert found["works"]["result"] == {"a": 1}
    assert found["behind"]["reason"] == "needs dies, which failed"


def test_a_child_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_LIMIT", 0.5)
    with pytest.raises(steps.Failed, match="not finished"):
        _child("import time; time.sleep(60)")


def test_every_step_runs_where_tensorrt_refuses_everything(
    packed: tuple[Path, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A pretended GPU: bandwidth is missed, one plan's process dies, no engine can be built."""
    folder, _ = packed
    (folder / "wheels").mkdir()

    def python(self: Any, module: str, *arguments: str, watcher: Any = ()) -> dict[str, Any]:
        if module == "device":
            return {"name": "Pretended", "compute_capability": "9.0"}
        if module == "bandwidth":
            return bandwidth.table(_SECONDS, dict.fromkeys(_SECONDS, 100))
        if module == "kernels":
            return kernels.Totals(cases=1, codes=1).to_json()
        raise steps.Failed(f"{arguments[0]}: no SM90 here")

    monkeypatch.setattr(run._Here, "_python", python)
    monkeypatch.setattr(run._Here, "_build", lambda self: {"sm": 89})
    monkeypatch.setattr(run._Here, "_build_sampling", lambda self: {"sm": 89})
    monkeypatch.setattr(run, "device_compute_capability", lambda: 89)
    out = tmp_path / "out.json"
    assert command.main(["run", str(folder), "--json", str(out)]) == 1
    data = json.loads(out.read_text())
    found = {name: step["status"] for name, step in data["steps"].items()}
    assert found["kernels"] == "ok" and found["bandwidth"] == "failed"
    assert data["steps"]["bandwidth"]["result"]["kernels"]
    if found["unpack"] == "ok":  # this is the Python that was packed for
        assert data["steps"]["packed plan fp16"]["reason"] == "check: no SM90 here"
        assert found["engine fp16 serve"] == found["latency serve"] == "skipped"
        assert data["steps"]["build w8a8-plugin long"]["reason"] == "build: no SM90 here"
    assert data["plans"]["plans/fp16.plan"] == hashlib.sha256(b"fp16.plan").hexdigest()
    assert data["verdict"][-1].startswith("VERDICT: ")
    assert "not measured" in data["verdict"][-1]
    assert capsys.readouterr().out.strip().endswith(data["verdict"][-1])


def test_engines_are_skipped_at_once_where_they_cannot_run(
    packed: tuple[Path, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def python(self: Any, module: str, *arguments: str, watcher: Any = ()) -> Any:
        asked.append(module)
        raise steps.Failed("nothing runs here")

    monkeypatch.setattr(run._Here, "_python", python)
    monkeypatch.setattr(run._Here, "_build", lambda self: {"sm": 90})
    monkeypatch.setattr(run._Here, "_build_sampling", lambda self: {"sm": 90})
    monkeypatch.setattr(run, "device_compute_capability", lambda: 90)
    out = tmp_path / "out.json"
    assert command.main(["run", str(packed[0]), "--json", str(out)]) == 1
    found = json.loads(out.read_text())["steps"]
    assert list(found)[-1] == "engines" and found["engines"]["status"] == "skipped"
    assert "compute capability 9.0" in found["engines"]["reason"]
    assert "engines" not in asked and found["sampling"]["status"] == "failed"


def test_a_pack_of_kernels_needs_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = tmp_path / "headers"
    headers.mkdir()
    monkeypatch.setattr(pack, "find_headers", lambda: headers)
    monkeypatch.setattr(pack, "_wheels", lambda work, python, tensorrt: None)
    monkeypatch.setattr(pack.metadata, "version", lambda _: "1.2.3")
    monkeypatch.setattr(pack, "_compile", lambda out: pytest.fail("a bundle is compiled"))
    assert command.main(["pack", "--kernels", "--out", str(tmp_path / "folder")]) == 0
    index = run.read_index(tmp_path / "folder")
    assert index["engines"] == [] and "plugins/src/kernels.cu" in index["files"]


# --- kernels, bandwidth ---------------------------------------------------------------------------


def test_the_same_kernels_miss_no_bar(host: ctypes.CDLL) -> None:
    totals = kernels.compare(Rows(host), Rows(host, 128), 12, 3)
    assert totals.reasons() == [] and totals.first == []
    assert totals.cases == 12 and totals.rows > 0 and totals.codes > 0 and totals.steps > 0


class _Wrong(Rows):
    """Every op is off a little."""

    def detect(self, *arguments: Any) -> np.ndarray:
        return super().detect(*arguments) ^ 1

    def change(self, *arguments: Any) -> np.ndarray:
        return np.nextafter(super().change(*arguments).astype(np.float32), np.float32(1e9))


def test_wrong_kernels_are_found(host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    totals = kernels.Totals()
    rng = np.random.default_rng(0)
    x, templates = kernels._rows(rng, "float32", 60, 64)
    kernels._sinks(rng, _Wrong(host), Rows(host), x, templates, totals, "here")
    reasons = " ".join(totals.reasons())
    assert "sink indices differ" in reasons and "inserted rows differ" in reasons
    assert any("here" in case for case in totals.first)


def test_the_norm_error_is_found_from_codes() -> None:
    """Norms that are off by 1e-4 flip as many codes as the estimate needs."""
    rng = np.random.default_rng(1)
    values = rng.uniform(-120, 120, 2_000_000)
    flips = np.rint(values) != np.rint(values * (1 + 1e-4))
    totals = kernels.Totals(codes=1, flips=int(flips.sum()), steps=float(np.abs(values).sum()))
    assert totals.norm_error == pytest.approx(1e-4, rel=0.1)
    assert "norms differ" in " ".join(totals.reasons())


def test_what_is_timed_is_the_ops(host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timed launches on a CPU: every call succeeds, the norm's and the product's are right."""
    torch = pytest.importorskip("torch")
    given: list[Any] = []

    def pointer(value: Any) -> Any:
        given.append(value)
        return as_pointer(value)

    as_pointer = bandwidth._pointer
    monkeypatch.setattr(bandwidth, "_pointer", pointer)
    monkeypatch.setattr(bandwidth, "_DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    calls, moved = bandwidth._calls(host, rows=128, hidden=512)
    assert list(calls) == list(moved) and set(bandwidth.SHARES) < set(calls)
    for name, call in calls.items():
        for turn in range(bandwidth.SETS + 1):
            call(turn)
        assert moved[name] > 128 * 512
    assert moved["rms norm"] == 128 * 512 * 7 + 512 * 2
    assert moved["rms norm + insert"] == moved["rms norm"] + 128 * 4

    def arguments(name: str) -> list[Any]:
        given.clear()
        calls[name](1)
        return [v.numpy() if hasattr(v, "numpy") else v for v in given]

    rows = Rows(host)
    table = arguments("insert")[3]
    x, branch, weight, bias, index, inserted, epsilon, scale, *_, total, codes = arguments(
        "rms norm + insert"
    )
    expected = rows.add_norm(x, branch, weight, bias, index, table, epsilon, scale)
    assert np.array_equal(total, expected[0]) and np.array_equal(codes, expected[1])
    assert inserted.dtype == np.int8 and np.array_equal(codes[0], inserted[0])
    assert (index > 0).sum() == 2 and codes.any()
    gate, up, index, block, factor, scale, *_, codes = arguments("gated product, blocks of 64")
    expected_codes, _ = rows.silu_mul(gate, up, index, None, block, factor, scale)
    assert np.array_equal(codes, expected_codes) and codes.any()


_SECONDS = {
    "copy": [1.0, 1.0, 2.0], "rms norm": [1.0, 1.0, 2.0], "rms norm + insert": [1.1, 1.1, 2.2],
    "gated product, blocks of 64": [1.3, 1.3, 2.6],
    "gated product, blocks of 512": [1.0, 1.0, 2.0], "detect": [1.0, 1.0, 2.0],
}  # fmt: skip


def test_bandwidth_table_by_hand() -> None:
    sizes = {"copy": 100, "rms norm": 100, "rms norm + insert": 110,
             "gated product, blocks of 64": 104, "gated product, blocks of 512": 78,
             "detect": 79}  # fmt: skip
    found = bandwidth.table(_SECONDS, sizes)
    assert found["kernels"]["rms norm + insert"]["of_copy"]["median"] == pytest.approx(1)
    assert found["kernels"]["gated product, blocks of 64"]["of_copy"]["median"] == pytest.approx(
        0.8
    )
    assert found["insertion"]["median"] == pytest.approx(1.1)
    assert found["missed"] == [
        "gated product, blocks of 64 has 80% of the copy's bandwidth",
        "detect has 79% of the copy's bandwidth", "insertion costs 1.100 x",
    ]  # fmt: skip


# --- engines --------------------------------------------------------------------------------------


def test_sampling_bars_by_hand() -> None:
    times = {"greedy": 12.0, "top-p": 60.1}
    assert sampling.missed(times, []) == ["top-p: 60.1 us"]
    assert sampling.missed({"greedy": 60.0}, ["a", "b"]) == ["2 differences"]


def test_random_rows_of_all_kinds() -> None:
    rng = np.random.default_rng(0)
    cases = [sampling.random_case(rng, 1000) for _ in range(200)]
    assert {case.kind for case in cases} == set(sampling.KINDS)
    assert {case.type for case in cases} == set(sampling.TYPES)
    assert max(case.logits.shape[-1] for case in cases) == 1000
    bad = {case.kind for case in cases if not np.isfinite(case.logits[:, -1]).all()}
    assert bad == {"nan", "inf", "-inf"}


def test_products_by_layer() -> None:
    names = [f"layers.{i}/mlp/{kind}_proj" for i in (1, 11) for kind in ("up", "down")]
    layers = [
        {"LayerType": "gemm", "Name": names[0], "Inputs": [{"Format/Datatype": "Int8 row"}]},
        {"LayerType": "gemm", "Metadata": f"[ONNX Layer: {names[1]}]",
         "Inputs": [{"Format/Datatype": "Half"}]},
        # A quantizer of the product's weight is not the product.
        {"LayerType": "Dequantize", "Name": names[2], "Inputs": [{"Format/Datatype": "Int8"}]},
        {"LayerType": "gemm", "Name": f"{names[3]}.weight", "Inputs": []},
        "a name only",
    ]  # fmt: skip
    found = engines.products(layers, names)
    assert found == {"int8": 1, "other": [names[1]], "not named": 2, "of": 4, "layers": 5}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("sm80_xmma_gemm_i8i32_i8i8_tn", True), ("cutlass_80_tensorop_i16832gemm_s8_128", True),
     ("sm90_xmma_gemm_f16f16", False), ("iq_normKernel", False)],
)  # fmt: skip
def test_int8_kernels_by_name(name: str, expected: bool) -> None:
    assert bool(engines._INT8_KERNEL.search(name)) is expected


def test_the_cache_of_a_step_is_the_past_of_the_next() -> None:
    outputs = {"logits": 0, "present.0.key": 1, "present.0.value": 2, "present_sinks.0": 3}
    assert engines.present_as_past(outputs) == {
        "past_key_values.0.key": 1, "past_key_values.0.value": 2, "past_sinks.0": 3,
    }  # fmt: skip


class _OnCpu(engines.Engine):
    """An engine whose TensorRT is ONNX Runtime: names, shapes and raw addresses as TensorRT's."""

    def __init__(self, model: Path) -> None:
        self.session = CausalLM(model)._session
        self.given = {value.name: value for value in self.session.get_inputs()}
        self.taken = {value.name: value for value in self.session.get_outputs()}
        self.inputs, self.outputs = list(self.given), list(self.taken)
        self.engine = self.context = self
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.at: dict[str, int] = {}

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.given:
            return tuple(d if isinstance(d, int) else -1 for d in self.given[name].shape)
        sizes = {}
        for known, shape in self.shapes.items():
            sizes |= dict(zip(self.given[known].shape, shape, strict=True))
        return tuple(sizes.get(d, d) for d in self.taken[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        kind = {**self.given, **self.taken}[name].type
        names = {"float16": "HALF", "float": "FLOAT", "int64": "INT64", "int32": "INT32"}
        return SimpleNamespace(name=names[kind.removeprefix("tensor(").removesuffix(")")])

    def get_tensor_profile_shape(self, name: str, _: int) -> list[tuple[int, ...]]:
        low = tuple(max(d, 0) for d in self.get_tensor_shape(name))
        high = tuple(40 if d < 0 else d for d in self.get_tensor_shape(name))
        return [low, high, high]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.at[name] = address

    def execute_async_v3(self, _: int) -> bool:
        kinds = {"HALF": np.float16, "FLOAT": np.float32, "INT64": np.int64, "INT32": np.int32}
        feeds = {}
        for name, shape in self.shapes.items():
            feeds[name] = np.zeros(shape, kinds[self.get_tensor_dtype(name).name])
            ctypes.memmove(feeds[name].ctypes.data, self.at[name], feeds[name].nbytes)
        for name, value in zip(self.outputs, self.session.run(self.outputs, feeds), strict=True):
            assert value.shape == self.get_tensor_shape(name)
            ctypes.memmove(self.at[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)
        return True


@pytest.mark.parametrize("recipe", ["fp16", "w8a8"])
def test_decoding_through_the_cache_is_the_reference(
    bundles: dict[str, Path], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    stream = SimpleNamespace(cuda_stream=0, wait_stream=lambda _: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(engines, "_DEVICE", "cpu")
    model = bundles[recipe] / "model.onnx"
    ids = np.random.default_rng(0).integers(1, planted.WITH_DELIMITER.vocab, (3, 24))
    engine = _OnCpu(model)
    found = engines.decode(engine, torch.from_numpy(ids), 5)
    far = statistics.distance(found, pack.reference(model, ids, 5))
    assert (far["rows"], far["top1"]) == (18, 1.0) and far["kl"] < 1e-4
    assert engine.why_not(1, 24, 0) == ""
    assert "input_ids [1, 48] is outside of the plan's" in engine.why_not(1, 48, 0)


def test_no_capabilities_aim_at_the_device_itself() -> None:
    class Config:
        def set_compute_capability(self, value: str, position: int) -> None:
            self.aim = (value, position)

    config: Any = Config()
    capability = SimpleNamespace(__members__={"CURRENT": "current"})
    module: Any = SimpleNamespace(__version__="1.7", ComputeCapability=capability)
    TensorRT(RTX, module).set_compute_capabilities(config, ())
    assert (config.num_compute_capabilities, config.aim) == (1, ("current", 0))


# --- table and verdict ----------------------------------------------------------------------------


def _steps(prefill: float, decode: float, sinks: float) -> dict[str, dict[str, Any]]:
    """A made-up run: W8A8 with the plugin takes that many times fp16's milliseconds."""

    def times(factor: float) -> dict[str, Any]:
        plugin = [2 * factor, 4 * factor]
        bare = [sample / sinks for sample in plugin]
        samples = {"fp16": [2.0, 4.0], "w8a8-plugin": plugin, "w8a8-plugin-bare": bare}
        return engines.with_ratios(samples)

    skipped = {"skipped": "no capture"}
    cases = {
        "prefill 512": {"stream": times(prefill), "cuda graph": skipped},
        "decode batch 1": {"stream": times(decode), "cuda graph": skipped},
        "prefill 2048": {"skipped": "input_ids [1, 2048] is outside of the plan's profile"},
    }
    done = {"status": "ok", "reason": "", "seconds": 1.0, "output": ""}
    far = {"top1": 0.9, "max_abs": 0.1, "kl": 1e-3, "rows": 36}
    return {
        "latency serve": {**done, "result": {"cases": cases}},
        "engine w8a8-plugin serve": {**done, "result": {"logits": far}},
        "packed plan fp16": {**done, "status": "failed", "reason": "no | SM90", "result": None},
    }


def test_the_verdict_says_where_int8_is_slower() -> None:
    lines = report.verdict(_steps(prefill=0.5, decode=1.2, sinks=1.004))
    assert lines[0] == "packed plan fp16 failed: no | SM90"
    assert "+0.4%" in lines[1]
    assert lines[-1] == (
        "VERDICT: 1 failed or over a bar, 0 skipped, of 3 steps; INT8 is SLOWER than fp16 on "
        "decode batch 1 (w8a8-plugin, stream): 1.20 x"
    )


def test_the_verdict_of_a_fast_int8_with_dear_sinks() -> None:
    lines = report.verdict(_steps(prefill=0.5, decode=0.9, sinks=1.05))
    assert "+5.0%" in lines[1]
    assert lines[-1] == (
        "VERDICT: 2 failed or over a bar, 0 skipped, of 3 steps; INT8 is faster than fp16 in all "
        "2 cases"
    )


def test_the_table() -> None:
    text = report.markdown({"steps": _steps(0.5, 1.2, 1.0)})
    assert "| packed plan fp16 | failed | 1 s | no / SM90 |" in text
    assert "| engine w8a8-plugin serve | 90.0% | 0.100 | 1.0e-03 |" in text
    assert "| decode batch 1 | stream | w8a8-plugin | 3.600 ms (3.000 - 4.200) | 1.200 |" in text
    assert "| prefill 2048 | skipped | input_ids [1, 2048] is outside" in text
    widths = {line.count("|") for line in text.split("\n\n")[-1].splitlines()}
    assert len(widths) == 1


def test_the_manifest_carries_the_verdict(tmp_path: Path) -> None:
    from iq_export.bundle.manifest import Manifest, record_files
    from iq_export.bundle.package import Bundle
    from tests.tiny_bundle import fill

    folder = tmp_path / "bundle"
    folder.mkdir()
    Manifest(
        name="tiny", recipe="w8a8", dtype="float16", opset=23, notes=["one"],
        files=record_files(fill(folder)),
    ).write(folder)  # fmt: skip
    result = tmp_path / "out.json"
    verdict = ["words", "VERDICT: fine"]
    steps_ = {"device": {"result": {"name": "Pretended"}}}
    result.write_text(json.dumps({"steps": steps_, "verdict": verdict}))
    assert command.main(["note", str(result), str(folder)]) == 0
    notes = Bundle.open(folder).manifest.notes
    assert notes == ["one", "gpu_check on Pretended: VERDICT: fine"]
