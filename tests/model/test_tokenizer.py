"""A bundle's token ids are those of the model's own tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as pre

from iq_export.errors import ModelError
from iq_export.model import tokenizer as module
from iq_export.model.load import ModelSource
from iq_export.model.tokenizer import HARD_TEXTS, write_tokenizer
from iq_export.run.generate import Tokenizer as Bundled

SPECIAL = ["<unk>", "<s>", "</s>"]
CORPUS = [
    "rows:  12  34\n    2023 a b 2024 the value 12345 don't",
    "hello world 你好 😀 é ß",
    *HARD_TEXTS,
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(*stages: Any, normalizer: Any = None, joined: bool = False) -> Tokenizer:
    """`joined`: trained without those stages, so that merges cross what they cut."""
    core = Tokenizer(models.BPE())
    core.decoder = decoders.ByteLevel()
    core.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=not joined)
    if normalizer is not None:
        core.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre.ByteLevel.alphabet(), special_tokens=SPECIAL,
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(CORPUS * 5, trainer)
    core.pre_tokenizer = pre.Sequence(list(stages))
    return core


def split(pattern: str) -> list[Any]:
    return [pre.Split(Regex(pattern), "isolated"), pre.ByteLevel(False, use_regex=False)]


def metaspace(scheme: str, model: Any, trainer: Any) -> Tokenizer:
    core = Tokenizer(model)
    core.pre_tokenizer = pre.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    core.train_from_iterator(CORPUS * 5, trainer)
    return core


def byte_fallback() -> Tokenizer:
    """Llama-2-like: no words, a space in front by a normalizer, unknown characters as bytes."""
    trained = metaspace("never", models.BPE(), trainers.BpeTrainer(vocab_size=300))
    vocab = {t: i for i, t in enumerate([*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))])}
    state = json.loads(trained.to_str())["model"]
    for token in state["vocab"]:
        vocab.setdefault(token, len(vocab))
    merges = [tuple(m) for m in state["merges"]]
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return core


def with_borders() -> Tokenizer:
    core = byte_level(*split(LLAMA3))
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return core


def with_added() -> Tokenizer:
    core = byte_level(pre.ByteLevel(False))
    core.add_special_tokens([AddedToken("<|x|>", rstrip=True), AddedToken("[INST]", lstrip=True)])
    core.add_tokens([AddedToken("  "), AddedToken("value", single_word=True, normalized=True)])
    return core


def left_from_training() -> Tokenizer:
    core = byte_level(pre.Digits(individual_digits=True), pre.ByteLevel(False))
    core.enable_truncation(4)
    core.enable_padding(length=16)
    return core


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "GPT-2": lambda: byte_level(pre.ByteLevel(False)),
    "digits": lambda: byte_level(pre.Digits(individual_digits=True), pre.ByteLevel(False)),
    "numbers split off": lambda: byte_level(*split(r"\p{N}"), joined=True),
    "Llama 3": lambda: byte_level(*split(LLAMA3), joined=True),
    "Qwen 2": lambda: byte_level(*split(LLAMA3.replace("{1,3}", "")), normalizer=normalizers.NFC()),
    "prefix space": lambda: byte_level(pre.ByteLevel(add_prefix_space=True)),
    "byte fallback": byte_fallback,
    "metaspace first": lambda: metaspace(
        "first", models.BPE(unk_token="<unk>"),
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)),
    "unigram": lambda: metaspace(
        "always", models.Unigram(),
        trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>",
                                show_progress=False)),
    "borders": with_borders,
    "added tokens": with_added,
    "left from training": left_from_training,
}  # fmt: skip


def folder_of(core: Tokenizer, folder: Path, **config: Any) -> ModelSource:
    folder.mkdir()
    core.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ModelSource("folder", folder.name, folder)


@pytest.mark.parametrize("named", ("GPT2Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer"))
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_folder(kind: str, named: str, tmp_path: Path) -> None:
    """Whatever class the folder names: transformers would rebuild the tokenizer after it."""
    core = KINDS[kind]()
    source = folder_of(core, tmp_path / "model", tokenizer_class=named)
    (tmp_path / "assets").mkdir()
    assert write_tokenizer(source, tmp_path / "assets") == []
    core = Tokenizer.from_file(str(source.path / "tokenizer.json"))
    core.no_truncation()
    core.no_padding()
    bundled = Bundled(tmp_path / "assets")
    for text in HARD_TEXTS:
        assert bundled.encode(text, add_bos=None) == core.encode(text).ids, text
        plain = core.encode(text, add_special_tokens=False).ids
        assert bundled.encode(text, add_bos=False) == plain
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "assets" / name).read_bytes() == (source.path / name).read_bytes()


def test_kin_is_copied_as_it_is(tmp_path: Path) -> None:
    source = folder_of(KINDS["GPT-2"](), tmp_path / "model")
    texts = {
        "special_tokens_map.json": '{"pad_token": "</s>"}', "added_tokens.json": '{"<s>": 1}',
        "chat_template.jinja": "{{ messages }}",
    }  # fmt: skip
    for name, text in texts.items():
        (source.path / name).write_text(text)
    (tmp_path / "assets").mkdir()
    write_tokenizer(source, tmp_path / "assets")
    for name, text in texts.items():
        assert (tmp_path / "assets" / name).read_text() == text


def test_special_tokens_that_only_the_map_names(tmp_path: Path) -> None:
    source = folder_of(KINDS["GPT-2"](), tmp_path / "model")
    (source.path / "tokenizer_config.json").write_text("{}")
    (source.path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    )
    (tmp_path / "assets").mkdir()
    write_tokenizer(source, tmp_path / "assets")
    assert (Bundled(tmp_path / "assets").bos_id, Bundled(tmp_path / "assets").eos_ids) == (1, {2})


def test_the_tokenizer_that_was_named_wins(tmp_path: Path) -> None:
    source = folder_of(KINDS["GPT-2"](), tmp_path / "model")
    other = folder_of(KINDS["digits"](), tmp_path / "other")
    (tmp_path / "assets").mkdir()
    write_tokenizer(
        ModelSource("folder", "model", source.path, tokenizer=other.path), tmp_path / "assets"
    )
    expected = (other.path / "tokenizer.json").read_bytes()
    assert (tmp_path / "assets" / "tokenizer.json").read_bytes() == expected


def test_ids_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_of(KINDS["digits"](), tmp_path / "model")
    (tmp_path / "assets").mkdir()
    other = tmp_path / "other.json"
    KINDS["GPT-2"]().save(str(other))
    real = module.copy_belonging

    def copy(folder: Path, name: str, *rest: Any) -> None:
        place = (tmp_path, other.name) if name == "tokenizer.json" else (folder, name)
        real(*place, *rest)

    monkeypatch.setattr(module, "copy_belonging", copy)
    with pytest.raises(ModelError, match=r"'a   1' is .* there and .* here"):
        write_tokenizer(source, tmp_path / "assets")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of BPE with bytes, as Llama 2's."""
    import pydoc_data.topics

    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    text = "\n".join(list(pydoc_data.topics.topics.values())[:12])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_prefix=str(folder / "tokenizer"),
        model_type="bpe", vocab_size=700, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


def test_an_older_folder_is_converted_and_said_so(pieces: Path, tmp_path: Path) -> None:
    import sentencepiece

    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "assets").mkdir()
    notes = write_tokenizer(ModelSource("folder", "old", folder), tmp_path / "assets")
    assert len(notes) == 1 and "no tokenizer.json" in notes[0] and "LlamaTokenizer" in notes[0]
    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    bundled = Bundled(tmp_path / "assets")
    for text in ("a   1", "Hello world", "don't 你好"):
        assert bundled.encode(text, add_bos=False) == model.encode(text)
