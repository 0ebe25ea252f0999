"""The comparison table: ratios, agreement, broken graphs, paired timing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iq_export.errors import GraphError, UsageError
from iq_export.evaluate.compare import compare, speed_line, table, time_prefill

VOCAB = 13


@dataclass
class Step:
    logits: np.ndarray


class Fake:
    """Logits depend on the current token; the file name says how much noise is on them."""

    vocab_size = embedding_rows = VOCAB

    def __init__(self, path: Path, **_: Any) -> None:
        rng = np.random.default_rng(0)
        self.table = rng.normal(size=(VOCAB, VOCAB)).astype(np.float32)
        if path.stem == "broken":
            self.table[:] = np.nan
        elif path.stem != "fp32":
            self.table += rng.normal(size=(VOCAB, VOCAB)).astype(np.float32)

    def forward(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, **_: bool) -> Step:
        return Step(self.table[ids])


class Words:
    def __init__(self, bos_id: int | None) -> None:
        self.bos_id = bos_id

    def encode(self, text: str, add_bos: bool) -> list[int]:
        return [int(word) for word in text.split()]


TEXT = " ".join(str(n * n % VOCAB) for n in range(400))


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iq_export.run.ort.CausalLM", Fake)


def measure(labels: dict[str, str], bos_id: int | None = 1) -> Any:
    graphs = {label: Path(f"{stem}.onnx") for label, stem in labels.items()}
    return compare(graphs, Words(bos_id), TEXT, count=4, length=32, text_name="squares")


def test_rows_relate_to_the_reference() -> None:
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


def test_tokenizer_without_bos_has_one_variant() -> None:
    assert [row.bos for row in measure({"fp32": "fp32"}, bos_id=None).rows] == [False]


def test_no_reference_leaves_the_ratio_open() -> None:
    row = measure({"bundle": "noisy"}).rows[0]
    assert row.ratio is row.kl is None
    assert row.perplexity > 1


def test_broken_graph_gets_a_row_and_a_broken_reference_an_error() -> None:
    result = measure({"fp32": "fp32", "rtn": "broken"})
    assert "NaN" in result.rows[-1].error
    with pytest.raises(GraphError, match="fp32: logits of window 0"):
        measure({"fp32": "broken"})


def test_table_for_people() -> None:
    text = table(measure({"fp32": "fp32", "rtn": "broken", "bundle (w8a8)": "noisy"}).to_dict())
    lines = text.splitlines()
    assert lines[0] == "4 windows x 32 tokens of squares"
    assert len(lines) == 2 + 6
    assert "100.0%" in lines[2]


def test_timing_is_paired() -> None:
    speed = time_prefill(Path("a.onnx"), Path("fp32.onnx"), length=16, rounds=3)
    assert set(speed.seconds) == {"bundle", "fp32"}
    assert math.isfinite(speed.ratio)
    assert "x the time of fp32" in speed_line(vars(speed))
    with pytest.raises(UsageError):
        time_prefill(Path("a.onnx"), Path("fp32.onnx"), rounds=0)
