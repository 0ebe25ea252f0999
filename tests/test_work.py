"""A work folder has one owner, keeps what a bundle depends on, and is never somebody else's."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from iq_export import references
from iq_export.bundle.lock import MARK, Busy, claim
from iq_export.checksum import check_files, sha256_file
from iq_export.errors import BundleError, GraphError, ModelError, UsageError
from iq_export.graph.model_files import model_files
from iq_export.model.load import ModelSource, fingerprint
from iq_export.model.trace import TracedModel
from iq_export.progress import Progress
from iq_export.work import check_work, default_work, work_folder


def save(path: Path, value: float = 1.0, data: str | None = None) -> Path:
    """A graph of one weight, which may lie outside of it."""
    weight = numpy_helper.from_array(np.full((4, 4), value, np.float32), "w")
    row = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 4])
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = helper.make_model(helper.make_graph([node], "g", [row], [out], [weight]))
    path.parent.mkdir(parents=True, exist_ok=True)
    external = data is not None
    onnx.save(model, path, save_as_external_data=external, location=data, size_threshold=0)
    return path


def keep(folder: Path, plan: str, value: float = 1.0, *, kept: bool = True) -> None:
    """What a compile does with its work folder."""
    with work_folder(folder.parent / "out", folder, keep=kept) as work:
        traced = save(work.place_of_trace() / "model.onnx", value, "model.onnx.data")
        record_trace(traced.parent, plan)
        save(work.run / "w8a8-fp16" / "quantized.onnx", value)
        if kept:
            work.keep_trace()


def record_trace(folder: Path, source: str) -> None:
    """What stands beside a traced graph."""
    (folder / "assets").mkdir(exist_ok=True)
    TracedModel(folder, "m", source, 1.0).save("key")


def recall(folder: Path, source: str) -> Path | None:
    """The kept graph for a bundle of this source."""
    bundle = SimpleNamespace(manifest=SimpleNamespace(source={"sha256": source}))
    found: Path | None = references._hold(bundle, folder, Progress(quiet=True), None)
    return found


def test_a_kept_graph_is_found_again(tmp_path: Path) -> None:
    keep(tmp_path / "w", "first")
    assert recall(tmp_path / "w", "first") == tmp_path / "w/traced/model.onnx"
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == [MARK, "kept", "traced"]
    assert recall(tmp_path / "w", "second") is None
    (tmp_path / "moved").mkdir()
    os.rename(tmp_path / "w", tmp_path / "moved" / "w")
    assert recall(tmp_path / "moved" / "w", "first")
    assert recall(tmp_path / "absent", "first") is None


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_changed_graph_is_not_compared_with(tmp_path: Path, name: str) -> None:
    keep(tmp_path / "w", "first")
    content = bytearray((tmp_path / "w/traced" / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / "w/traced" / name).write_bytes(content)
    assert recall(tmp_path / "w", "first") is None


def test_whole_graphs_that_an_older_version_kept_go(tmp_path: Path) -> None:
    keep(tmp_path / "w", "first")
    save(tmp_path / "w/w8a8-fp16/fp32.onnx", 1.0)
    (tmp_path / "w/w8a8-fp16/references.json").write_text("{}")
    keep(tmp_path / "w", "second")
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == [MARK, "kept", "traced"]


def test_the_next_bundle_replaces_what_was_kept(tmp_path: Path) -> None:
    keep(tmp_path / "w", "first", 1.0)
    keep(tmp_path / "w", "second", 2.0)
    assert recall(tmp_path / "w", "first") is None
    graph = recall(tmp_path / "w", "second")
    assert graph is not None
    assert numpy_helper.to_array(onnx.load(graph).graph.initializer[0])[0, 0] == 2
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == [MARK, "kept", "traced"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("kept", [True, False])
def test_a_run_that_fails_keeps_the_kept(
    tmp_path: Path, failure: type[BaseException], kept: bool
) -> None:
    """And so does one that keeps nothing."""
    keep(tmp_path / "w", "first")
    with pytest.raises(failure), work_folder(tmp_path / "o", tmp_path / "w", keep=kept) as work:
        save(work.place_of_trace() / "model.onnx", 3.0, "model.onnx.data")
        save(work.run / "w8a8-fp16" / "inserted.onnx", 3.0, "prepared.onnx.data")
        raise failure
    assert recall(tmp_path / "w", "first")
    keep(tmp_path / "w", "second", 3.0, kept=False)
    assert recall(tmp_path / "w", "first")


def test_a_failed_run_leaves_its_trace_to_the_next(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), work_folder(tmp_path, tmp_path / "w", keep=True) as work:
        save(work.place_of_trace() / "model.onnx")
        raise RuntimeError
    assert (tmp_path / "w" / "traced" / "model.onnx").exists()


def test_nothing_is_left_of_a_work_folder_that_is_not_kept(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with work_folder(out, None, keep=False) as work:
        assert work.folder == default_work(out)
        (work.run / "graph").write_text("x")
    with pytest.raises(RuntimeError), work_folder(out, tmp_path / "named", keep=True):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_graph_that_a_killed_run_left_beside_kept_weights_goes(tmp_path: Path) -> None:
    with work_folder(tmp_path / "out", None, keep=True) as work:
        work.traced.mkdir()
        (work.traced / "traced.onnx").write_text("kept")
        (work.traced / ".taps-x.onnx").write_text("left")
    with work_folder(tmp_path / "out", None, keep=True) as work:
        assert [path.name for path in work.traced.iterdir()] == ["traced.onnx"]


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_of_the_user_is_never_deleted(tmp_path: Path, named: bool) -> None:
    """`--work D` deleted D/traced, and a compile without it whatever was called .OUT.work."""
    folder = tmp_path / "mine" if named else tmp_path / ".out.work"
    (folder / "traced").mkdir(parents=True)
    (folder / "traced" / "thesis.tex").write_text("x")
    with pytest.raises(BundleError, match=f"{folder.name} is not empty and has no mark"):
        keep_it = work_folder(tmp_path / "out", folder if named else None, keep=named)
        with keep_it:
            pass
    assert [p.name for p in folder.rglob("*")] == ["traced", "thesis.tex"]


def test_results_of_steps_outlive_a_new_trace(tmp_path: Path) -> None:
    """`eval --work D` traces too, and an interrupted compile goes on afterwards."""
    with work_folder(tmp_path / "out", tmp_path / "w", keep=True) as work:
        assert work.unfinished is not None
        work.unfinished.mkdir()
        (work.run / "traced").mkdir()
        work.keep_trace()
        assert work.unfinished.is_dir()
        work.forget_unfinished()
        assert not work.unfinished.exists()


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    keep(tmp_path / "w", "first")
    with work_folder(tmp_path / "out", tmp_path / "w", keep=True):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                importlib.import_module("iq_export.bundle.lock")._held.clear()
                with claim(tmp_path / "w", wait=False):
                    pass
            except Busy:
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("inner", [".", "work", "deep/work", "../link/work"])
def test_a_work_folder_inside_the_output(tmp_path: Path, inner: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(UsageError, match=r"--work .* lies in the output folder"):
        check_work(tmp_path / "out", tmp_path / "out" / inner)
    check_work(tmp_path / "out", tmp_path / "work")
    check_work(tmp_path / "out", tmp_path / "outer")
    check_work(tmp_path / "out", None)


def test_a_stage_that_another_program_changed(tmp_path: Path) -> None:
    """What this run wrote is what goes in: model A's name stood over model B's weights."""
    path = save(tmp_path / "model.onnx", 1.0, "data")
    digests = {file.name: sha256_file(file) for file in model_files(path)}
    check_files(tmp_path, digests)
    (tmp_path / "data").write_bytes(bytes((tmp_path / "data").stat().st_size))
    with pytest.raises(BundleError, match=r"another program changed .*/data while"):
        check_files(tmp_path, digests)
    (tmp_path / "data").unlink()
    with pytest.raises(BundleError, match=r"another program changed .*/data while"):
        check_files(tmp_path, digests)


@pytest.mark.parametrize("name", ["model.onnx.data", "weights.bin", "any name"])
def test_every_external_file_counts(tmp_path: Path, name: str) -> None:
    """Exchanged weights of another name than `model.onnx*data` shipped the old ones as the new."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    path = save(tmp_path / "model.onnx", 1.0, name)
    assert model_files(path) == [path, tmp_path / name]
    source = ModelSource("onnx", "model", path, tokenizer=tokenizer)
    before = fingerprint(source)
    (tmp_path / "model.onnx.other").write_text("not of the model")
    assert fingerprint(source) == before
    save(path, 2.0, name)
    assert fingerprint(source) != before


