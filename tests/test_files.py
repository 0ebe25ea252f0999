"""One rule for all files of bundles, models and work folders: inside, regular, no link."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from iq_export.errors import BundleError, ModelError
from iq_export.files import (
    copy_belonging,
    create_inside,
    open_belonging,
    open_inside,
    parts_inside,
    read_belonging,
    read_inside,
    read_named,
)

OUTSIDE = ["", ".", "..", "/etc/passwd", "a/../b", "a//b", "a/", "./a", "a\\b", "a\nb", "x" * 256]


def test_a_file_that_the_user_named(tmp_path: Path) -> None:
    """It may be a link; a pipe does not stop us, and what is too large is not read."""
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    assert read_named(tmp_path / "link", 5, ModelError) == b"12345"
    with pytest.raises(ModelError, match="more than 4 bytes"):
        read_named(tmp_path / "link", 4, ModelError)
    for name in ("pipe", "."):
        with pytest.raises(ModelError, match="is not a regular file"):
            read_named(tmp_path / name, 5, ModelError)
    with pytest.raises(FileNotFoundError):
        read_named(tmp_path / "none", 5, ModelError)


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


def test_a_models_file_may_be_a_link_that_stays_inside(tmp_path: Path) -> None:
    root, outside = tmp_path / "model", tmp_path / "outside"
    (root / "sub").mkdir(parents=True), outside.mkdir()
    (root / "sub" / "real").write_text("real")
    (outside / "secret").write_text("secret")
    (root / "file").symlink_to("sub/real")
    (root / "out").symlink_to(outside / "secret")
    (root / "by").symlink_to("out")
    (root / "folder").symlink_to(outside)
    (root / "itself").symlink_to(".")
    (root / "dangling").symlink_to("nothing")
    (root / "round").symlink_to("round")
    assert read_belonging(root, "file", 4) == b"real"
    (tmp_path / "named").symlink_to(root)
    assert read_belonging(tmp_path / "named", "file", 4) == b"real"
    with pytest.raises(ModelError, match="more than 3 bytes"):
        read_belonging(root, "file", 3, ModelError)
    for name in ("out", "by", "folder/secret", "itself"):
        with pytest.raises(ModelError, match="leads out of its folder"):
            open_belonging(root, name, ModelError)
    with pytest.raises(ModelError):
        open_belonging(root, "../outside/secret", ModelError)
    with pytest.raises(FileNotFoundError):
        open_belonging(root, "dangling")
    with pytest.raises(BundleError):
        open_belonging(root, "round")


def test_a_snapshot_of_the_hubs_cache_is_links_to_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    (snapshot / "onnx").mkdir(parents=True)
    for blobs in (repository / "blobs", tmp_path / "hub" / "blobs" / "12", tmp_path / "blobs"):
        blobs.mkdir(parents=True)
        (blobs / "1234").write_text(blobs.name)
    (repository / "blobs" / "shared").symlink_to("../../blobs/12/1234")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    (snapshot / "weights").symlink_to("../../blobs/shared")
    (snapshot / "onnx" / "data").symlink_to("../../../blobs/1234")
    (snapshot / "out").symlink_to(tmp_path / "blobs" / "1234")
    copy_belonging(snapshot, "config.json", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "blobs" and not (tmp_path / "copy").is_symlink()
    assert read_belonging(snapshot, "weights", 9) == b"12"
    assert read_belonging(snapshot / "onnx", "data", 9) == b"blobs"
    with pytest.raises(BundleError, match="leads out"):
        open_belonging(snapshot, "out")
    with pytest.raises(BundleError, match="there already"):
        copy_belonging(snapshot, "config.json", tmp_path / "copy")
