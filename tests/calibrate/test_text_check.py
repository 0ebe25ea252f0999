"""Calibration text that cannot do its work is named, and why; running text is left alone."""

from __future__ import annotations

import numpy as np

from iq_export.calibrate.data import Window
from iq_export.calibrate.text_check import surprise_warning, token_warnings
from iq_export.progress import Progress
from iq_export.run.generate import generate
from iq_export.run.ort import CausalLM
from tests.planted import CPU, Planted


class Pieces:
    """Ids below 200 are words, the others characters or parts of one."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f" word{i}" if i < 200 else chr(i) if i % 2 else "\N{REPLACEMENT CHARACTER}"
                       for i in ids)  # fmt: skip


def cut(ids: np.ndarray) -> list[Window]:
    return [Window(row.tolist(), False) for row in ids.reshape(8, -1)]


def test_running_text_has_no_warning() -> None:
    ids = np.random.default_rng(0).integers(0, 200, 4096)
    ids[:1000] += 200  # a quarter is punctuation, digits, ...
    assert token_warnings(cut(ids), Pieces()) == []


def test_one_repeated_token() -> None:
    (found,) = token_warnings(cut(np.full(4096, 7)), Pieces())
    assert "1 distinct tokens among 4096 (' word7' alone is 100% of it)" in found


def test_few_distinct_tokens() -> None:
    (found,) = token_warnings(cut(np.arange(4096) % 20), Pieces())
    assert "20 distinct tokens" in found and "give running text" in found


def test_a_bos_is_not_counted() -> None:
    ids = np.full((8, 512), 7)
    ids[:, 0] = 1
    (found,) = token_warnings([Window(row.tolist(), True) for row in ids], Pieces())
    assert "1 distinct tokens among 4088" in found


def test_a_language_that_falls_apart() -> None:
    ids = np.random.default_rng(0).integers(120, 400, 4096)
    (found,) = token_warnings(cut(ids), Pieces())
    assert "72% of the calibration text's tokens are single characters or parts of one" in found


def test_noise_to_the_model(calm: Planted) -> None:
    """Random weights predict nothing; the same text is no surprise to weights that know it."""
    options = {"providers": CPU, "progress": Progress(quiet=True)}
    found = surprise_warning(calm.path, calm.windows, **options)
    assert found is not None
    assert "perplexity" in found and "token frequencies alone" in found


def test_text_that_the_model_predicts(calm: Planted) -> None:
    """What it writes itself is no noise to it."""
    model = CausalLM(calm.path)
    texts = [
        [start, *generate(model, [start], max_new_tokens=80, temperature=1.0, seed=start)]
        for start in range(4)
    ]
    options = {"providers": CPU, "progress": Progress(quiet=True)}
    assert surprise_warning(calm.path, [Window(ids, False) for ids in texts], **options) is None
