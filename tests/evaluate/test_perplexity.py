"""Perplexity against a direct computation, and what a broken graph looks like."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from iq_export.errors import DataError, GraphError
from iq_export.evaluate.perplexity import exp_or_inf, perplexity, score, window_logits
from iq_export.graph import io
from iq_export.observe.samples import Window
from iq_export.passes.to_half import to_half
from iq_export.run.ort import CausalLM
from tests import lookup
from tests.planted import Planted

VOCAB = 11


def table(scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32) * scale


def test_perplexity_equals_the_definition(tmp_path: Path) -> None:
    model = table()
    windows = [Window([1, 2, 3, 4], True), Window([5] * 100, False)]
    expected = []
    for window in windows:
        for current, following in zip(window.ids[:-1], window.ids[1:], strict=True):
            row = model[current]
            expected.append(-math.log(np.exp(row)[following] / np.exp(row).sum()))
    measured = perplexity(lookup.save(tmp_path / "m.onnx", model), windows)
    assert measured.tokens == len(expected) == 102
    assert measured.nll == pytest.approx(sum(expected), rel=1e-5)
    assert measured.value == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


def test_large_logits_do_not_overflow(tmp_path: Path) -> None:
    path = lookup.save(tmp_path / "m.onnx", table(scale=100.0))
    assert np.isfinite(perplexity(path, [Window([1, 2, 3], False)]).value)
    assert exp_or_inf(1e4) == math.inf


def test_not_a_number_names_the_window(tmp_path: Path) -> None:
    model = table()
    model[7, 2] = np.nan
    windows = [Window([1, 2, 3], True), Window([1, 7, 3], False)]
    with pytest.raises(GraphError, match=r"window 1 .* from token 1 on .without BOS"):
        perplexity(lookup.save(tmp_path / "m.onnx", model), windows)


def test_no_windows(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        perplexity(tmp_path / "m.onnx", [])


def test_sampled_rows_are_log_probabilities() -> None:
    window = Window([1, 2, 3, 4], False)
    scored = score(table()[window.ids], window, 0, sample_rows=[0, 2])
    assert scored.sample.shape == (2, VOCAB)
    np.testing.assert_allclose(np.exp(scored.sample).sum(axis=-1), 1, rtol=1e-6)
    assert scored.top1.shape == (3,)


@pytest.mark.parametrize("half", [False, True])
def test_logits_are_those_of_the_whole_graph_to_the_bit(
    spiky: Planted, tmp_path: Path, half: bool
) -> None:
    model = spiky.load_inserted()
    if half:
        to_half(model)
    path = tmp_path / "m.onnx"
    io.save(model, path)
    whole = CausalLM(path, round_half=True)
    for number, found in window_logits(path, spiky.windows[:3]):
        ids = np.array([spiky.windows[number].ids])
        exact = whole.forward(ids, np.ones_like(ids), np.arange(ids.shape[1])[None]).logits[0]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, exact)


def test_what_is_no_causal_lm_is_refused(spiky: Planted) -> None:
    model = spiky.load()
    del model.graph.outputs[-1]
    with pytest.raises(GraphError, match="is no causal LM with KV cache: it has no output"):
        perplexity(model, spiky.windows[:1])
