"""The tokenizer that a GGUF file describes, as a `tokenizer.json` with its configuration.

The reference is llama.cpp (src/llama-vocab.cpp and src/unicode.cpp of 2026): which kinds there
are, how each cuts text, which tokens are found in text before it is cut, and which end a text.
What is not in the tables below is refused by name.
"""

# ruff: noqa: RUF001 - letters of many scripts
from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from iq_export.errors import ModelError
from iq_export.model.gguf_file import GgufHeader

# `tokenizer.ggml.token_type`
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
# A word in capitals, then in small letters; letters of other scripts count as both.
_UPPER, _LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|%s"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_TEKKEN = _CASED % ("", "", r"\p{N}")
_GPT4O = _CASED % (f"{_CONTRACTION}?", f"{_CONTRACTION}?", r"\p{N}{1,3}")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True)
class PreTokenizer:
    """How one kind of byte-level BPE cuts text into words: by each pattern in turn.

    `ignore_merges`: a word that is a token stays whole; `add_bos`: unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


def _rows() -> dict[str, PreTokenizer]:
    """`tokenizer.ggml.pre` -> how it cuts; names that cut alike stand in one row."""
    table: tuple[tuple[str, PreTokenizer], ...] = (
        (
            "gpt-2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion granite-docling exaone4",
            PreTokenizer((_GPT2,)),
        ),
        (
            "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
            PreTokenizer((r"\p{N}", _GPT2)),
        ),
        (
            "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
            PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
        ),
        ("dbrx smaug-bpe chatglm-bpe", PreTokenizer((_LLAMA3,))),
        ("glm4 glm5", PreTokenizer((_LLAMA3,), ignore_merges=True)),
        (
            "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
            PreTokenizer((_QWEN2,)),
        ),
        ("qwen35", PreTokenizer((_QWEN35,))),
        ("tekken", PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True)),
        ("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer((_GPT4O,))),
        ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", PreTokenizer(_DEEPSEEK3)),
        (
            "deepseek-coder",
            PreTokenizer((
                r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[[一-龥ࠀ-一가-퟿]&&\S]+", r"\p{N}",
            )),
        ),
        ("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
        ("bloom gpt3-finnish poro-chat", PreTokenizer((_BLOOM,))),
        ("viking", PreTokenizer((_BLOOM, r"\p{N}"))),
        (
            "bailingmoe bailingmoe2 llada-moe",
            PreTokenizer((
                r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
            )),
        ),
        (
            "seed-coder",
            PreTokenizer((
                rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
                rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",
            )),
        ),
        ("ufakzeka", PreTokenizer((_QWEN2.removeprefix(f"{_CONTRACTION}|"),))),
        (
            "minicpm5",
            PreTokenizer(
                (r"\p{N}{1,3}", _QWEN2.replace(r"|\p{N}|", r"|\p{N}+|")), ignore_merges=True
            ),
        ),
        ("default", PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    )  # fmt: skip
    return {name: row for names, row in table for name in names.split()}


PRE_TOKENIZERS = _rows()

# Tokens that end a text by what they are called; a file may call them ordinary words.
_END_OF_TEXT = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[",
))  # fmt: skip
# Fill-in-the-middle: padding and the borders of files end a text as well.
_FIM_END = frozenset((
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>",
    "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
))  # fmt: skip
_FIM = frozenset((
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
    "<|code_prefix|>", "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>",
    "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>", "<|fim_middle|>",
    "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
    "<|middle|>",
))  # fmt: skip
_SHOWN = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))

_SPACE = "▁"
_SCORES = "tokenizer.ggml.scores"


@dataclass(frozen=True)
class GgufTokenizer:
    """A `tokenizers.Tokenizer` and the `tokenizer_config.json` beside it.

    `reference` gives the ids of a plain text (no special tokens in it) by another way, if there
    is one.
    """

    core: Any
    config: dict[str, Any]
    reference: Callable[[str], list[int]] | None = None


def check_tokenizer(header: GgufHeader) -> None:
    """Raise ModelError for a kind of tokenizer that is not known, without building it."""
    kind = header.keys.get("tokenizer.ggml.model")
    if kind == "gpt2":
        _pre_tokenizer(header)
    elif kind != "llama":
        raise ModelError(
            f"{header.path.name} has a tokenizer of kind '{kind}', which is not supported (gpt2 "
            "and llama are); give a folder that has its tokenizer.json with --tokenizer DIR."
        )


def build_tokenizer(header: GgufHeader) -> GgufTokenizer:
    """Build the tokenizer. Raises ModelError for a kind that is not known, or a damaged one."""
    check_tokenizer(header)
    vocabulary = _Vocabulary(header)
    reference = None
    if vocabulary.is_byte_level:
        row = _pre_tokenizer(header)
        core, add_bos = _byte_level(vocabulary, row), row.add_bos
    else:
        core, add_bos, reference = _sentencepiece(vocabulary), True, vocabulary.merged_by_score
    _add_special(core, vocabulary)
    _add_borders(core, vocabulary, add_bos)
    return GgufTokenizer(core, _config(vocabulary), reference)


def end_ids(header: GgufHeader) -> tuple[int, ...]:
    """Tokens that end a text, the EOS first; empty if the file holds no tokens."""
    return _Vocabulary(header).end_ids() if header.keys.get("tokenizer.ggml.tokens") else ()


def special_ids(header: GgufHeader) -> dict[str, int | None]:
    """Ids of BOS, EOS, padding and unknown token; None for one that the file does not have."""
    if not header.keys.get("tokenizer.ggml.tokens"):
        return {}
    vocabulary = _Vocabulary(header)
    return {
        "bos": vocabulary.bos,
        "eos": vocabulary.eos,
        "pad": vocabulary.special("padding"),
        "unk": vocabulary.special("unknown"),
    }


class _Vocabulary:
    """Token texts, kinds and special ids of a file, with llama.cpp's defaults."""

    def __init__(self, header: GgufHeader) -> None:
        self.header, self.keys = header, header.keys
        tokens = self.keys.get("tokenizer.ggml.tokens")
        if not tokens:
            raise ModelError(
                f"{header.path.name} holds no tokens (tokenizer.ggml.tokens); give a folder that "
                "has its tokenizer.json with --tokenizer DIR."
            )
        self.tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
        if any("\udc80" <= c <= "\udcff" for c in "".join(self.tokens)):
            raise self.damaged("a token is not UTF-8")
        self.ids = {text: i for i, text in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            twice = next(text for i, text in enumerate(self.tokens) if self.ids[text] != i)
            raise self.damaged(f"the token {twice!r} stands twice in its vocabulary")
        self.scores = self._list(_SCORES, 0.0)
        self.kinds = self._list("tokenizer.ggml.token_type", _NORMAL)
        self.is_byte_level = self.keys.get("tokenizer.ggml.model") == "gpt2"
        harmony = {"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"}
        # There `<|end|>` only ends a message.
        self._not_end = {"<|end|>"} if any(h <= self.ids.keys() for h in harmony) else set()
        if self.ids.keys() & {"<|tool_response>", "<|plamo:eos|>"}:
            self._not_end.add("</s>")
        for text in (_END_OF_TEXT | _FIM_END | _FIM) & self.ids.keys():
            self.kinds[self.ids[text]] = _CONTROL
        for text in (_SHOWN | (self._not_end & {"<|end|>"})) & self.ids.keys():
            self.kinds[self.ids[text]] = _USER_DEFINED
        for text in self._not_end & {"</s>"} & self.ids.keys():
            self.kinds[self.ids[text]] = _NORMAL

    def damaged(self, what: str) -> ModelError:
        return ModelError(
            f"The tokenizer in {self.header.path.name} is damaged: {what}; give a folder that has "
            "its tokenizer.json with --tokenizer DIR."
        )

    def special(self, name: str, default: int | None = None) -> int | None:
        """The id under `tokenizer.ggml.<name>_token_id`; one outside of the vocabulary counts
        as absent."""
        value = self.keys.get(f"tokenizer.ggml.{name}_token_id")
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            value = default
        return value if value is not None and value < len(self.tokens) else None

    @property
    def bos(self) -> int | None:
        return self.special("bos", None if self.is_byte_level else 1)

    @property
    def eos(self) -> int | None:
        return self.special("eos", None if self.is_byte_level else 2)

    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, the EOS first."""
        by_name = ((_END_OF_TEXT | _FIM_END) - self._not_end) & self.ids.keys()
        found = {self.ids[text] for text in by_name}
        found |= {i for i in (self.special("eot"), self.special("eom")) if i is not None}
        first = [] if self.eos is None else [self.eos]
        return (*first, *sorted(found - set(first)))

    def merged_by_score(self, text: str) -> list[int]:
        """Ids of a text without special tokens by SentencePiece's rule: of all neighbours that
        make a token the best scored are merged first, of equal ones the leftmost."""
        symbols = list((_SPACE if self.add_space_prefix else "") + text.replace(" ", _SPACE))
        if not text:
            return []
        before = list(range(-1, len(symbols) - 1))
        after = [*range(1, len(symbols)), -1]
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                whole = symbols[left] + symbols[right]
                if (token := self.ids.get(whole)) is not None:
                    heapq.heappush(queue, (-self.scores[token], left, right, whole))

        for i in range(len(symbols) - 1):
            offer(i, i + 1)
        while queue:
            _, left, right, whole = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != whole:
                continue
            symbols[left], symbols[right] = whole, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        ids: list[int] = []
        for symbol in filter(None, symbols):
            token = self.ids.get(symbol)
            ids += [token] if token is not None else self._bytes(symbol)
        return ids

    @property
    def add_space_prefix(self) -> bool:
        return bool(self.keys.get("tokenizer.ggml.add_space_prefix", not self.is_byte_level))

    def _bytes(self, text: str) -> list[int]:
        names = [f"<0x{byte:02X}>" for byte in text.encode("utf-8", errors="surrogateescape")]
        unknown = self.special("unknown", 0)
        if all(name in self.ids for name in names) or unknown is None:
            return [self.ids[name] for name in names if name in self.ids]
        return [unknown]

    def _list(self, key: str, default: float) -> list[Any]:
        values = self.keys.get(key)
        if values is None:
            return [default] * len(self.tokens)
        if len(values) < len(self.tokens):
            raise self.damaged(f"it has {len(self.tokens)} tokens, but {key} has {len(values)}")
        return list(values)


def _pre_tokenizer(header: GgufHeader) -> PreTokenizer:
    kind = header.keys.get("tokenizer.ggml.pre")
    if kind in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[kind]
    what = (
        "does not say how its tokenizer cuts text (tokenizer.ggml.pre)"
        if kind is None
        else f"cuts text the way '{kind}' (tokenizer.ggml.pre), which is not known here"
    )
    raise ModelError(
        f"{header.path.name} {what}: its token ids would be wrong; give a folder that has its "
        "tokenizer.json with --tokenizer DIR."
    )


def _byte_level(vocabulary: _Vocabulary, row: PreTokenizer) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = _merges(vocabulary)
    core = Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=row.ignore_merges))
    core.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in row.patterns),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    core.decoder = decoders.ByteLevel()
    return core


def _merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    lines = vocabulary.keys.get("tokenizer.ggml.merges")
    if lines is None:
        raise vocabulary.damaged("it has no merges (tokenizer.ggml.merges)")
    merges: dict[tuple[str, str], None] = {}
    for line in lines:
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut < 0 or not {left, right, left + right} <= vocabulary.ids.keys():
            raise vocabulary.damaged(f"the merge {line!r} is none of two of its tokens")
        merges.setdefault((left, right))
    return list(merges)


def _sentencepiece(vocabulary: _Vocabulary) -> Any:
    """BPE whose merges are in the order of the scores of what they make.

    Spaces are written as U+2581, one is put in front of each piece of text if the file says so,
    and characters that are no token become their bytes.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    if _SCORES not in vocabulary.keys:
        raise vocabulary.damaged(f"it has no scores ({_SCORES})")
    ids, scores = vocabulary.ids, vocabulary.scores
    ranked = []
    for text, token in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[token], token, ids[left], ids[right], left, right))
    ranked.sort()
    unknown = vocabulary.special("unknown", 0)
    core = Tokenizer(
        models.BPE(
            ids, [(left, right) for *_, left, right in ranked], byte_fallback=True, fuse_unk=True,
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
        )
    )  # fmt: skip
    prefix = [normalizers.Prepend(_SPACE)] if vocabulary.add_space_prefix else []
    core.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.add_space_prefix else []
    core.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return core


