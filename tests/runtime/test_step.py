"""The arithmetic of a step on the CPU: sampling against numpy, windows against a plain session."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from iq_export.run.generate import generate
from iq_export.run.ort import CausalLM
from tests import planted

TOKENS, MAX_PAST = 12, 1024


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def choose(
    library: ctypes.CDLL, logits: np.ndarray, draw: float, temperature: float, k: int, p: float
) -> int:
    return int(
        library.iq_choose(
            _pointer(logits), ctypes.c_int64(len(logits)), ctypes.c_float(temperature),
            ctypes.c_int32(k), ctypes.c_float(p), ctypes.c_double(draw),
        )
    )  # fmt: skip


def weights(logits: np.ndarray, temperature: float, k: int, p: float) -> np.ndarray:
    """What each token weighs: top-k, then top-p of what is left; equal logits share their fate."""
    found = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    if 0 < k < len(logits):
        found[logits < np.sort(logits)[-k]] = 0.0
    if p < 1:
        before = np.array([found[logits > value].sum() for value in logits])
        found[before >= np.float64(np.float32(p)) * found.sum()] = 0.0
    return found / found.sum()


@pytest.mark.parametrize("seed", range(40))
def test_sampling_is_numpys(arithmetic: ctypes.CDLL, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocab = int(rng.integers(1, 300))
    logits = (rng.normal(size=vocab) * rng.uniform(0.1, 8)).astype(np.float32)
    if seed % 2:
        logits = logits.astype(np.float16).astype(np.float32).round(1)  # many are equal
    temperature = float(np.float32(rng.uniform(0.3, 2.0)))
    k = int(rng.choice([0, 1, 5, vocab]))
    p = float(rng.choice([1.0, 0.9, 0.5, 0.05]))
    expected = np.cumsum(weights(logits, temperature, k, p))
    for draw in (0.0, 0.25, 0.7, 0.999999, *rng.random(20)):
        token = choose(arithmetic, logits, draw, temperature, k, p)
        low = expected[token - 1] if token else 0.0
        assert low - 1e-6 <= draw <= expected[token] + 1e-6
        assert expected[token] > low


def test_greedy_takes_the_first_of_the_largest(arithmetic: ctypes.CDLL) -> None:
    logits = np.array([-3.0, 2.0, 7.5, 7.5, -0.0], np.float32)
    assert choose(arithmetic, logits, 0.9, 0.0, 0, 1.0) == 2
    assert choose(arithmetic, -np.abs(logits), 0.9, 0.0, 0, 1.0) == 4
    assert choose(arithmetic, np.array([-0.0, 0.0], np.float32), 0.9, 0.0, 0, 1.0) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_told(
    arithmetic: ctypes.CDLL, bad: float, temperature: float
) -> None:
    logits = np.array([1.0, bad, 2.0], np.float32)
    assert choose(arithmetic, logits, 0.5, temperature, 2, 0.9) == -1


def test_keys_keep_the_order(arithmetic: ctypes.CDLL) -> None:
    values = np.array([-np.inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 3e38, np.inf], np.float32)
    keys = [arithmetic.iq_key(ctypes.c_float(value)) for value in values]
    assert keys == sorted(set(keys))


def test_draws_are_uniform(arithmetic: ctypes.CDLL) -> None:
    def draw(seed: int, row: int, step: int) -> float:
        numbers = (ctypes.c_uint64(number) for number in (seed, row, step))
        return float(arithmetic.iq_uniform(*numbers))

    draws = np.array([[draw(3, row, step) for step in range(200)] for row in range(50)])
    assert ((draws >= 0) & (draws < 1)).all() and len(np.unique(draws)) == draws.size
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert abs(counts - draws.size / 20).max() < 5 * np.sqrt(draws.size / 20)
    assert abs(np.corrcoef(draws[0], draws[1])[0, 1]) < 0.3
    assert draw(3, 0, 0) == draws[0, 0] != draw(4, 0, 0)


class Session:
    """What TextSession does, with ONNX Runtime as the engine: chunks, windows, moved rows."""

    def __init__(self, library: ctypes.CDLL, model: CausalLM, max_seq: int) -> None:
        self.library, self.model, self.max_seq = library, model, max_seq

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        batch, longest = len(prompts), max(map(len, prompts))
        ids = np.zeros((batch, longest), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
        self.valid = np.array([len(prompt) - longest for prompt in prompts])
        self.caches = self.model.empty_past(batch)
        self.window = 0
        last = False
        while not last:
            seq = self._size("chunk", self.window, longest, self.max_seq)
            read = self.window + seq
            last = read == longest
            rows = self._size("window", longest, MAX_PAST) if last else read
            chosen = self._step(ids[:, self.window : read], rows)
        found = [chosen]
        while len(found) < count:
            rows = self._size("window", longest + len(found), MAX_PAST)
            found.append(self._step(found[-1], rows))
        return np.concatenate(found, axis=1).tolist()

    def _step(self, tokens: np.ndarray, rows: int) -> np.ndarray:
        """The next tokens `[batch, 1]`; the cache becomes a window of `rows`."""
        (batch, seq), total = tokens.shape, self.window + tokens.shape[1]
        mask, positions = np.empty((batch, total), np.int64), np.empty((batch, seq), np.int64)
        sizes = map(ctypes.c_int64, (batch, seq, total))
        self.library.iq_inputs(*map(_pointer, (self.valid, mask, positions)), *sizes)
        step = self.model.forward(tokens, mask, positions, self.caches)
        self.caches = [_moved(self.library, value, total, rows) for value in step.present]
        self.window = rows
        return step.logits[:, -1].argmax(-1)[:, None]

    def _size(self, name: str, *sizes: int) -> int:
        return int(getattr(self.library, f"iq_{name}")(*map(ctypes.c_int64, sizes)))


def _moved(library: ctypes.CDLL, present: np.ndarray, total: int, rows: int) -> np.ndarray:
    """The window of `rows` that `present` [batch, heads, total, size] becomes."""
    axis = 2 if present.ndim == 4 else 1
    shape = list(present.shape)
    shape[axis] = rows
    past = np.full(shape, 77, present.dtype)
    heads = int(np.prod(shape[:axis]))
    row_bytes = int(np.prod(shape[axis + 1 :])) * present.itemsize
    library.iq_move(
        _pointer(np.ascontiguousarray(present)), _pointer(past),
        *map(ctypes.c_int64, (heads, row_bytes, total, rows)),
    )  # fmt: skip
    return past


@pytest.mark.parametrize("max_seq", [64, 7])
def test_windows_give_the_tokens_of_a_growing_cache(
    arithmetic: ctypes.CDLL, tmp_path: Path, max_seq: int
) -> None:
    """Padded windows of the cache, a batch of other lengths and chunks change no token."""
    model = CausalLM(planted.save(planted.WITH_DELIMITER, tmp_path))
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, model.vocab_size, size).tolist() for size in (19, 4, 30)]
    expected = [list(generate(model, prompt, max_new_tokens=TOKENS)) for prompt in prompts]
    assert Session(arithmetic, model, max_seq).generate(prompts, TOKENS) == expected


@pytest.mark.parametrize(
    ("used", "most", "window"),
    [(1, 1024, 128), (128, 1024, 128), (129, 1024, 256), (300, 301, 301), (9, 5, 5)],
)
def test_windows_are_rounded_up(arithmetic: ctypes.CDLL, used: int, most: int, window: int) -> None:
    assert arithmetic.iq_window(ctypes.c_int64(used), ctypes.c_int64(most)) == window
