"""Token ids and logits of GGUF files against llama.cpp's own.

Needs llama-cpp-python, which is built from source (`pip install llama-cpp-python==0.3.36`); it
runs on a CPU. Skipped without it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from iq_export.model.gguf_file import read_header
from iq_export.model.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer, end_ids
from iq_export.model.tokenizer import HARD_TEXTS
from tests.model.gguf_files import write_gguf, write_vocabulary
from tests.model.test_gguf import CASES, IDS, make
from tests.model.test_tokenizer import pieces  # noqa: F401 - a fixture

pytestmark = pytest.mark.heavy
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

RANDOM_TEXTS = 400
POOLS = (
    "abcdefgh XYZ", "  \t\n\r", "0123456789", "'s't're've'm'll'd'S'LL",
    ".,!?;:-_()[]{}<>=+*/\\|~^`$%#@&\"",
    "éüßñçøÄÖ", "абвгдЖЯ", "αβγΩ", "你好世界中文字", "ひらがなカタカナー", "한국어가나다",
    "שלוםעולם", "مرحبا",
    "हिन्दीकि", "ไทยภาษา", "\u0301\u0308\u0323", "\u00a0\u2003\u3000\u200b\u200d\ufeff", "½²Ⅷ٣۴४㊿",
    "😀👍🏽👨\u200d👩🇺🇳☃️", "∑√→€£©®", "\x00\x07\x1b\x7f\x85",
)  # fmt: skip


def texts() -> Iterator[str]:
    yield from HARD_TEXTS
    choose = random.Random(5)
    for _ in range(RANDOM_TEXTS):
        pools = choose.sample(POOLS, choose.randint(1, 4))
        yield "".join(choose.choice(choose.choice(pools)) for _ in range(choose.randint(1, 40)))


def train_merges() -> tuple[list[str], list[str]]:
    """Byte-level tokens and merges that cross words, so that every cut shows in the ids."""
    import json
    import pydoc_data.topics

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", "<|x|>", "<|y|>"], max_token_length=24,
    )  # fmt: skip
    prose = "\n".join(list(pydoc_data.topics.topics.values())[:8]).split(". ")
    core.train_from_iterator([*prose, *list(texts()) * 3], trainer)
    state = json.loads(core.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    return tokens, [" ".join(merge) for merge in state["merges"]]


def compare(path: Path) -> int:
    """Number of texts compared; raises for the first whose ids differ."""
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    ours, count = build_tokenizer(read_header(path)).core, 0
    for text in texts():
        count += 1
        for add_special in (True, False):
            expected = theirs.tokenize(text.encode(), add_bos=add_special, special=True)
            found = ours.encode(text, add_special_tokens=add_special).ids
            assert found == expected, (repr(text), ours.encode(text).tokens)
    vocabulary = llama_cpp.llama_model_get_vocab(theirs.model)
    ids = range(theirs.n_vocab())
    ends = {i for i in ids if llama_cpp.llama_vocab_is_eog(vocabulary, i)}
    assert set(end_ids(read_header(path))) == ends
    return count


@pytest.fixture(scope="module")
def trained() -> tuple[list[str], list[str]]:
    return train_merges()


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_byte_level_kinds(pre: str, trained: tuple[list[str], list[str]], tmp_path: Path) -> None:
    tokens, merges = trained
    kinds = [3, 3, 3, 3, 4] + [1] * (len(tokens) - 5)
    keys = {
        "model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, "token_type": kinds,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    assert compare(write_vocabulary(tmp_path / "m.gguf", keys)) > RANDOM_TEXTS


@pytest.mark.parametrize("prefix", (True, False))
@pytest.mark.parametrize("add_eos", (True, False))
def test_sentencepiece(pieces: Path, prefix: bool, add_eos: bool, tmp_path: Path) -> None:  # noqa: F811
    from tests.model.test_gguf_tokenizer import sentencepiece_header

    one, _ = sentencepiece_header(pieces, add_space_prefix=prefix, add_eos_token=add_eos)
    prefix_name = "tokenizer.ggml."
    keys = {
        k.removeprefix(prefix_name): v for k, v in one.keys.items() if k.startswith(prefix_name)
    }
    assert compare(write_vocabulary(tmp_path / "m.gguf", keys)) > RANDOM_TEXTS


@pytest.mark.parametrize("name", ("smollm2-135m", "gemma3-270m"))
def test_embedded_models(name: str) -> None:
    from iq_export.model.fetch import embedded_model, is_cached

    if not is_cached(name):
        pytest.skip(f"{name} is not in the cache")
    assert compare(embedded_model(name)) > RANDOM_TEXTS


@pytest.mark.parametrize("case", CASES)
def test_networks(case: str, tmp_path: Path) -> None:
    """The references that loaded files are compared with compute what llama.cpp does."""
    import numpy as np
    import torch

    architecture, name, options, keys, tensors = CASES[case]
    if architecture == "phi3":
        options = options | {"sliding_window": None}  # llama.cpp leaves Phi-3's window away
    reference = make(name, **options)
    path = write_gguf(tmp_path / "m.gguf", architecture, reference, keys, tensors)
    with torch.no_grad():
        expected = reference(torch.tensor([IDS]), use_cache=False).logits[0].numpy()
    theirs = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    theirs.eval(IDS)
    found = np.asarray(theirs.scores[: len(IDS)])
    # Its cache is in half precision.
    assert np.abs(found - expected).max() < 5e-3 * np.ptp(expected)
