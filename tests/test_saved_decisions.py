"""Decisions read back from a bundle give the same graph to the bit, and other dtypes too."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from iq_export.errors import BundleError
from iq_export.graph import io
from iq_export.passes.order import begin, lower
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.rewrite import Calibration, Rewrite, rewrite
from iq_export.saved_decisions import load_decisions, record, save_arrays
from tests import planted
from tests.planted import CPU


def rewritten(folder: Path, recipe: str, dtype: str, insertion: str) -> Rewrite:
    decoder = planted.WITH_DELIMITER
    traced = planted.save(decoder, folder)
    (folder / "work").mkdir()
    cut = planted.windows(decoder, count=10)
    data = Calibration(
        windows=cut[:4], probes=cut[4:], max_relative_deviation=0.1, seed=0, providers=CPU,
        insertion=insertion,
    )  # fmt: skip
    quiet = Progress(quiet=True)
    return rewrite(traced, folder / "work", load_recipe(recipe), dtype, data, quiet)


def digest(folder: Path) -> dict[str, str]:
    files = (folder / "quantized.onnx", folder / "quantized.onnx.data")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize(
    ("recipe", "dtype", "insertion"),
    [("w8a8", "fp16", "auto"), ("w8a8kv8", "fp32", "kv"), ("w4a16", "fp32", "norm"),
     ("w4a8", "fp16", "norm"), ("fp16", "fp16", "norm")],
)  # fmt: skip
def test_the_same_graph_to_the_bit(tmp_path: Path, recipe: str, dtype: str, insertion: str) -> None:
    done = rewritten(tmp_path, recipe, dtype, insertion)
    again = tmp_path / "again"
    again.mkdir()
    io.save(lower(begin(io.load(done.traced))[0], done.chosen).model, again / "quantized.onnx")
    assert digest(again) == digest(done.quantized.parent)

    bundle: Any = Folder(tmp_path, done)
    read = load_decisions(bundle, done.sites)
    assert record(read) == bundle.plan()["decisions"]
    back = tmp_path / "back"
    back.mkdir()
    io.save(lower(begin(io.load(done.traced))[0], read).model, back / "quantized.onnx")
    assert digest(back) == digest(done.quantized.parent)


class Folder:
    """As much of a Bundle as decisions are read from."""

    def __init__(self, folder: Path, done: Rewrite) -> None:
        self.folder, self.model = folder, done.quantized
        plan = json.dumps({"decisions": record(done.chosen)})
        (folder / "plan.json").write_text(plan, encoding="utf-8")
        save_arrays(done.chosen, folder / "sinks.safetensors")

    def path(self, name: str) -> Path:
        return self.folder / name

    def plan(self) -> Any:
        return json.loads(self.path("plan.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("harm", ["older", "sinks", "shape", "array"])
def test_what_is_damaged_is_one_sentence(tmp_path: Path, harm: str) -> None:
    done = rewritten(tmp_path, "w8a8", "fp32", "norm")
    bundle: Any = Folder(tmp_path, done)
    plan = bundle.plan()
    if harm == "older":
        del plan["decisions"]
    elif harm == "sinks":
        plan["decisions"]["sinks"][0]["birth"] = None
        del plan["decisions"]["sinks"][0]["early"]
    elif harm == "shape":
        plan["decisions"] = {"recipe": []}
    else:
        (tmp_path / "sinks.safetensors").write_bytes(b"\0" * 16)
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(BundleError, match="compile it again without --decisions"):
        load_decisions(bundle, done.sites)
