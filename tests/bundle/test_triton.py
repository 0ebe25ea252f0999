"""A model repository says what the engine has, and is written whole or not at all."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from iq_export.bundle import triton
from iq_export.bundle.lock import MARK
from iq_export.bundle.manifest import GraphInfo, Manifest, TensorInfo
from iq_export.bundle.package import Bundle
from iq_export.bundle.triton import max_batch_size, write_repository
from iq_export.errors import BundleError, EngineError, IqError, UsageError
from tests.tiny_bundle import engine_record
from tests.triton import PROFILE, parse_config, report, schema, tensors, write_bundle


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(write_bundle(tmp_path / "out", report()))


def test_the_plan_and_nothing_else_is_in_the_version(bundle: Bundle, tmp_path: Path) -> None:
    model = write_repository(bundle, tmp_path / "repo")
    assert model.written and model.folder == tmp_path / "repo" / "tiny"
    found = files(tmp_path / "repo")
    assert set(found) == {"tiny/config.pbtxt", "tiny/README.md", "tiny/1/model.plan"}
    assert found["tiny/1/model.plan"] == b"plan of h100"


def test_config_is_triton_s_and_says_what_the_engine_has(bundle: Bundle, tmp_path: Path) -> None:
    config = parse_config(write_repository(bundle, tmp_path / "repo").folder)
    kind = schema()
    assert (config.name, config.backend, config.platform) == ("tiny", "tensorrt", "tensorrt_plan")
    assert config.max_batch_size == PROFILE.batch.max == 8
    assert config.HasField("dynamic_batching")
    assert config.version_policy.latest.num_versions == 1
    (group,) = config.instance_group
    assert group.kind == kind.ModelInstanceGroup.KIND_GPU and list(group.profile) == ["0"]
    inputs = {t.name: (t.data_type, list(t.dims)) for t in config.input}
    outputs = {t.name: (t.data_type, list(t.dims)) for t in config.output}
    assert list(inputs) == [t.name for t in bundle.manifest.graph.inputs]
    assert list(outputs) == [t.name for t in bundle.manifest.graph.outputs]
    assert inputs["input_ids"] == (kind.TYPE_INT64, [-1])
    assert inputs["past_key_values.1.value"] == (kind.TYPE_FP16, [3, -1, 64])
    assert outputs["logits"] == (kind.TYPE_FP16, [-1, 50])
    assert outputs["present.0.key"] == (kind.TYPE_FP16, [3, -1, 64])


def test_int8_cache_and_its_sinks(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "out", report(), **tensors("int8", sinks=True))
    config = parse_config(write_repository(Bundle.open(folder), tmp_path / "repo").folder)
    inputs = {t.name: (t.data_type, list(t.dims)) for t in config.input}
    assert inputs["past_key_values.0.key"] == (schema().TYPE_INT8, [3, -1, 64])
    assert inputs["past_sinks.0"] == (schema().TYPE_INT32, [-1])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float", "TYPE_FP32"), ("bfloat16", "TYPE_BF16"), ("bool", "TYPE_BOOL"),
     ("uint8", "TYPE_UINT8"), ("int32", "TYPE_INT32")],
)  # fmt: skip
def test_every_type(tmp_path: Path, dtype: str, expected: str) -> None:
    folder = write_bundle(tmp_path / "out", report(), **tensors(dtype))
    config = parse_config(write_repository(Bundle.open(folder), tmp_path / "repo").folder)
    assert config.input[3].data_type == getattr(schema(), expected)


def test_onnx_types_are_named_as_in_a_manifest() -> None:
    ir = pytest.importorskip("onnx_ir")
    from iq_export.bundle.triton import _TYPES

    assert set(_TYPES) <= {kind.name.lower() for kind in ir.DataType}


@pytest.mark.parametrize(
    "shape", [[3, "batch", "past", 64], ["past", "batch"], ["batch", "batch"], ["batch"], []]
)
def test_requests_are_joined_only_where_every_tensor_leads_with_the_batch(
    tmp_path: Path, shape: list[int | str]
) -> None:
    interface = tensors()
    interface["inputs"].append(TensorInfo("odd", "float16", shape))
    folder = write_bundle(tmp_path / "out", report(), **interface)
    config = parse_config(write_repository(Bundle.open(folder), tmp_path / "repo").folder)
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [-1, -1]
    assert list(config.input[-1].dims) == [size if isinstance(size, int) else -1 for size in shape]


def test_one_row_is_not_joined(tmp_path: Path) -> None:
    profile = replace(PROFILE, batch=replace(PROFILE.batch, max=1))
    folder = write_bundle(tmp_path / "out", report(profile=profile.to_json()))
    config = parse_config(write_repository(Bundle.open(folder), tmp_path / "repo").folder)
    assert config.max_batch_size == 1 and not config.HasField("dynamic_batching")
    manifest = Manifest("m", "w8a8", "fp16", 23, graphs=[GraphInfo(**tensors())])
    assert max_batch_size(manifest, profile) == 1


def test_onnxruntime_serves_any_bundle(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "out", report("rtx-ada", flavour="tensorrt_rtx"))
    model = write_repository(Bundle.open(folder), tmp_path / "repo", backend="onnxruntime")
    config = parse_config(model.folder)
    assert (config.backend, config.platform) == ("onnxruntime", "onnxruntime_onnx")
    assert config.max_batch_size == 8 and not config.instance_group
    found = files(model.folder)
    assert found["1/model.onnx"] == b"graph" and found["1/model.onnx.data"] == b"weights"
    assert set(found) == {"config.pbtxt", "README.md", "1/model.onnx", "1/model.onnx.data"}
    assert b"--model-repository=REPO\n" in found["README.md"]


def test_a_library_beside_the_plan_comes_along(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "out", report(form="plugin", plugin_layers=1))
    model = write_repository(Bundle.open(folder), tmp_path / "repo", name="other")
    assert model.options == (
        "--backend-config=tensorrt,plugins=REPO/other/libiq_plugins.so",
    )  # fmt: skip
    assert (model.folder / "libiq_plugins.so").read_bytes() == b"library"
    text = " ".join((model.folder / "README.md").read_text().split())
    assert f"IQ_REGISTER_PLUGINS=1 tritonserver --model-repository=REPO {model.options[0]}" in text
    assert "exactly TensorRT 10.15.1.29" in text and "sm_90" in text


def test_an_embedded_library_needs_leave_to_run(tmp_path: Path) -> None:
    engine = report(form="plugin", plugin_layers=1, plugin_embedded=True, version_compatible=True)
    model = write_repository(
        Bundle.open(write_bundle(tmp_path / "out", engine)), tmp_path / "repo"
    )  # fmt: skip
    assert model.options == ("--backend-config=tensorrt,version-compatible=true",)
    assert not (model.folder / "libiq_plugins.so").exists()
    text = " ".join((model.folder / "README.md").read_text().split())
    assert "carries code" in text and "IQ_REGISTER_PLUGINS" not in text


def test_readme_counts_what_a_request_carries(bundle: Bundle, tmp_path: Path) -> None:
    text = (write_repository(bundle, tmp_path / "repo").folder / "README.md").read_text()
    words = " ".join(text.split())
    # 2 layers x key and value x 3 heads x 64 halves; 50 halves of logits.
    assert "1.5 kB each way" in words and "1.6 MB at the 1024 tokens" in words
    assert "every token of the request, 0.1 kB each" in words
    assert "batch 1 to 8, seq 1 to 512, past 0 to 1024" in words
    for name in ("input_ids", "past_key_values.0.key", "present.0.value", "logits"):
        assert f"`{name}`" in words
    assert "present.1" not in words and "8 cache tensors" in words
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("engines", "options", "kind", "message"),
    [
        ([], {}, BundleError, "--backend onnxruntime"),
        ([report(), report("b200")], {}, UsageError, r"several engines \(h100, b200\)"),
        ([report()], {"target": "orin"}, UsageError, "no engine 'orin', only h100"),
        ([report("rtx-ada", flavour="tensorrt_rtx")], {}, EngineError, "TensorRT for RTX"),
        ([report(strip_weights=True)], {}, EngineError, "does not refit"),
        ([report()], {"target": "h100", "backend": "onnxruntime"}, UsageError, "uses none"),
        ([report()], {"name": "../up"}, UsageError, "cannot be a model's name"),
        ([report()], {"name": ""}, UsageError, "cannot be a model's name"),
    ],
)
def test_refusals(
    tmp_path: Path, engines: list[Any], options: dict[str, Any], kind: type[IqError], message: str
) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "out", *engines))
    with pytest.raises(kind, match=message):
        write_repository(bundle, tmp_path / "repo", **options)
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": []}, "does not record its inputs"),
        ({"engines": {"h100": engine_record(flavour="tensorrt", plan="x")}}, "is not whole"),
        ({"inputs": [TensorInfo("x", "int4", ["batch", 8])]}, "no type for int4, which 'x' has"),
    ],
)
def test_manifests_that_do_not_suffice(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "out", report(), **changes), verify=False)
    with pytest.raises(BundleError, match=message):
        write_repository(bundle, tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_one_of_several_engines(tmp_path: Path) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "out", report(), report("b200")))
    model = write_repository(bundle, tmp_path / "repo", target="b200")
    assert (model.folder / "1" / "model.plan").read_bytes() == b"plan of b200"


def test_names_become_folders(tmp_path: Path) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "out", report(), name="org/My Model!"))
    model = write_repository(bundle, tmp_path / "repo")
    assert model.folder.name == "org-My-Model" == parse_config(model.folder).name


def test_again_is_no_change_and_another_model_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    folder = write_repository(bundle, repo).folder
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert not write_repository(bundle, repo).written
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before

    other = Bundle.open(write_bundle(tmp_path / "other", report("b200")))
    old = files(folder)
    with pytest.raises(BundleError, match=r"another model.*--force"):
        write_repository(other, repo)
    assert files(folder) == old
    write_repository(other, repo, name="second")
    assert sorted(p.name for p in repo.iterdir()) == ["second", "tiny"]
    assert write_repository(other, repo, force=True).written
    assert files(folder)["1/model.plan"] == b"plan of b200"
    assert sorted(p.name for p in repo.iterdir()) == ["second", "tiny"]


def test_a_damaged_copy_is_not_the_same(bundle: Bundle, tmp_path: Path) -> None:
    folder = write_repository(bundle, tmp_path / "repo").folder
    (folder / "1" / "model.plan").write_bytes(b"plan of h10O")
    with pytest.raises(BundleError, match="another model"):
        write_repository(bundle, tmp_path / "repo")


def test_force_does_not_replace_what_others_wrote(bundle: Bundle, tmp_path: Path) -> None:
    precious = tmp_path / "repo" / "tiny"
    precious.mkdir(parents=True)
    (precious / "config.pbtxt").write_text('name: "tiny"\n')
    with pytest.raises(BundleError, match="no model that iq-export wrote"):
        write_repository(bundle, tmp_path / "repo", force=True)
    assert files(precious) == {"config.pbtxt": b'name: "tiny"\n'}
    shutil.rmtree(precious)
    precious.write_text("a file")
    with pytest.raises(BundleError, match="no model that iq-export wrote"):
        write_repository(bundle, tmp_path / "repo", force=True)
    with pytest.raises(BundleError, match="cannot write in"):
        write_repository(bundle, precious)


@pytest.mark.parametrize("name", ["2/model.plan", "labels.txt", "1/own.txt", ".git/config"])
def test_force_is_stopped_by_a_foreign_file(bundle: Bundle, tmp_path: Path, name: str) -> None:
    folder = write_repository(bundle, tmp_path / "repo").folder
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    other = Bundle.open(write_bundle(tmp_path / "other", report("b200")))
    with pytest.raises(BundleError, match="which iq-export did not write: --force would delete"):
        write_repository(other, tmp_path / "repo", force=True)
    assert (folder / name).read_text() == "mine"


@pytest.mark.parametrize("left", ["empty", "the older model"])
def test_what_a_killed_run_left_goes_though_nothing_is_written(
    bundle: Bundle, tmp_path: Path, left: str
) -> None:
    write_repository(bundle, tmp_path / "repo")
    partial = tmp_path / "repo" / ".tiny.partial"
    partial.mkdir()
    if left != "empty":
        (partial / MARK).write_text('{"keep": false}')
        (partial / "new").mkdir()
    assert not write_repository(bundle, tmp_path / "repo").written
    assert [path.name for path in (tmp_path / "repo").iterdir()] == ["tiny"]


def test_a_copy_that_is_not_the_recorded_file(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle was replaced between its check and the copy."""
    monkeypatch.setattr(triton, "copy_belonging", lambda *args: args[-1].write_bytes(b"other"))
    with pytest.raises(BundleError, match="changed while it was copied"):
        write_repository(bundle, tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_an_interrupt_leaves_nothing_and_keeps_the_older_model(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(root: Path, name: str, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    folder = write_repository(bundle, tmp_path / "repo").folder
    old = files(folder)
    other = Bundle.open(write_bundle(tmp_path / "other", report("b200")))
    monkeypatch.setattr(triton, "copy_belonging", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_repository(other, tmp_path / "repo", force=True)
    assert files(tmp_path / "repo") == {f"tiny/{name}": text for name, text in old.items()}
    with pytest.raises(KeyboardInterrupt):
        write_repository(other, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()
