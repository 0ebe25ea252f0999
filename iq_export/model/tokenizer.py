"""The tokenizer files of a bundle: the model's own `tokenizer.json`, never a rebuilt one.

transformers rebuilds a tokenizer from the class that `tokenizer_config.json` names, and its ids
can differ from those of `tokenizer.json`; so a folder's files are copied as they are. Only what has
no `tokenizer.json` is converted: a GGUF file from its own keys, an older folder by transformers.
Either way the ids of `HARD_TEXTS` are compared with the source's before anything else is done.
"""

# ruff: noqa: RUF001 - letters of many scripts
from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iq_export.errors import ModelError
from iq_export.files import copy_belonging
from iq_export.model.gguf_file import GgufHeader, read_header
from iq_export.model.quiet import quiet
from iq_export.run.assets import one_sentence
from iq_export.run.generate import Tokenizer

if TYPE_CHECKING:
    from iq_export.model.load import ModelSource

_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_PIECES = ("tokenizer.model", "spiece.model")
# Of tokens that are ordinary in both, this share may be spelled otherwise.
_OTHER_SPELLING = 0.01

HARD_TEXTS = (
    "a   1", "2023 a b 2024", "rows:  12  34\n    56\t78", "1234567890 3.14159 1,000,000 ½ ² ١٢٣",
    "", " ", "   ", "\n", "\n\n\n", "\t\t", " \n \r\n\t \n", " leading", "trailing ", "  both  ",
    "don't I'LL we've he'd it's 'S 'Re x''s O'Neil",
    "Hello, world! (really?) [yes] {no} <maybe> #1 $2 50% a&b c*d e+f g=h i^j k|l ~m `n` \\o /p",
    "camelCase PascalCase SCREAMING_SNAKE kebab-case iPhoneXR McDonald",
    "def f(x):\n    if x >= 10:\n\t\treturn x**2  # square\n\n\nprint(f(12))\r\n",
    "https://example.org/a/b?q=1&r=%20#top user.name+tag@mail.example.com",
    "你好，世界！这是一个测试。東京タワー、ひらがなカタカナ。안녕하세요 세계 ㄱㄴㄷ",
    "Привет, мир! Γειά σου Κόσμε ÄÖÜ äöü ß ẞ ſ İı ñ ç Ł ø",
    "שלום עולם مرحبا بالعالم فارسی ۱۲۳ हिन्दी देवनागरी ไทยแลนด์ বাংলা தமிழ்",
    "e\u0301 n\u0303 a\u0308\u0323 \u0301 Z\u0351\u036b\u0343 \u1e9b\u0323 Å Å Å",
    "😀 👍🏽 👨\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇺🇳 ☃️ ✈ ©®™ →←↔ ∑∫√≠ ½⅓ Ⅷ ㊗",
    "nbsp:\u00a0x\u00a0\u00a0y thin:\u2009z ideographic:\u3000w zwsp:\u200bv nel:\u0085u",
    "ls:\u2028t",
    "bom:\ufeffa soft\u00adhyphen rtl:\u202eabc\u202c nul:\x00b esc:\x1b[0m del:\x7f bell:\x07",
    "\ufffd\ufffd \ue000 \U0001f9ff \U00010348 \U0010ffff",
    "$$$ ### !!! ??? ... ---- ==== ____ ''''",
    "a\u2581b \u2581\u2581 <0x0A> Ġ Ċ",
    "<s> </s> <unk> <pad> <bos> <eos> [INST] <|endoftext|> <|im_start|>",
    "x" * 300, "ab" * 100 + "12" * 100, "a" + " " * 70 + "b",
    "Donaudampfschifffahrtsgesellschaft" * 4,
)  # fmt: skip


def write_tokenizer(source: ModelSource, assets: Path) -> list[str]:
    """Write `tokenizer.json` and its kin into `assets`; returns what there is to tell.

    From the folder of `--tokenizer`, from the model's own folder, or from a GGUF file. Raises
    ModelError if there is no tokenizer that can be had with the ids that the source gives.
    """
    assert source.path is not None
    if source.kind == "gguf":
        header = read_header(source.path)
        if source.tokenizer is None:
            return _from_gguf(header, assets)
        notes = _from_folder(source.tokenizer, source, assets)
        _check_spelling(header, Tokenizer(assets), source.tokenizer)
        return notes
    return _from_folder(source.tokenizer or source.path, source, assets)


def _from_folder(folder: Path, source: ModelSource, assets: Path) -> list[str]:
    if not (folder / "tokenizer.json").is_file():
        return _converted(folder, source, assets)
    for name in _FILES:
        if (folder / name).is_file():
            copy_belonging(folder, name, assets / name, ModelError)
    original = Tokenizer(folder)
    _compare(assets, lambda text: original.encode(text, add_bos=None), f"{folder}/tokenizer.json")
    return []


