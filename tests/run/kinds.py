"""One tokenizer of every kind of decoder that language models ship, without files of others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<unk>", "<s>", "</s>")
_BYTES = [f"<0x{value:02X}>" for value in range(256)]
_WORDS = ["▁", "▁the", "▁a", "ing", "e", "▁▁", "é", "中", ".", "\N{REPLACEMENT CHARACTER}", " "]


def _fallback(*parts: Any) -> Tokenizer:
    core = _bpe([*_BYTES, *_WORDS], byte_fallback=True)
    core.decoder = decoders.Sequence(list(parts))
    return core


def _bpe(words: list[str], **options: Any) -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    return Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", **options))


def _llama() -> Tokenizer:
    """Llama-2 and Mistral: the first space is taken off the joined text."""
    space = decoders.Replace("▁", " ")
    return _fallback(space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0))


def _gemma() -> Tokenizer:
    return _fallback(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())


def _byte_level() -> Tokenizer:
    core = _bpe([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", "Ã©", "ðŁ", "not in it: 中"])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def _metaspace() -> Tokenizer:
    core = _bpe(_WORDS)
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return core


def _word_piece() -> Tokenizer:
    words = ["the", "a", "##ing", "##e", ".", ",", "'", "do", "n't", "中", "##é", "##"]
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return core


def _edited() -> Tokenizer:
    """A decoder that edits the text after joining it: a token can change what stands before it."""
    return _fallback(decoders.Replace("▁", " "), decoders.Fuse(), decoders.Replace(" .", "."))


def _plain() -> Tokenizer:
    return _bpe(_WORDS)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "llama": _llama, "gemma": _gemma, "byte level": _byte_level, "metaspace": _metaspace,
    "word piece": _word_piece, "edited": _edited, "no decoder": _plain,
}  # fmt: skip


def write(kind: str, folder: Path) -> Path:
    """The assets folder of a tokenizer of this kind."""
    core = KINDS[kind]()
    core.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    core.add_tokens(["<tool>"])
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder
