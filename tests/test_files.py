"""One rule for all files of bundles, models and work folders: inside, regular, no link."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from iq_export.errors import BundleError, ModelError
from iq_export.files import create_inside, open_inside, parts_inside, read_inside

OUTSIDE = ["", ".", "..", "/etc/passwd", "a/../b", "a//b", "a/", "./a", "a\\b", "a\nb", "x" * 256]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_could_lead_outside(name: str) -> None:
    with pytest.raises(BundleError):
        parts_inside(name)


def test_a_file_inside_is_read_and_made(tmp_path: Path) -> None:
    with create_inside(tmp_path, "a/b/c.bin") as stream:
        stream.write(b"12345")
    assert read_inside(tmp_path, "a/b/c.bin", 5) == b"12345"
    with pytest.raises(BundleError, match="more than 4 bytes"):
        read_inside(tmp_path, "a/b/c.bin", 4)
    with pytest.raises(BundleError, match="there already"):
        create_inside(tmp_path, "a/b/c.bin")
    with pytest.raises(FileNotFoundError):
        open_inside(tmp_path, "a/b/d.bin")
    with pytest.raises(FileNotFoundError):
        open_inside(tmp_path, "none/d.bin")


def test_links_lead_nowhere(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir(), root.mkdir()
    (outside / "secret").write_text("secret")
    (root / "file").symlink_to(outside / "secret")
    (root / "folder").symlink_to(outside)
    (root / "dangling").symlink_to(outside / "new")
    for name in ("file", "folder/secret"):
        with pytest.raises(ModelError, match="must lie inside"):
            open_inside(root, name, ModelError)
    for name in ("folder/new", "dangling", "file"):
        with pytest.raises(BundleError):
            create_inside(root, name)
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "named").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "a").write_text("a")
    assert read_inside(tmp_path / "named", "a", 10) == b"a"


def test_what_is_no_file_is_said_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(BundleError, match="not a regular file"):
            open_inside(tmp_path, name)
