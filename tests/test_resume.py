"""A run that was interrupted goes on, and ships the same bytes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iq_export.bundle.package import Bundle
from iq_export.checkpoint import Checkpoint
from iq_export.decide.job import Calibration
from iq_export.errors import ModelError
from iq_export.observe.walk import Piece
from iq_export.pipeline import Rewrite, rewrite
from iq_export.plan import lifecycle_records, plan_record
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
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


class Decoder:
    def decode(self, ids: list[int]) -> str:
        return str(ids)


def shipped(done: Rewrite, folder: Path) -> list[Any]:
    save_arrays(done.chosen, folder / "sinks.safetensors")
    names = ("work/model.onnx", "work/model.onnx.data", "sinks.safetensors")
    said = [lifecycle_records(done, Decoder()), plan_record(done, Decoder())]
    return [
        *said,
        record(done.chosen),
        done.check,
        *((folder / name).read_bytes() for name in names),
    ]


def test_killed_before_the_end(tmp_path: Path) -> None:
    """All that was found comes from records then, and what is said of it is the same."""
    whole = shipped(run(tmp_path / "whole", "w8a8"), tmp_path / "whole")
    assert any(life["replaced"] for life in whole[0])

    class Last(Checkpoint):
        def put(self, values: Mapping[str, object], **more: Any) -> None:
            super().put(values, **more)
            if "check" in values:
                raise Killed

    folder = tmp_path / "killed"
    folder.mkdir()
    with pytest.raises(Killed):
        run(folder, "w8a8", Last(folder / "unfinished", "key"))
    done = run(folder, "w8a8", Checkpoint(folder / "unfinished", "key"))
    assert shipped(done, folder) == whole


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
    original, runs, last = Piece.run, 0, 0

    def dying(self: Piece, *args: object) -> object:
        nonlocal runs
        runs += 1
        if runs == last:
            raise Killed
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Piece, "run", dying)
    whole = shipped(run(tmp_path / "whole", "w8a8"), tmp_path / "whole")
    last, runs = int(np.random.default_rng(seed).integers(1, runs + 1)), 0
    folder = tmp_path / "killed"
    folder.mkdir()
    with pytest.raises(Killed):
        run(folder, "w8a8", Checkpoint(folder / "unfinished", "key"))
    done = run(folder, "w8a8", Checkpoint(folder / "unfinished", "key"))
    assert shipped(done, folder) == whole


# The command on a graph of many pieces.
_PIECES = """
import sys
from iq_export import cli
from iq_export.observe import segments
segments.segments.__kwdefaults__["budget"] = 1 << 16
sys.argv = ["iq-export", *sys.argv[1:]]
cli.entry()
"""
_TAKEN = "taken from the run that was interrupted"


def started(model: Path, folder: Path) -> subprocess.Popen[str]:
    """A compile of `model` to `folder / "out"`, with a work folder beside it."""
    folder.mkdir(exist_ok=True)
    argv = ["compile", str(model), str(folder / "out"), "--work", str(folder / "work")]
    argv += ["--samples", "8", "--length", "64", "--target", "orin"]
    return subprocess.Popen(
        [sys.executable, "-c", _PIECES, *argv], stderr=subprocess.PIPE, text=True
    )


def finished(process: subprocess.Popen[str]) -> str:
    """What it says; it is whole."""
    error = process.communicate()[1]
    assert process.returncode == 0, error
    return error


def graph(folder: Path) -> list[bytes]:
    assert sorted(path.name for path in folder.iterdir()) == ["out", "work"]
    assert not (folder / "work" / "unfinished").exists() and not (folder / "work" / "run").exists()
    Bundle.open(folder / "out")  # compares every file with its checksum
    names = ("model.onnx", "model.onnx.data", "sinks.safetensors")
    return [(folder / "out" / name).read_bytes() for name in names]


@pytest.mark.heavy
def test_the_command_killed_at_random_moments(tiny_model: Path, tmp_path: Path) -> None:
    assert _TAKEN not in finished(started(tiny_model, tmp_path / "whole"))
    whole, rng, taken = graph(tmp_path / "whole"), np.random.default_rng(0), 0
    for number in range(10):
        folder = tmp_path / str(number)
        process = started(tiny_model, folder)
        first = folder / "work" / "unfinished" / "0.npz"
        while process.poll() is None and not first.exists():  # most of the time is the trace's
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 3))
        process.kill()
        process.communicate()
        if not (folder / "out").exists():
            taken += _TAKEN in finished(started(tiny_model, folder))
        assert graph(folder) == whole
    assert taken >= 3


@pytest.mark.heavy
@pytest.mark.parametrize("again", [True, False])
def test_the_model_deleted_or_replaced_in_the_middle(
    tiny_model: Path, tmp_path: Path, again: bool
) -> None:
    """A run that reads it ends with a sentence or is whole, and the next one never mixes them."""
    model, folder = tmp_path / "model", tmp_path / "deleted"
    shutil.copytree(tiny_model, model)
    process = started(model, folder)
    assert process.stderr is not None
    said = ""
    while "Insert sinks" not in said:
        said = process.stderr.readline()
        assert said
    shutil.rmtree(model)
    if again:
        shutil.copytree(tiny_model, model)
        weights = model / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-4096:-2048] = bytes(2048)  # a row of one matrix
        weights.write_bytes(content)
    error = process.communicate()[1]
    assert process.returncode in (0, ModelError.exit_code), error
    assert "Traceback" not in error and "unexpected" not in error
    assert (folder / "out").exists() == (process.returncode == 0)
    shutil.rmtree(folder / "out", ignore_errors=True)
    process = started(model, folder)
    error = process.communicate()[1]
    if not again:
        assert process.returncode == ModelError.exit_code
        assert "Traceback" not in error and not (folder / "out").exists()
        return
    assert process.returncode == 0 and _TAKEN not in error
    finished(started(model, tmp_path / "fresh"))
    assert graph(folder) == graph(tmp_path / "fresh")
