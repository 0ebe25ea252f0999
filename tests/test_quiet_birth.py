"""A spike whose birth is no 64 times the median at the down-projection, from the file to int8.

The profile is that of a half-billion model (tools/discovery/sweep.py), with fewer blocks between
birth and death.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from iq_export.decide.job import Calibration
from iq_export.observe.walk import walk
from iq_export.pipeline import Rewrite, rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from tests.planted import CPU
from tools.discovery.models import plant, windows
from tools.discovery.sweep import HALF_BILLION

(LIFE,) = HALF_BILLION.lives
MODEL = replace(
    HALF_BILLION, blocks=7, hidden=64, heads=4, kv_heads=2, features=128, count=14, length=48,
    lives=(replace(LIFE, death=5, drift=0.3, down_ratio=55.0),),
)  # fmt: skip
DATA = windows(MODEL)


# What insertion alone does: nothing else holds a spike beside the quantizers or makes up for it.
PLAIN = replace(load_recipe("w8a8"), folded_rotation=False, side_channels=0, gptq=False)


def compiled(folder: Path) -> Rewrite:
    traced, work = folder / "traced", folder / "work"
    traced.mkdir(parents=True)
    work.mkdir()
    onnx.save(
        plant(MODEL), traced / "model.onnx", save_as_external_data=True,
        location="model.onnx.data", size_threshold=256,
    )  # fmt: skip
    data = Calibration(DATA[:4], DATA[4:10], 0.1, 0, CPU, insertion="norm")
    return rewrite(traced / "model.onnx", work, PLAIN, "fp32", data, Progress(quiet=True))


def error(done: Rewrite) -> float:
    """Relative squared error of the logits of all rows but the sink's, on other windows."""
    lost = total = 0.0
    runs = [
        walk(path, ["logits"], DATA[10:], providers=CPU, progress=Progress(quiet=True))
        for path in (done.traced, done.quantized)
    ]
    for (_, exact), (_, found) in zip(*runs, strict=True):
        lost += float(((found["logits"] - exact["logits"])[1:] ** 2).sum())
        total += float((exact["logits"][1:] ** 2).sum())
    return lost / total


def test_it_is_replaced_and_int8_gains_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = compiled(tmp_path / "with")
    (decision,) = done.decisions
    life = decision.lifecycle
    assert (life.birth, life.death, life.force_first) == (2, 5, True)
    assert life.down_peak < 64 * life.down_median
    assert life.residual_peak > 100 * np.median(done.stats.residual_max[2])
    assert decision.replaced and done.sink_nodes and done.recall == 1
    monkeypatch.setattr("iq_export.pipeline.discover", lambda stats: [])
    assert error(done) < error(compiled(tmp_path / "without")) / 10
