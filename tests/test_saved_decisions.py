"""Decisions read back from a bundle give the same graph to the bit, and other dtypes too."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from iq_export.bundle.manifest import Manifest
from iq_export.decide.job import Calibration
from iq_export.errors import BundleError
from iq_export.graph import io
from iq_export.passes.order import begin, lower
from iq_export.pipeline import Rewrite, rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
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
    files = (folder / "model.onnx", folder / "model.onnx.data")
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
    io.save(lower(begin(io.load(done.traced))[0], done.chosen).model, again / "model.onnx")
    assert digest(again) == digest(done.quantized.parent)

    bundle: Any = Folder(tmp_path, done)
    read = load_decisions(bundle, done.sites)
    assert record(read) == bundle.plan()["decisions"]
    back = tmp_path / "back"
    back.mkdir()
    io.save(lower(begin(io.load(done.traced))[0], read).model, back / "model.onnx")
    assert digest(back) == digest(done.quantized.parent)


class Folder:
    """As much of a Bundle as decisions are read from."""

    def __init__(self, folder: Path, done: Rewrite) -> None:
        self.folder, self.model = folder, done.quantized
        self.manifest = Manifest(
            "m", done.recipe.name, done.chosen.dtype, 23, recipe_settings=done.recipe.record(),
            files={},
        )  # fmt: skip
        plan = json.dumps({"decisions": record(done.chosen)})
        (folder / "plan.json").write_text(plan, encoding="utf-8")
        save_arrays(done.chosen, folder / "sinks.safetensors")

    def path(self, name: str) -> Path:
        return self.folder / name

    def plan(self) -> Any:
        return json.loads(self.path("plan.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Rewrite:
    return rewritten(tmp_path_factory.mktemp("whole"), "w8a8", "fp32", "norm")


def _set(value: Any, *path: Any) -> Callable[[Any], None]:
    def change(plan: Any) -> None:
        for step in path[:-1]:
            plan = plan[step]
        plan[path[-1]] = value

    return change


NODE = "layers.0/mlp/down_proj"


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.pop("decisions"),
        lambda plan: plan["decisions"]["sinks"][0].pop("early"),
        _set({"recipe": []}, "decisions"),
        _set(False, "decisions", "recipe", "gptq"),
        _set("bf16", "decisions", "dtype"),
        _set(-3, "decisions", "exponent"),
        _set(10**30, "decisions", "exponent"),
        _set(["nobody"], "decisions", "left"),
        _set(["nobody"], "decisions", "scaled_queries"),
        _set([-1], "decisions", "side_channels", NODE),
        _set([10**6], "decisions", "side_channels", NODE),
        _set([10**30], "decisions", "side_channels", NODE),
        _set(None, "decisions", "sinks", 0, "birth"),
        _set(-1, "decisions", "sinks", 0, "birth"),
        _set([99], "decisions", "sinks", 0, "clamp_blocks"),
        _set("nope", "decisions", "sinks", 0, "form"),
        _set("norm+kv", "decisions", "sinks", 0, "form"),
        _set(1e300, "decisions", "sinks", 0, "threshold"),
        _set("x", "decisions", "sinks", 0, "threshold"),
        _set(None, "decisions", "sinks", 0, "position_0_forced"),
        _set({"layers.0/mlp/Mul/out": None}, "decisions", "activations"),
    ],
)
def test_what_no_compile_writes_is_one_sentence(
    tmp_path: Path, whole: Rewrite, change: Callable[[Any], None]
) -> None:
    bundle: Any = Folder(tmp_path, whole)
    plan = bundle.plan()
    change(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(BundleError, match="compile it again without --decisions"):
        load_decisions(bundle, whole.sites)


@pytest.mark.parametrize("harm", ["not safetensors", "NaN", "narrow", "codes", "cut"])
def test_arrays_that_do_not_fit_are_one_sentence(tmp_path: Path, whole: Rewrite, harm: str) -> None:
    bundle: Any = Folder(tmp_path, whole)
    path = tmp_path / "sinks.safetensors"
    arrays = load_file(path)
    if harm == "not safetensors":
        path.write_bytes(b"\0" * 16)
    elif harm == "codes":
        bundle.model = whole.traced
    elif harm == "cut":  # the codes are read later: where nothing would say what to do
        bundle.model = Path(shutil.copy(whole.quantized, tmp_path))
        data = whole.quantized.with_name(f"{whole.quantized.name}.data").read_bytes()
        (tmp_path / f"{whole.quantized.name}.data").write_bytes(data[: len(data) // 2])
    else:
        name = next(name for name in arrays if name.endswith("detection"))
        bad = np.full_like(arrays[name], np.nan) if harm == "NaN" else arrays[name][:, 1:].copy()
        save_file({**arrays, name: bad}, path)
    with pytest.raises(BundleError, match="compile it again without --decisions"):
        load_decisions(bundle, whole.sites)
