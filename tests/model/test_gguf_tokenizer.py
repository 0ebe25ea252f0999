"""The tokenizer of a GGUF file: its kind is honoured as llama.cpp does, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iq_export.errors import ModelError
from iq_export.model.gguf_file import GgufHeader
from iq_export.model.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer, end_ids
from iq_export.model.load import ModelSource, resolve
from iq_export.model.tokenizer import HARD_TEXTS, write_tokenizer
from iq_export.run.generate import Tokenizer
from tests.model.gguf_files import byte_tokens, write_vocabulary
from tests.model.test_tokenizer import pieces  # noqa: F401 - a fixture

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def header(**changes: Any) -> GgufHeader:
    """A byte-level vocabulary; `changes` are keys below `tokenizer.ggml.`, None takes one away."""
    tokens = byte_tokens()
    keys = {
        "model": "gpt2", "pre": "smollm", "tokens": tokens, "merges": ["t h"],
        "token_type": [CONTROL] * 4 + [NORMAL] * (len(tokens) - 4),
        "bos_token_id": 1, "eos_token_id": 2,
    } | changes  # fmt: skip
    own = {f"tokenizer.ggml.{k}": v for k, v in keys.items() if v is not None}
    return GgufHeader(Path("m.gguf"), {"general.architecture": "llama"} | own, {})


def words(pre: str, text: str) -> list[str]:
    core = build_tokenizer(header(pre=pre)).core
    return [text[begin:end] for _, (begin, end) in core.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    (
        ("smollm", "a   1", ["a", "   ", "1"]),
        ("smollm", "in 2023", ["in", " ", "2", "0", "2", "3"]),
        ("gpt-2", "a   1", ["a", "  ", " 1"]),
        ("gpt-2", "don't 12", ["don", "'t", " 12"]),
        ("llama-bpe", "DON'T 12345\n\nx", ["DON", "'T", " ", "123", "45", "\n\n", "x"]),
        ("qwen2", "ab 123", ["ab", " ", "1", "2", "3"]),
        ("tekken", "camelCase 12", ["camel", "Case", " ", "1", "2"]),
        ("gpt-4o", "McDonald's 1234", ["Mc", "Donald's", " ", "123", "4"]),
        ("falcon", "x=12345", ["x", "=", "123", "45"]),
        ("deepseek-v3", "ab12345 你好x", ["ab", "123", "45", " ", "你好", "x"]),
        ("deepseek-coder", "ab 12\n", ["ab", " ", "1", "2", "\n"]),
        ("bloom", "one, two", ["one", ",", " two"]),
    ),
)  # fmt: skip
def test_text_is_cut_as_the_kind_cuts_it(pre: str, text: str, expected: list[str]) -> None:
    assert words(pre, text) == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    (
        ({"pre": "of-a-later-year"}, "'of-a-later-year'"),
        ({"pre": None}, r"tokenizer\.ggml\.pre"),
        ({"model": "rwkv"}, "'rwkv'"), ({"model": "t5"}, "'t5'"), ({"model": None}, "'None'"),
        ({"merges": None}, "no merges"), ({"merges": ["t zzz"]}, "'t zzz'"),
        ({"tokens": None}, "no tokens"), ({"tokens": ["a", "a"]}, "'a' stands twice"),
        ({"token_type": [1]}, "token_type has 1"),
        ({"add_bos_token": True, "bos_token_id": None}, "has none"),
        ({"model": "llama", "scores": None}, "no scores"),
    ),
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named) as error:
        build_tokenizer(header(**changes))
    assert "--tokenizer DIR" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_nothing_of_a_text_is_lost(pre: str) -> None:
    core = build_tokenizer(header(pre=pre, token_type=None)).core
    for text in HARD_TEXTS:
        ids = core.encode(text, add_special_tokens=False).ids
        assert core.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_are_found_in_text() -> None:
    tokens = byte_tokens()
    kinds = [CONTROL] * 4 + [NORMAL] * 256 + [NORMAL, CONTROL, USER_DEFINED, NORMAL]
    core = build_tokenizer(header(token_type=kinds)).core
    ids = core.encode("th<x1><x2><x3>").ids
    assert ids[:3] == [tokens.index(t) for t in ("th", "<x1>", "<x2>")] and len(ids) == 7
    assert core.decode(ids) == "th<x2><x3>"


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    (
        ({}, [], []), ({"add_bos_token": True}, [1], []), ({"add_eos_token": True}, [], [2]),
        ({"pre": "llama-bpe"}, [1], []), ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
    ),
)  # fmt: skip
def test_borders(changes: dict[str, Any], before: list[int], after: list[int]) -> None:
    core = build_tokenizer(header(**changes)).core
    body = core.encode("ab", add_special_tokens=False).ids
    assert core.encode("ab").ids == [*before, *body, *after]


def test_what_ends_a_text() -> None:
    tokens = byte_tokens()
    tokens[-3:] = ["<|im_end|>", "<|eom_id|>", "<|end|>"]
    assert end_ids(header(tokens=tokens)) == (2, len(tokens) - 3, len(tokens) - 2, len(tokens) - 1)
    # In these "<|end|>" only ends a message.
    tokens[-3:] = ["<|return|>", "<|call|>", "<|end|>"]
    assert end_ids(header(tokens=tokens)) == (2, len(tokens) - 3, len(tokens) - 2)
    assert end_ids(header(eot_token_id=7)) == (2, 7)


def test_chat_templates() -> None:
    one = header()
    one.keys["tokenizer.chat_template"] = "{{ 1 }}"
    assert build_tokenizer(one).config["chat_template"] == "{{ 1 }}"
    one.keys["tokenizer.chat_template.tool_use"] = "{{ 2 }}"
    assert build_tokenizer(one).config["chat_template"] == [
        {"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"},
    ]  # fmt: skip


def sentencepiece_header(model: Path, **changes: Any) -> tuple[GgufHeader, Any]:
    import sentencepiece

    source = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = range(source.vocab_size())
    kinds = [
        6 if source.is_byte(i) else 2 if source.is_unknown(i) else 3 if source.is_control(i) else 1
        for i in ids
    ]
    own = {
        "tokens": [source.id_to_piece(i) for i in ids], "model": "llama", "token_type": kinds,
        "scores": [source.get_score(i) for i in ids], "merges": None, "pre": "default",
    }  # fmt: skip
    return header(**(own | changes)), source


def test_sentencepiece_ids(pieces: Path) -> None:  # noqa: F811
    one, source = sentencepiece_header(pieces)
    built = build_tokenizer(one)
    assert built.reference is not None
    for text in HARD_TEXTS:
        if not any(special in text for special in ("<s>", "</s>", "<unk>")):
            expected = source.encode(text)
            assert built.reference(text) == expected, text
            assert built.core.encode(text).ids == [1, *expected], text
            if "▁" not in text:  # it is how a space is written
                assert built.core.decode(expected) == text


def test_no_space_in_front_where_the_file_says_so(pieces: Path) -> None:  # noqa: F811
    core = build_tokenizer(sentencepiece_header(pieces, add_space_prefix=False)[0]).core
    assert core.encode("the").tokens[1] != "▁the"
    assert core.encode(" the").tokens[1] == "▁the"


def test_smollm2(tmp_path: Path) -> None:
    """Ids of llama.cpp (llama-cpp-python 0.3.36) for the embedded model."""
    from iq_export.model.fetch import embedded_model, is_cached

    if not is_cached("smollm2-135m"):
        pytest.skip("smollm2-135m is not in the cache")
    source = ModelSource("gguf", "smollm2-135m", embedded_model("smollm2-135m"))
    assert write_tokenizer(source, tmp_path) == []
    tokenizer = Tokenizer(tmp_path)
    for text, ids in SMOLLM2.items():
        assert tokenizer.encode(text, add_bos=None) == ids, text
    assert (tokenizer.bos_id, tokenizer.pad_id) == (1, 2)


SMOLLM2 = {
    "a   1": [81, 333, 33],
    "2023 a b": [34, 32, 34, 35, 253, 278],
    "rows:  12  34\n    56": [5612, 42, 256, 33, 34, 256, 35, 36, 2367, 37, 38],
    "don't  WE'LL": [12420, 982, 216, 26587, 23, 16421],
    "x=3.14;\t\ty": [104, 45, 35, 30, 33, 36, 43, 197, 197, 105],
    "你好 😀": [18645, 250, 48392, 138, 40303, 218],
    "<|im_start|>user\nHi 1<|im_end|>\n": [1, 4093, 198, 26843, 216, 33, 2, 198],
    " lead": [1022],
    "trail ": [4861, 301, 216],
}


def test_a_folder_serves_a_kind_that_is_refused(tmp_path: Path) -> None:
    """`--tokenizer DIR` with a GGUF file: of the same vocabulary, or refused."""
    tokens = byte_tokens()
    keys = {"model": "gpt2", "pre": "of-a-later-year", "tokens": tokens, "merges": ["t h"]}
    path = write_vocabulary(tmp_path / "m.gguf", keys)
    with pytest.raises(ModelError, match="--tokenizer DIR"):
        resolve(str(path))
    folder, assets = tmp_path / "folder", tmp_path / "assets"
    folder.mkdir()
    assets.mkdir()
    build_tokenizer(header()).core.save(str(folder / "tokenizer.json"))
    write_tokenizer(resolve(str(path), tokenizer=folder), assets)
    same = (folder / "tokenizer.json").read_bytes()
    assert (assets / "tokenizer.json").read_bytes() == same
    tokens[10:20] = tokens[11:21]
    tokens[20] = "<x4>"
    build_tokenizer(header(tokens=tokens)).core.save(str(folder / "tokenizer.json"))
    (assets / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"is not that of m\.gguf: token 10 is"):
        write_tokenizer(resolve(str(path), tokenizer=folder), assets)
