"""Calibration text that cannot do its work is named, and why; running text is left alone."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from iq_export.observe.samples import Window, load_text
from iq_export.observe.text_check import SurpriseObserver, token_warnings
from iq_export.observe.walk import observe
from iq_export.progress import Progress
from iq_export.run.generate import generate
from iq_export.run.ort import CausalLM
from tests.planted import Planted


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
    assert "71% of the calibration text's tokens are single letters or parts of a char" in found


class Bytes:
    """A byte-level tokenizer trained on English: what it never saw falls apart into bytes."""

    def __init__(self, vocabulary: int) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        self.core = Tokenizer(models.BPE())
        self.core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        self.core.train_from_iterator([ENGLISH], trainer)

    def decode(self, ids: list[int]) -> str:
        return str(self.core.decode(ids))

    def windows(self, text: str) -> list[Window]:
        return [Window(list(self.core.encode(text).ids), False)]


class Characters(Bytes):
    """One token per character, as Chinese, Japanese and Korean have among their words."""

    def __init__(self, text: str) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        vocabulary = {char: i for i, char in enumerate(sorted({*text, "中文", "?"}))}
        self.core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        self.core.pre_tokenizer = pre_tokenizers.Split("", "isolated")


ENGLISH = load_text("builtin")[:200_000]
HELD_OUT = load_text("builtin-heldout")[:20_000]
RANDOM = random.Random(0)
CHINESE = "".join(chr(RANDOM.randrange(0x4E00, 0x9FA5)) for _ in range(4000))
JAPANESE = "".join(chr(RANDOM.randrange(0x3041, 0x30FF)) for _ in range(4000))
KOREAN = "".join(chr(RANDOM.randrange(0xAC00, 0xD7A3)) for _ in range(4000))
JSON = json.dumps([{"id": i, "name": word, "of": [i / 7, None, i % 2 == 0]}
                   for i, word in enumerate(HELD_OUT.split()[:600])])  # fmt: skip
CODE = Path(json.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def english() -> Bytes:
    return Bytes(2000)


def falls_apart(tokenizer: Bytes, text: str) -> bool:
    found = token_warnings(tokenizer.windows(text), tokenizer)
    return any("hardly knows its language" in warning for warning in found)


@pytest.mark.parametrize("text", [CHINESE, JAPANESE, KOREAN])
def test_a_language_written_in_wide_characters(text: str, english: Bytes) -> None:
    """A character is a word, or a third of one where the tokenizer has bytes for it only."""
    assert not falls_apart(Characters(text), text)
    assert falls_apart(english, text)


@pytest.mark.parametrize("text", [JSON, json.dumps(json.loads(JSON), indent=2), CODE, HELD_OUT])
def test_notation_is_no_foreign_language(text: str, english: Bytes) -> None:
    """Brackets, quotes and digits are tokens of one character in any tokenizer."""
    assert not falls_apart(english, text)


def test_another_alphabet(english: Bytes) -> None:
    assert falls_apart(english, "съешь же ещё этих мягких французских булок, да выпей чаю " * 50)


def test_a_tokenizer_that_spells_everything() -> None:
    assert not falls_apart(Bytes(256), HELD_OUT)


def surprise(path: Path, windows: Sequence[Window]) -> str | None:
    observer = SurpriseObserver(windows)
    observe(path, [observer], windows, progress=Progress(quiet=True))
    return observer.warning()


def test_noise_to_the_model(calm: Planted) -> None:
    """Random weights predict nothing; the same text is no surprise to weights that know it."""
    found = surprise(calm.path, calm.windows)
    assert found is not None
    assert "perplexity" in found and "token frequencies alone" in found


def test_text_that_the_model_predicts(calm: Planted) -> None:
    """What it writes itself is no noise to it."""
    model = CausalLM(calm.path)
    texts = [
        [start, *generate(model, [start], max_new_tokens=80, temperature=1.0, seed=start)]
        for start in range(4)
    ]
    assert surprise(calm.path, [Window(ids, False) for ids in texts]) is None
