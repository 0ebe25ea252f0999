"""An update counts as a whole or not at all, wherever its process dies."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from iq_export.bundle import package, update
from iq_export.bundle.lock import MARK, claim
from iq_export.bundle.manifest import CHECKSUM_NAME, MANIFEST_NAME, Manifest, record_files
from iq_export.bundle.package import Bundle, atomic_folder, update_manifest
from iq_export.bundle.update import STATE, bundle_lock, write_update
from iq_export.errors import BundleError
from tests import dying

pytestmark = pytest.mark.usefixtures("no_flush")
FILES = ["engines/a.plan", "engines/old.plan", "manifest.json", CHECKSUM_NAME, "model.onnx",
         "model.onnx.data", "report.html", "tokenizer.json"]  # fmt: skip


@pytest.fixture
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote; only a machine does."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def make(folder: Path, content: str = "graph") -> None:
    (folder / "engines").mkdir(parents=True)
    (folder / "model.onnx").write_text(content)
    (folder / "model.onnx.data").write_text("weights")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "report.html").write_text("old report")
    (folder / "engines" / "a.plan").write_text("old plan")
    (folder / "engines" / "old.plan").write_text("dropped plan")
    Manifest("tiny", "w8a8", "float16", 23, files=record_files(folder)).write(folder)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    make(tmp_path / "out")
    return tmp_path / "out"


def change(folder: Path) -> None:
    """What a build does: a plan that was made aside, a text, a file that goes."""
    with bundle_lock(folder) as scratch:
        (scratch / "made").write_text("new plan")
        new: dict[str, Path | str] = {
            "engines/a.plan": scratch / "made",
            "plugins/lib.so": "library",
            "report.html": "new report",
        }
        opened = Bundle.open(folder, verify=False)
        update_manifest(opened, new=new, drop=["engines/old.plan"], notes=["new"])


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_an_update(bundle: Path) -> None:
    change(bundle)
    opened = Bundle.open(bundle)
    assert opened.manifest.notes == ["new"]
    assert sorted(content(bundle)) == sorted({*FILES, "plugins/lib.so"} - {"engines/old.plan"})
    assert content(bundle)["engines/a.plan"] == "new plan"


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "disk full"])
def test_every_file_operation_may_be_the_last(tmp_path: Path, kill: bool) -> None:
    """The next reader sees one whole bundle, the older or the newer, and the next run succeeds."""
    seen = set()
    for at in range(1, 200):
        folder = tmp_path / str(at)
        make(folder)
        code = dying.run(lambda folder=folder: change(folder), at, kill=kill)
        assert code in ((0, dying.DIED) if kill else (0, dying.SURVIVED, dying.FAILED))
        opened = Bundle.open(folder)  # checks every file
        assert Bundle.open(folder, verify=False) == opened
        seen.add((tuple(opened.manifest.notes), opened.path("engines/a.plan").read_text()))
        change(folder)
        assert sorted(content(folder)) == sorted({*FILES, "plugins/lib.so"} - {"engines/old.plan"})
        if code == 0:
            break
    assert at > 15
    assert seen == {((), "old plan"), (("new",), "new plan")}


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "disk full"])
@pytest.mark.parametrize(
    ("before", "exchange"),
    [("absent", True), ("empty", True), ("bundle", True), ("bundle", False)],
)
def test_every_operation_of_a_replacement_may_be_the_last(
    tmp_path: Path, kill: bool, exchange: bool, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(package, "_exchange", lambda *_: False)

    def replace(out: Path) -> None:
        with atomic_folder(out, force=True) as folder:
            shutil.rmtree(folder)
            make(folder, "newer")

    for at in range(1, 200):
        out = tmp_path / str(at) / "out"
        if before == "bundle":
            make(out)
        else:
            out.mkdir(parents=True)
            if before == "absent":
                out.rmdir()
        code = dying.run(lambda out=out: replace(out), at, kill=kill)
        assert code in ((0, dying.DIED) if kill else (0, dying.SURVIVED, dying.FAILED))
        found = "nothing"
        try:
            found = Bundle.open(out).model.read_text()
        except BundleError as error:
            assert before != "bundle", error
            assert not (out / MANIFEST_NAME).exists()
        assert found in ({"graph", "newer"} if before == "bundle" else {"nothing", "newer"})
        replace(out)
        assert Bundle.open(out).model.read_text() == "newer"
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert sorted(content(out)) == sorted(FILES)
        if code == 0:
            break
    assert at > 10


@pytest.fixture
def stopped(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose update was switched and then could not move all its files."""

    def stop(folder: Path) -> None:
        os.replace(folder / STATE / "update/engines/a.plan", folder / "engines/a.plan")
        os._exit(dying.DIED)

    monkeypatch.setattr(update, "_finish", stop)
    assert dying.run(lambda: change(bundle), 10_000) == dying.DIED
    monkeypatch.undo()
    assert (bundle / STATE / "update" / "report.html").exists()
    return bundle


