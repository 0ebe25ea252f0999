"""A run that was interrupted goes on, and ships the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from iq_export.checkpoint import Checkpoint
from iq_export.observe.walk import Piece
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.rewrite import Calibration, Rewrite, rewrite
from iq_export.saved_decisions import record, save_arrays
from tests import planted


class Killed(Exception):
    """The end of a run, at any place."""


class Fragile(Checkpoint):
    """Dies after each record that it keeps."""

    def put(self, *args: object, **kwargs: object) -> None:
        super().put(*args, **kwargs)  # type: ignore[arg-type]
        raise Killed


def run(folder: Path, recipe: str, kept: Checkpoint | None = None) -> Rewrite:
    folder.mkdir(exist_ok=True)
    traced = folder / "model.onnx"
    if not traced.exists():
        traced = planted.save(planted.TWO_BIRTHS, folder)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    data = planted.windows(planted.TWO_BIRTHS, count=12)
    calibration = Calibration(data[:4], data[4:8], 0.1, 0, planted.CPU, heldout=data[8:])
    return rewrite(
        traced, work, load_recipe(recipe), "fp16", calibration, Progress(quiet=True), kept
    )


def shipped(done: Rewrite, folder: Path) -> list[object]:
    save_arrays(done.chosen, folder / "sinks.safetensors")
    names = ("work/quantized.onnx", "work/quantized.onnx.data", "sinks.safetensors")
    return [record(done.chosen), done.check, *((folder / name).read_bytes() for name in names)]


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "w8a8kv8"])
def test_killed_after_every_record(tmp_path: Path, recipe: str) -> None:
    whole = shipped(run(tmp_path / "whole", recipe), tmp_path / "whole")
    folder, deaths = tmp_path / "killed", 0
    folder.mkdir()
    while True:
        try:
            done = run(folder, recipe, Fragile(folder / "unfinished", "key"))
            break
        except Killed:
            deaths += 1
    assert deaths >= 8
    assert shipped(done, folder) == whole


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_a_random_moment(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shipped(run(tmp_path / "whole", "w8a8"), tmp_path / "whole")
    folder, rng, original = tmp_path / "killed", np.random.default_rng(seed), Piece.run
    folder.mkdir()
    left = int(rng.integers(1, 600))

    def dying(self: Piece, *args: object) -> object:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Piece, "run", dying)
    with pytest.raises(Killed):
        run(folder, "w8a8", Checkpoint(folder / "unfinished", "key"))
    done = run(folder, "w8a8", Checkpoint(folder / "unfinished", "key"))
    assert shipped(done, folder) == whole