def _add_special(core: Any, vocabulary: _Vocabulary) -> None:
    """Tokens that are found in a text before it is cut: control and unknown (left out when a text
    is shown), and user-defined ones."""
    from tokenizers import AddedToken

    name = str(vocabulary.keys.get("general.name", "")).lower()
    strips = "phi-3" in name or "phi3" in name
    special: list[AddedToken] = []
    shown: list[AddedToken] = []
    for text, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=False):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            rstrip = strips and text not in ("<unk>", "<s>", "<|endoftext|>")
            token = AddedToken(text, special=kind != _USER_DEFINED, normalized=False, rstrip=rstrip)
            (shown if kind == _USER_DEFINED else special).append(token)
    core.add_special_tokens(special)
    core.add_tokens(shown)


def _add_borders(core: Any, vocabulary: _Vocabulary, add_bos: bool) -> None:
    """The BOS in front and the EOS behind that the file asks for."""
    from tokenizers import processors

    keys = vocabulary.keys
    add_bos = keys.get("tokenizer.ggml.add_bos_token", add_bos)
    add_eos = keys.get("tokenizer.ggml.add_eos_token", False)
    asked = [("BOS", vocabulary.bos)] * bool(add_bos) + [("EOS", vocabulary.eos)] * bool(add_eos)
    for name, token in asked:
        if token is None:
            raise vocabulary.damaged(f"it puts an {name} around texts but has none")
    if not asked:
        return
    texts = {name: vocabulary.tokens[token] for name, token in asked if token is not None}
    before = [texts["BOS"]] if "BOS" in texts else []
    after = [texts["EOS"]] if "EOS" in texts else []
    core.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{t}:1" for t in before), "$B:1",
              *(f"{t}:1" for t in after)],
        special_tokens=[(text, vocabulary.ids[text]) for text in set(texts.values())],
    )  # fmt: skip


def _config(vocabulary: _Vocabulary) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, token in special_ids(vocabulary.header).items():
        if token is not None:
            config[f"{name}_token"] = vocabulary.tokens[token]
    prefix = "tokenizer.chat_template"
    templates = {
        key.removeprefix(prefix).lstrip(".") or "default": text
        for key, text in vocabulary.keys.items()
        if key == prefix or key.startswith(f"{prefix}.")
    }
    if list(templates) == ["default"]:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": n, "template": t} for n, t in templates.items()]
    return config
