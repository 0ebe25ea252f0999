"""What is streamed is what decoding everything at once gives, whatever the tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from iq_export.run.generate import Tokenizer
from tests.run.kinds import KINDS, write


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_join_to_the_decoded_text(kind: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(kind, tmp_path))
    rng = random.Random(kind)
    beyond = tokenizer.vocab_size + 2  # a model's logits may be wider than the tokenizer
    for _ in range(400):
        ids = [rng.randrange(beyond) for _ in range(rng.randrange(1, 30))]
        assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids), ids


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["<0xC3>", "<0xA9>", "<0x80>", "▁the"], "\ufffd\ufffd\ufffd the"),
        (["<0x0A>", "<0xC3>", "▁the"], "\ufffd\ufffd the"),
        (["<0xC3>", "▁the"], "\ufffd the"),
        (["e", "<0xC3>", "</s>", "<0xA9>", "e"], "eée"),
        (["e", "<0xF0>", "<0x9F>"], "e\ufffd\ufffd"),
        (["e", "<0xC3>", "<0xA9>"], "eé"),
    ],
)
def test_bytes_as_tokens(kind: str, tokens: list[str], text: str, tmp_path: Path) -> None:
    """A run of bytes that is no text is one replacement character per byte."""
    tokenizer = Tokenizer(write(kind, tmp_path))
    ids = [tokenizer._core.token_to_id(token) for token in tokens]
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids) == text


def test_an_unfinished_last_character_is_not_dropped(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write("byte level", tmp_path))
    ids = tokenizer.encode("a🎉", add_bos=False)[:-1]
    assert list(tokenizer.stream(ids)) == ["a", "\ufffd"]


@pytest.mark.parametrize("kind", ["llama", "gemma", "byte level", "metaspace", "word piece"])
def test_words_come_as_they_are_made(kind: str, tmp_path: Path) -> None:
    """Holding everything back until the end would satisfy all of the above."""
    tokenizer = Tokenizer(write(kind, tmp_path))
    ids = tokenizer.encode("a a a a", add_bos=False)
    pieces = []
    arrived = 0

    def arriving() -> object:
        nonlocal arrived
        for token in ids:
            arrived += 1
            yield token

    for piece in tokenizer.stream(arriving()):  # type: ignore[arg-type]
        pieces.append((arrived, piece))
    assert len(pieces) > 2 and pieces[0][0] <= len(ids) // 2
