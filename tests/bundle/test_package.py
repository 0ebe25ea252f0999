"""The output folder is whole or absent, and never silently differs from its manifest."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from iq_export.bundle import lock, package, update
from iq_export.bundle.manifest import CHECKSUM_NAME, MANIFEST_NAME, Manifest, record_files
from iq_export.bundle.package import (
    Bundle,
    atomic_folder,
    check_output,
    clear_partial,
    parents_of,
    read_whole,
    require_space,
    unmarked_partials,
    update_manifest,
)
from iq_export.errors import BundleError
from tests.tiny_bundle import ABSENT, REQUIRED, fill


def write_bundle(folder: Path, content: bytes = b"graph") -> None:
    (folder / "model.onnx").write_bytes(content)
    fill(folder)
    Manifest("tiny", "w8a8", "float16", 23, files=record_files(folder)).write(folder)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    with atomic_folder(out) as folder:
        write_bundle(folder)
    return out


def test_success_leaves_only_the_bundle(bundle: Path) -> None:
    assert [p.name for p in bundle.parent.iterdir()] == ["out"]
    assert Bundle.open(bundle).model.read_bytes() == b"graph"


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), atomic_folder(tmp_path / "deep" / "out") as folder:
        write_bundle(folder)
        raise failure
    assert not list(tmp_path.iterdir())


def test_failure_keeps_the_older_bundle(bundle: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(bundle, force=True) as folder:
        write_bundle(folder, b"newer")
        raise KeyboardInterrupt
    assert Bundle.open(bundle).model.read_bytes() == b"graph"
    assert len(list(bundle.parent.iterdir())) == 1


def test_interrupt_between_the_renames_keeps_the_older_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where folders cannot be exchanged in one step."""
    rename = os.rename

    def interrupted(source: Path, target: Path, **more: Any) -> None:
        if Path(source).name == "new":
            raise KeyboardInterrupt
        rename(source, target, **more)

    monkeypatch.setattr(package, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(bundle, force=True) as folder:
        write_bundle(folder, b"newer")
    assert Bundle.open(bundle).model.read_bytes() == b"graph"
    assert len(list(bundle.parent.iterdir())) == 1


def test_force_where_folders_cannot_be_exchanged(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "_exchange", lambda *_: False)
    with atomic_folder(bundle, force=True) as folder:
        write_bundle(folder, b"newer")
    assert Bundle.open(bundle).model.read_bytes() == b"newer"
    assert len(list(bundle.parent.iterdir())) == 1


def test_killed_between_the_renames(bundle: Path) -> None:
    """The next reader puts the older bundle back."""
    holder = bundle.parent / ".out.partial"
    holder.mkdir()
    (holder / lock.MARK).write_text(json.dumps({"keep": False}))
    bundle.rename(holder / "old")
    assert Bundle.open(bundle).model.read_bytes() == b"graph"
    assert [p.name for p in bundle.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["notes.txt", ".git", "engines/own.txt", "mine/deep.txt", "link"])
def test_force_is_stopped_by_a_foreign_file(bundle: Path, name: str) -> None:
    """It is named, and nothing is touched."""
    path = bundle / name
    path.parent.mkdir(exist_ok=True)
    if name == "link":
        path.symlink_to("/")
    elif name == ".git":
        path.mkdir()
    else:
        path.write_text("mine")
    shown = "mine" if name.startswith("mine") else name
    with pytest.raises(BundleError, match=f"holds '{re.escape(shown)}'.*--force would delete"):
        check_output(bundle, force=True)
    assert os.path.lexists(path) and Bundle.open(bundle)


def test_a_file_that_comes_at_the_last_moment_is_not_lost(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = package._exchange

    def late(one: Path, other: Path) -> bool:
        if not (bundle / "thesis.tex").exists():
            (bundle / "thesis.tex").write_text("x")
        return exchange(one, other)

    monkeypatch.setattr(package, "_exchange", late)
    refused = pytest.raises(BundleError, match=r"holds 'thesis\.tex'")
    with refused, atomic_folder(bundle, force=True) as folder:
        write_bundle(folder, b"newer")
    assert (bundle / "thesis.tex").read_text() == "x"
    assert Bundle.open(bundle).model.read_bytes() == b"graph"


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"manifest_version": 3, "name": "an extension", "version": "1"}', "[" * 10_000,
     '{"format_version": 1, "name": "n", "recipe": "r", "dtype": "d"}'],
)  # fmt: skip
def test_force_refuses_a_manifest_that_is_not_ours(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match="not a bundle"):
        check_output(tmp_path, force=True)