@pytest.fixture
def read_only(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Root may write anywhere: the lock says no."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(update, "claim", refuse)
    yield stopped


def test_a_read_only_bundle_is_read_through_its_update(read_only: Path) -> None:
    before = content(read_only)
    opened = Bundle.open(read_only)
    assert opened.manifest.notes == ["new"]
    assert opened.path("report.html").read_text() == "new report"
    assert content(read_only) == before
    with pytest.raises(BundleError, match=r"cannot write in .*: Permission denied"):
        update_manifest(opened, notes=["newer"])


def test_a_damaged_update_is_refused(stopped: Path) -> None:
    (stopped / STATE / "update" / "report.html").write_text("other")
    with pytest.raises(BundleError):
        Bundle.open(stopped)


def test_an_update_that_leads_outside(stopped: Path, tmp_path: Path) -> None:
    """A stranger's bundle may hold any links."""
    victim = tmp_path / "victim"
    victim.mkdir()
    shutil.rmtree(stopped / "plugins")
    (stopped / "plugins").symlink_to(victim)
    assert Bundle.open(stopped).manifest.notes == ["new"]  # read where it lies
    assert not list(victim.iterdir())
    shutil.rmtree(stopped / STATE)
    (stopped / STATE).symlink_to(victim)
    (victim / "update").mkdir()
    (victim / "update" / "report.html").write_text("new report")
    with pytest.raises(BundleError):
        Bundle.open(stopped)
    assert (victim / "update" / "report.html").exists()


def test_two_updates_are_both_kept(bundle: Path) -> None:
    """Each changes what is there now, not what it once read."""
    first, second = Bundle.open(bundle), Bundle.open(bundle)
    update_manifest(first, targets=["a"])
    update_manifest(second, notes=["second"])
    manifest = Bundle.open(bundle).manifest
    assert (manifest.targets, manifest.notes) == (["a"], ["second"])


def test_what_was_measured_on_a_replaced_bundle_is_not_stored(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    with atomic_folder(bundle, force=True) as folder:
        shutil.rmtree(folder)
        make(folder, "newer")
    with pytest.raises(BundleError, match="was replaced by another compile"):
        update_manifest(opened, notes=["of the older"])


def test_force_ends_what_is_left(stopped: Path) -> None:
    (stopped / ".build-a1b2c3d4").mkdir()
    (stopped / ".model.123.fused.onnx").write_text("x")
    with atomic_folder(stopped, force=True) as folder:
        shutil.rmtree(folder)
        make(folder, "newer")
    assert Bundle.open(stopped).model.read_text() == "newer"
    assert sorted(content(stopped)) == sorted(FILES)


def test_a_user_folder_of_the_state_s_name(bundle: Path) -> None:
    (bundle / STATE).mkdir()
    (bundle / STATE / "mine").write_text("x")
    with pytest.raises(BundleError, match="has no mark"):
        change(bundle)
    with pytest.raises(BundleError, match=f"holds '{STATE}'"):
        package.check_output(bundle, force=True)


def test_a_place_that_cannot_be_taken_is_refused_before_the_switch(bundle: Path) -> None:
    (bundle / "plugins").write_text("a file")
    with pytest.raises(BundleError, match="plugins is a link or no folder"):
        change(bundle)
    assert "new" not in json.loads((bundle / MANIFEST_NAME).read_text())["notes"]
    with claim(bundle / STATE), pytest.raises(BundleError, match="is a folder"):
        (bundle / "report.html").unlink()
        (bundle / "report.html").mkdir()
        write_update(bundle, Bundle.open(bundle, verify=False).manifest, {"report.html": "x"})
    assert not (bundle / STATE / MARK).exists()