def test_external_data_outside(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", 1.0, "data")
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../data"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match="no name of a file inside"):
        model_files(path)
    with pytest.raises(ModelError, match="no name of a file inside"):
        model_files(path, ModelError)


def test_a_model_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_module = importlib.import_module("iq_export.model.trace")
    digests = iter(["before", "after"])
    monkeypatch.setattr(trace_module, "materialize", lambda source, _: source)
    monkeypatch.setattr(trace_module, "fingerprint", lambda _: next(digests))
    monkeypatch.setattr(trace_module, "_write_tokenizer", lambda *_: [])
    monkeypatch.setattr(trace_module, "_adopt_onnx", lambda *_: [])
    source = ModelSource("onnx", "model", tmp_path / "model.onnx", tokenizer=tmp_path)
    with pytest.raises(ModelError, match="changed while they were read"):
        trace_module.trace(source, tmp_path / "traced")
    assert not list(tmp_path.iterdir())


def test_a_changed_licence_is_not_found_in_an_older_trace(tmp_path: Path) -> None:
    """It is copied into the bundle, beside the weights."""
    trace_module = importlib.import_module("iq_export.model.trace")
    path = save(tmp_path / "model.onnx")
    source = ModelSource("onnx", "model", path, tokenizer=tmp_path)
    keys = {trace_module._cache_key(source, "digest", 23)}
    for terms in ("free", "not free"):
        (tmp_path / "LICENSE").write_text(terms)
        keys.add(trace_module._cache_key(source, "digest", 23))
    assert len(keys) == 3


@pytest.mark.parametrize("name", ["traced", "traced/model.onnx", "traced/model.onnx.data"])
def test_a_graph_outside_of_the_work_folder_is_not_recalled(tmp_path: Path, name: str) -> None:
    """Whoever laid a link there."""
    keep(tmp_path / "w", "first")
    os.rename(tmp_path / "w" / name, tmp_path / "outside")
    (tmp_path / "w" / name).symlink_to(tmp_path / "outside")
    assert recall(tmp_path / "w", "first") is None