def test_force_replaces_a_damaged_bundle_and_one_of_another_format(bundle: Path) -> None:
    (bundle / CHECKSUM_NAME).unlink()
    record = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**record, "format_version": 9, "more": 1}))
    with atomic_folder(bundle, force=True) as folder:
        write_bundle(folder, b"newer")
    assert Bundle.open(bundle).model.read_bytes() == b"newer"


def test_an_empty_folder_is_filled_and_stays_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's shell may be in it."""
    out = tmp_path / "out"
    out.mkdir()
    before = out.stat().st_ino
    monkeypatch.chdir(out)
    with atomic_folder(".") as folder:
        write_bundle(folder)
    assert out.stat().st_ino == before
    assert Bundle.open(".").model.read_bytes() == b"graph"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not any(p.name.startswith(".") for p in out.iterdir())


def test_a_foreign_folder_where_a_bundle_would_grow(tmp_path: Path) -> None:
    mine = tmp_path / ".out.partial"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    refused = pytest.raises(BundleError, match=r"\.out\.partial is not empty and has no mark")
    with refused, atomic_folder(tmp_path / "out"):
        pass
    assert (mine / "thesis.tex").read_text() == "x"


def test_read_whole_reads_again_what_was_replaced(bundle: Path) -> None:
    seen = []

    def read(opened: Bundle) -> bytes:
        if not seen:  # between the opening and the reading
            with atomic_folder(bundle, force=True) as folder:
                write_bundle(folder, b"newer")
        seen.append(opened.manifest)
        return opened.model.read_bytes()

    assert read_whole(bundle, read) == b"newer"
    assert len(seen) == 2


def test_force_replaces_a_bundle_and_nothing_else(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="--force"):
        check_output(bundle, force=False)
    with atomic_folder(bundle, force=True) as folder:
        write_bundle(folder, b"newer")
    assert Bundle.open(bundle).model.read_bytes() == b"newer"

    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    with pytest.raises(BundleError, match="not a bundle"):
        check_output(precious, force=True)
    with pytest.raises(BundleError, match="not a folder"):
        check_output(precious / "thesis.tex", force=True)


def test_disk_full_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(
            BundleError, match=r"the disk is full: .*out was not written; free some space"
        ),
        atomic_folder(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_other_os_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "no")


def test_beginnings_by_older_versions_are_named(tmp_path: Path) -> None:
    """They have no mark, and the process that has their number may be another one."""
    for name in (".out.17.partial", ".out.x.partial", ".other.17.partial", ".out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").touch()
    (tmp_path / ".out.18.partial").touch()
    assert unmarked_partials(tmp_path / "out") == [tmp_path / ".out.17.partial"]
    clear_partial(tmp_path / "out")
    assert (tmp_path / ".out.17.partial" / "model.onnx").exists()
    assert unmarked_partials(tmp_path / "none" / "out") == []


