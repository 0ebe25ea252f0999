"""Texts and windows: what is refused, what is deterministic, what never overlaps."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from iq_export.errors import DataError, UsageError
from iq_export.observe import samples
from iq_export.observe.samples import held_out_windows, load_text, windows


class Words:
    """A tokenizer for tests: the position of each word in the text, modulo 50."""

    def __init__(self, bos_id: int | None = 1000) -> None:
        self.bos_id = bos_id

    def encode(self, text: str, add_bos: bool) -> list[int]:
        ids = [int(word) for word in text.split()]
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids


TEXT = " ".join(str(n) for n in range(1000))


def test_builtin_text_is_split_without_overlap() -> None:
    calibration = set(load_text("builtin").split("\n\n"))
    heldout = set(load_text("builtin-heldout").split("\n\n"))
    assert not calibration & heldout
    assert sum(map(len, calibration)) > 100_000
    assert sum(map(len, heldout)) > 50_000


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"", "empty"), (b" \n ", "empty"), (b"\xff\xfe\x00", "UTF-8"), (b"a\0b", "NUL")],
)
def test_bad_files_are_refused(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=match):
        load_text(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_text(tmp_path / "none.txt")
    with pytest.raises(DataError, match="is a folder"):
        load_text(tmp_path)


def test_windows_are_deterministic_distinct_and_spread() -> None:
    first = windows(Words(), TEXT, length=20, count=10, seed=3, bos="without")
    again = windows(Words(), TEXT, length=20, count=10, seed=3, bos="without")
    other = windows(Words(), TEXT, length=20, count=10, seed=4, bos="without")
    assert first == again != other
    used = [token for window in first for token in window.ids]
    assert len(used) == len(set(used)) == 200
    assert [window.ids[0] // 100 for window in first] == list(range(10))


def test_first_tokens_differ_where_the_text_allows() -> None:
    text = " ".join(str(n % 7) for n in range(1000))
    cut = windows(Words(), text, length=20, count=7, seed=0, bos="without")
    assert len({window.ids[0] for window in cut}) >= 6


def test_bos_variants_cut_the_same_text() -> None:
    with_bos = windows(Words(), TEXT, length=20, count=5, seed=0, bos="with")
    without = windows(Words(), TEXT, length=20, count=5, seed=0, bos="without")
    mixed = windows(Words(), TEXT, length=20, count=5, seed=0, bos="mixed")
    assert all(w.ids == [1000, *o.ids[:-1]] for w, o in zip(with_bos, without, strict=True))
    assert [window.bos for window in mixed] == [True, False, True, False, True]
    assert mixed[1] == without[1]


def test_short_texts() -> None:
    assert len(windows(Words(), TEXT, length=300, count=16, seed=0, bos="without")) == 3
    with pytest.raises(DataError, match="1000 tokens, one window needs 1001"):
        windows(Words(), TEXT, length=1001, count=1, seed=0, bos="without")
    with pytest.raises(UsageError):
        windows(Words(), TEXT, length=1, count=1, seed=0, bos="without")


def test_tokenizer_without_bos() -> None:
    with pytest.raises(DataError, match="no BOS"):
        windows(Words(None), TEXT, length=10, count=1, seed=0, bos="with")
    assert not windows(Words(None), TEXT, length=10, count=1, seed=0, bos="mixed")[0].bos


def test_held_out_windows_share_no_token_with_the_others() -> None:
    taken = windows(Words(), TEXT, length=50, count=8, seed=0, bos="mixed")
    held = held_out_windows(Words(), TEXT, taken, length=20, count=6)
    assert [window.bos for window in held] == [True, False] * 3
    used = {token for window in taken for token in window.ids[window.bos :]}
    mine = [token for window in held for token in window.ids[window.bos :]]
    assert len(mine) == len(set(mine)) == 6 * 20 - 3
    assert not used & set(mine)
    for window in (*taken, *held):
        assert window.ids[window.bos] == window.start


def test_a_text_that_is_used_up_holds_nothing_out() -> None:
    taken = windows(Words(), TEXT, length=500, count=2, seed=0, bos="without")
    assert held_out_windows(Words(), TEXT, taken, length=20, count=6) == []


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DataError, match="is not a file"):
            load_text(place)


def _piped(content: bytes) -> str:
    reader, writer = os.pipe()
    sender = threading.Thread(target=lambda: (os.write(writer, content), os.close(writer)))
    sender.start()
    return f"/dev/fd/{reader}"


def test_a_pipe_that_is_open_is_read_once() -> None:
    """`--text <(zcat text.gz)`."""
    name = _piped("\ufeffvery grün\r\n".encode())
    assert load_text(name) == "very grün\n"
    with pytest.raises(DataError, match="is empty"):
        load_text(name)


def test_no_more_is_read_than_a_text_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "_MAX_BYTES", 1 << 20)
    with (tmp_path / "sparse.txt").open("wb") as stream:
        stream.truncate(1 << 34)
    with pytest.raises(DataError, match="has more than 1 MiB"):
        load_text(tmp_path / "sparse.txt")
    monkeypatch.setattr(samples, "_MAX_BYTES", 100)
    with pytest.raises(DataError, match="has more than"):
        load_text(_piped(b"x" * 200))
