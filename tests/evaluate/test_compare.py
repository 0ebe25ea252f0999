"""The comparison table: ratios, agreement, broken graphs, paired timing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iq_export.errors import GraphError, UsageError
from iq_export.evaluate.compare import compare, speed_line, table, time_prefill
from iq_export.graph import io
from iq_export.observe.segments import segments
from iq_export.observe.walk import Piece
from tests import lookup
from tests.planted import Planted

VOCAB = 13
Measure = Callable[..., Any]


def graph(stem: str, folder: Path) -> Path:
    """Logits depend on the current token; the name says how much noise is on them."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(VOCAB, VOCAB)).astype(np.float32)
    if stem == "broken":
        table[:] = np.nan
    elif stem != "fp32":
        table += rng.normal(size=(VOCAB, VOCAB)).astype(np.float32)
    return lookup.save(folder / f"{stem}.onnx", table)


class Words:
    def __init__(self, bos_id: int | None) -> None:
        self.bos_id = bos_id

    def encode(self, text: str, add_bos: bool) -> list[int]:
        return [int(word) for word in text.split()]


TEXT = " ".join(str(n * n % VOCAB) for n in range(400))


@pytest.fixture
def measure(tmp_path: Path) -> Measure:
    def run(labels: dict[str, str], bos_id: int | None = 1) -> Any:
        graphs = {label: graph(stem, tmp_path) for label, stem in labels.items()}
        return compare(graphs, Words(bos_id), TEXT, count=4, length=32, text_name="squares")

    return run


def test_rows_relate_to_the_reference(measure: Measure) -> None:
    result = measure({"noisy": "noisy", "same": "fp32", "fp32": "fp32"})
    rows = {(row.graph, row.bos): row for row in result.rows}
    assert [row.graph for row in result.rows[:2]] == ["fp32", "fp32"]
    assert rows["same", True].ratio == pytest.approx(1)
    assert rows["same", True].top1_agreement == 1
    assert rows["same", True].kl == pytest.approx(0, abs=1e-7)
    noisy = rows["noisy", False]
    assert noisy.kl > 0.01
    assert noisy.top1_agreement < 1
    assert noisy.ratio == pytest.approx(noisy.perplexity / rows["fp32", False].perplexity)
    assert noisy.tokens == 4 * 31


def test_tokenizer_without_bos_has_one_variant(measure: Measure) -> None:
    assert [row.bos for row in measure({"fp32": "fp32"}, bos_id=None).rows] == [False]


def test_no_reference_leaves_the_ratio_open(measure: Measure) -> None:
    row = measure({"bundle": "noisy"}).rows[0]
    assert row.ratio is row.kl is None
    assert row.perplexity > 1


def test_broken_graph_gets_a_row_and_a_broken_reference_an_error(measure: Measure) -> None:
    result = measure({"fp32": "fp32", "rtn": "broken"})
    assert "NaN" in result.rows[-1].error
    with pytest.raises(GraphError, match="fp32: logits of window 0"):
        measure({"fp32": "broken"})


def test_table_for_people(measure: Measure) -> None:
    text = table(measure({"fp32": "fp32", "rtn": "broken", "bundle (w8a8)": "noisy"}).to_dict())
    lines = text.splitlines()
    assert lines[0] == "4 windows x 32 tokens of squares"
    assert len(lines) == 2 + 6
    assert "100.0%" in lines[2]


def test_timing_is_paired(tmp_path: Path) -> None:
    ours, theirs = graph("noisy", tmp_path), graph("fp32", tmp_path)
    speed = time_prefill(ours, theirs, length=16, rounds=3)
    assert set(speed.seconds) == {"bundle", "fp32"}
    assert math.isfinite(speed.ratio)
    assert "x the time of fp32" in speed_line(vars(speed))
    with pytest.raises(UsageError):
        time_prefill(ours, theirs, rounds=0)


def test_timing_goes_piece_by_piece(spiky: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of graphs that have not as many are alternated too, and none runs more often."""
    monkeypatch.setitem(segments.__kwdefaults__, "budget", 1)
    pieces = [len(segments(io.load(p).graph)) for p in (spiky.inserted, spiky.path)]
    runs: list[Piece] = []
    run = Piece.run
    monkeypatch.setattr(Piece, "run", lambda piece, *args: runs.append(piece) or run(piece, *args))
    speed = time_prefill(spiky.inserted, spiky.path, length=16, rounds=2)
    assert len(runs) == 3 * sum(pieces) and len(set(runs)) == sum(pieces)
    assert all(value > 0 for value in speed.seconds.values())


def test_a_graph_in_memory_and_its_file_are_one(spiky: Planted) -> None:
    graphs = {"fp32": spiky.path, "file": spiky.inserted, "memory": spiky.load_inserted()}
    found = compare(graphs, Words(1), TEXT, count=4, length=32, text_name="squares")
    rows = {(row.graph, row.bos): asdict(row) | {"graph": "", "seconds": 0} for row in found.rows}
    for bos in (True, False):
        assert rows["memory", bos] == rows["file", bos]
        assert rows["file", bos]["ratio"] == pytest.approx(1, abs=1e-3)