def test_require_space(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(BundleError, match="GB free"):
        require_space(tmp_path, 1 << 60)


def test_open_shows_a_table_of_mismatches(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"grapH")
    with pytest.raises(BundleError, match=r"(?s)manifest says.*model\.onnx.*sha256"):
        Bundle.open(bundle)
    assert Bundle.open(bundle, verify=False).manifest.name == "tiny"
    (bundle / "model.onnx").unlink()
    assert Bundle.open(bundle, verify=False).mismatches() == [("model.onnx", "5 bytes", "missing")]


def test_open_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a folder"):
        Bundle.open(tmp_path / "none")
    with pytest.raises(BundleError, match="no manifest"):
        Bundle.open(tmp_path)


def test_open_refuses_a_manifest_without_its_checksum(bundle: Path) -> None:
    """Also with verify off: the manifest is what all else is compared with."""
    seal = bundle / CHECKSUM_NAME
    line = seal.read_text()
    seal.write_text(("1" if line.startswith("0") else "0") + line[1:])
    with pytest.raises(BundleError, match="is not the one"):
        Bundle.open(bundle, verify=False)
    seal.unlink()
    with pytest.raises(BundleError, match=r"earlier versions.*sha256sum"):
        Bundle.open(bundle, verify=False)
    seal.mkdir()
    with pytest.raises(BundleError, match="cannot read"):
        Bundle.open(bundle, verify=False)


def test_update_manifest_rehashes_what_changed(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    (bundle / "report.html").write_text("<p>")
    updated = update_manifest(opened, rehash=["report.html"], accuracy={"rows": []})
    assert Bundle.open(bundle) == updated
    assert set(updated.manifest.files) == {*REQUIRED, "report.html"}
    (bundle / "report.html").unlink()
    assert set(update_manifest(updated, rehash=["report.html"]).manifest.files) == {*REQUIRED}


@pytest.mark.parametrize("name", ["manifest.json", CHECKSUM_NAME, "plan.json"])
def test_a_pipe_in_a_bundle_is_not_waited_for(bundle: Path, name: str) -> None:
    (bundle / name).unlink(missing_ok=True)
    os.mkfifo(bundle / name)
    with pytest.raises(BundleError, match=f"{name}, which is not a file"):
        Bundle.open(bundle, verify=False).plan()


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "x", "3"])
def test_a_plan_that_is_none(bundle: Path, text: str) -> None:
    (bundle / "plan.json").write_text(text)
    with pytest.raises(BundleError, match=r"plan\.json is no"):
        Bundle.open(bundle).plan()


def test_many_mismatches_are_counted(bundle: Path) -> None:
    files = {**record_files(bundle), **{f"f{n:02}": ABSENT for n in range(30)}}
    Manifest("tiny", "w8a8", "float16", 23, files=files).write(bundle)
    with pytest.raises(BundleError, match=r"f07(.|\n)*and 22 more") as error:
        Bundle.open(bundle)
    assert "f08" not in str(error.value)


def test_folders_made_for_an_output_stay_with_it(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(KeyError), parents_of(tmp_path / "old" / "a" / "b" / "out"):
        (tmp_path / "old" / "a" / "note").touch()
        raise KeyError
    assert [p.name for p in (tmp_path / "old" / "a").iterdir()] == ["note"]
    with parents_of(tmp_path / "new" / "out"):
        (tmp_path / "new" / "out").touch()
    assert (tmp_path / "new" / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="cannot write in"), parents_of(tmp_path / "file" / "x"):
        pass


def test_a_new_manifest_with_the_number_of_the_old_one_is_new(bundle: Path) -> None:
    """File systems give a freed inode again: a reader beside two updates took them for none."""
    path = bundle / MANIFEST_NAME
    before, number = package._generation(bundle), path.stat().st_ino
    path.write_bytes(path.read_bytes())
    assert path.stat().st_ino == number
    assert package._generation(bundle) != before


@pytest.mark.parametrize("at", range(1, 9))
def test_an_update_that_ends_while_it_is_looked_for_is_seen(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Whichever look it ends before: a reader once took a half moved update for damage."""
    before = package._generation(bundle)
    finish, stat, looks = update._finish, Path.stat, itertools.count(1)
    seen: list[tuple[Any, ...]] = []

    def look(path: Path, **options: Any) -> os.stat_result:
        if next(looks) == at:
            finish(bundle)
        return stat(path, **options)

    def moving(folder: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", look)
            seen.append(package._generation(folder))
        if next(looks) <= at:
            finish(folder)

    monkeypatch.setattr(update, "_finish", moving)
    update_manifest(Bundle.open(bundle), notes=["newer"])
    assert seen[0] != before
    assert package._generation(bundle) not in (before, None)
    assert Bundle.open(bundle).manifest.notes == ["newer"]
