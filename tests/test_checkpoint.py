"""What finished steps gave comes back to the bit, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iq_export.checkpoint import Checkpoint, job_key
from iq_export.packed import pack, unpack


@dataclass(frozen=True)
class Inner:
    scale: float
    rows: np.ndarray | None


@dataclass
class Outer:
    parts: dict[str, Inner]
    names: tuple[str, ...]
    pair: tuple[int, list[Inner]]
    chosen: frozenset[int]
    number: np.float32
    settings: object


ROWS = np.arange(6, dtype=np.float16).reshape(2, 3)
SETTINGS = object()


def outer() -> Outer:
    inner = Inner(0.1 + 0.2, ROWS)
    return Outer({"a": inner, "b": Inner(float("inf"), None)}, ("x", "y"), (3, [inner]),
                 frozenset({1, 2}), np.float32(0.1), SETTINGS)  # fmt: skip


def test_a_value_comes_back_to_the_bit() -> None:
    tree, arrays = pack(outer(), {"settings": SETTINGS})
    found = unpack(Outer, tree, arrays, {"settings": SETTINGS})
    assert sum(array.ndim > 0 for array in arrays) == 1  # rows that occur twice are kept once
    assert found.parts["a"].rows is found.pair[1][0].rows
    assert found.parts["a"].rows.dtype == np.float16 and (found.parts["a"].rows == ROWS).all()
    assert found.parts["a"].scale == 0.1 + 0.2 and found.parts["b"] == Inner(float("inf"), None)
    assert (found.names, found.chosen, found.pair[0]) == (("x", "y"), frozenset({1, 2}), 3)
    assert type(found.number) is np.float32 and found.number == np.float32(0.1)
    assert found.settings is SETTINGS


@pytest.mark.parametrize("value", [object(), {"a": Path("x")}, np.array([object()])])
def test_what_cannot_be_read_again_is_not_written(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be written"):
        pack(value, {})


def made(count: int) -> Inner:
    return Inner(float(count), np.full((2, 2), count, np.float32))


def never(count: int) -> Inner:
    raise AssertionError(count)


def fill(folder: Path, count: int = 3) -> None:
    kept = Checkpoint(folder, "key")
    for number in range(count):
        kept.step(str(number), made, number)


def taken(folder: Path, key: str = "key") -> tuple[list[str], list[str]]:
    """The records that another run finds, and what it says."""
    said: list[str] = []
    kept = Checkpoint(folder, key, said.append)
    found = [str(number) for number in range(3) if str(number) in kept]
    for name in found:
        assert (kept.step(name, never, 0).rows == made(int(name)).rows).all()
    return found, said[: len(said) - len(found)]


def test_another_run_takes_what_was_finished(tmp_path: Path) -> None:
    fill(tmp_path / "u")
    (tmp_path / "u" / "9.npz").write_bytes(b"half")
    assert taken(tmp_path / "u") == (["0", "1", "2"], [])
    names = sorted(path.name for path in (tmp_path / "u").iterdir())
    assert names == ["0.npz", "1.npz", "2.npz", "journal.json"]


def test_nothing_of_another_job_is_taken(tmp_path: Path) -> None:
    fill(tmp_path / "u")
    found, (said,) = taken(tmp_path / "u", "another")
    assert found == [] and "another model, text, option or version" in said
    assert [path.name for path in (tmp_path / "u").iterdir()] == ["journal.json"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "link", "folder"])
def test_what_is_damaged_and_all_behind_it_is_made_again(tmp_path: Path, damage: str) -> None:
    fill(tmp_path / "u")
    record = tmp_path / "u" / "1.npz"
    content = bytearray(record.read_bytes())
    record.unlink()
    if damage == "flipped":
        content[-1] ^= 1
        record.write_bytes(content)
    elif damage == "cut":
        record.write_bytes(content[:-10])
    elif damage == "link":
        (tmp_path / "1.npz").write_bytes(content)
        record.symlink_to(tmp_path / "1.npz")
    elif damage == "folder":
        record.mkdir()
    found, (said,) = taken(tmp_path / "u")
    assert found == ["0"] and "what is whole is taken" in said
    assert [path.name for path in tmp_path.glob("1.npz")] == ["1.npz"] * (damage == "link")
    fill(tmp_path / "u")
    assert taken(tmp_path / "u") == (["0", "1", "2"], [])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "key"}', '{"key": "key", "records": 3}',
                                  '{"key": "key", "records": [["0", {"../x": "0"}]]}'])  # fmt: skip
def test_a_damaged_journal_is_said(tmp_path: Path, text: str) -> None:
    fill(tmp_path / "u")
    (tmp_path / "u" / "journal.json").write_text(text)
    found, (said,) = taken(tmp_path / "u")
    assert found == [] and "is damaged" in said


def test_a_link_in_its_place_leads_to_nothing_of_ours(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    (tmp_path / "u").symlink_to(tmp_path / "home")
    fill(tmp_path / "u")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter"]
    assert taken(tmp_path / "u")[0] == ["0", "1", "2"]


def test_a_step_that_fails_keeps_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        Checkpoint(tmp_path / "u", "key").step("0", never, 0)
    assert taken(tmp_path / "u") == ([], [])


def test_without_a_folder_nothing_is_kept() -> None:
    kept = Checkpoint()
    assert kept.step("0", made, 1).scale == 1.0 and "0" not in kept


def test_the_key_depends_on_every_part() -> None:
    keys = [job_key("w8a8", made(0)), job_key("w8a8", made(1)), job_key("w4a16", made(0))]
    assert len(set(keys)) == 3 and keys[0] == job_key("w8a8", made(0))