def _converted(folder: Path, source: ModelSource, assets: Path) -> list[str]:
    """Have transformers make a `tokenizer.json` of an older folder's files."""
    import transformers

    with quiet():
        made = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=source.trust_remote_code
        )
        made.save_pretrained(assets)
    if not (assets / "tokenizer.json").is_file():
        raise ModelError(
            f"The tokenizer of {source.name} has no fast version (tokenizer.json), which running "
            "without transformers needs; give a folder that has one with --tokenizer."
        )
    _compare(assets, lambda text: made(text)["input_ids"], f"transformers' {type(made).__name__}")
    found = [folder / name for name in _PIECES if (folder / name).is_file()]
    if found:
        _compare_with_pieces(assets, found[0])
    return [
        f"{folder.name} has no tokenizer.json: one was made by transformers ({type(made).__name__})"
    ]


def _compare_with_pieces(assets: Path, model: Path) -> None:
    """Against the SentencePiece model itself, which knows no special tokens in a text."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))

    def compare() -> None:
        bundled = Tokenizer(assets)
        texts = _plain(bundled)
        _raise_for_difference(
            ((text, bundled.encode(text, add_bos=False), pieces.encode(text)) for text in texts),
            str(model),
        )

    try:
        compare()
    except ModelError:
        if not _keep_leading_spaces(assets):
            raise
        compare()


def _keep_leading_spaces(assets: Path) -> bool:
    """Put the space in front of a text before it is cut, as SentencePiece does.

    transformers' cutter drops it where the text begins with a space. False if there is none.
    """
    state = json.loads((assets / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((assets / "tokenizer_config.json").read_text(encoding="utf-8"))
    cutter = state.get("pre_tokenizer") or {}
    if (
        cutter.get("type") != "Metaspace"
        or state.get("normalizer")
        or not config.get("legacy", True)
    ):
        return False
    prepend = {"type": "Prepend", "prepend": cutter["replacement"]}
    replace = {
        "type": "Replace", "pattern": {"String": " "}, "content": cutter["replacement"],
    }  # fmt: skip
    parts = [replace] if cutter.get("prepend_scheme") == "never" else [prepend, replace]
    state |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": parts}}
    text = json.dumps(state, ensure_ascii=False)
    (assets / "tokenizer.json").write_text(text, encoding="utf-8")
    return True


def _from_gguf(header: GgufHeader, assets: Path) -> list[str]:
    from iq_export.model.gguf_tokenizer import build_tokenizer

    with one_sentence(f"The tokenizer in {header.path.name} is damaged"):
        made = build_tokenizer(header)
    made.core.save(str(assets / "tokenizer.json"))
    config = dict(made.config)
    template = config.get("chat_template")
    if isinstance(template, str):
        (assets / "chat_template.jinja").write_text(config.pop("chat_template"), encoding="utf-8")
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (assets / "tokenizer_config.json").write_text(text, encoding="utf-8")
    bundled = Tokenizer(assets)
    _compare(assets, lambda text: made.core.encode(text).ids, header.path.name)
    if made.reference is not None:
        reference = made.reference
        _raise_for_difference(
            ((t, bundled.encode(t, add_bos=False), reference(t)) for t in _plain(bundled)),
            header.path.name,
        )
    return []


def _plain(tokenizer: Tokenizer) -> list[str]:
    """The hard texts in which no added token stands."""
    added = tokenizer.added_tokens
    return [text for text in HARD_TEXTS if not any(token in text for token in added)]


def _compare(assets: Path, source_ids: Callable[[str], list[int]], name: str) -> None:
    bundled = Tokenizer(assets)
    _raise_for_difference(
        ((text, bundled.encode(text, add_bos=None), source_ids(text)) for text in HARD_TEXTS), name
    )


def _raise_for_difference(cases: Iterable[tuple[str, list[int], list[int]]], name: str) -> None:
    for text, found, expected in cases:
        if list(found) != list(expected):
            raise ModelError(
                f"The tokenizer would give other ids than {name}: {text[:40]!r} is "
                f"{_short(expected)} there and {_short(found)} here; give a folder that has its "
                "tokenizer.json with --tokenizer DIR."
            )


def _short(ids: list[int]) -> str:
    return f"{ids[:12]}" if len(ids) <= 12 else f"{ids[:12]}..."


def _check_spelling(header: GgufHeader, tokenizer: Tokenizer, folder: Path) -> None:
    """A folder that is given for a GGUF file must be of the same vocabulary."""
    tokens: list[Any] = header.keys.get("tokenizer.ggml.tokens") or []
    other = [
        i for i, text in enumerate(tokens)
        if (found := tokenizer.token(i)) is not None and found != text
    ]  # fmt: skip
    if len(other) > _OTHER_SPELLING * len(tokens) or tokenizer.vocab_size > len(tokens):
        raise ModelError(
            f"The tokenizer in {folder} is not that of {header.path.name}: "
            + (
                f"token {other[0]} is {tokenizer.token(other[0])!r}, not {tokens[other[0]]!r}."
                if other
                else f"it has {tokenizer.vocab_size} tokens, not {len(tokens)}."
            )
        )
