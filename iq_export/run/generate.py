"""Tokenizer of a model's assets folder, and token generation with the KV cache."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from iq_export.errors import DataError, GraphError, ModelError
from iq_export.run import assets
from iq_export.run.chat_template import render
from iq_export.run.ort import CausalLM

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x..>$")


class Tokenizer:
    """`tokenizer.json` of an assets folder with its special tokens and chat template.

    Needs neither torch nor transformers. Raises ModelError if the folder's files are missing,
    unreadable or say what has no meaning.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._core = assets.load_core(self.folder)
        added = self._core.get_added_tokens_decoder()
        self._unsaid = frozenset(token for token, text in added.items() if text.special)
        self._edits_joined_text = assets.edits_joined_text(self._core)
        config = assets.read_object(self.folder / "tokenizer_config.json")
        self._names = assets.special_tokens(self.folder, config)
        files = [self.folder / name for name in ("generation_config.json", "config.json")]
        self._configs = {path: assets.read_object(path) for path in files}
        self.bos_id = self._special("bos")
        eos = {self._special("eos"), *self._ids("eos")}
        self.eos_ids = frozenset(token for token in eos if token is not None)
        pad = self._special("pad")
        # A pad token's own value never matters: it is masked.
        self.pad_id: int = pad if pad is not None else next(iter(sorted(self.eos_ids)), 0)
        self.chat_template = assets.chat_template(self.folder, config)

    def encode(self, text: str, add_bos: bool | None) -> list[int]:
        """Token ids of `text`; special tokens written out in it are recognised.

        add_bos: put the BOS token in front, or (None) do what the tokenizer does by itself.
        Raises DataError if a BOS is asked for and the tokenizer has none or if `text` has half of
        a character, ModelError if the tokenizer has no token for a part of it.
        """
        try:
            with assets.one_sentence(f"The tokenizer in {self.folder} cannot encode the text"):
                ids = list(self._core.encode(text, add_special_tokens=add_bos is None).ids)
        except TypeError as error:  # all that is wrong with a str
            raise DataError("The text is not UTF-8.") from error
        if not add_bos:
            return ids
        if self.bos_id is None:
            raise DataError(f"The tokenizer in {self.folder} has no BOS token.")
        return [self.bos_id, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        return str(self._core.decode(list(ids), skip_special_tokens=True)) if ids else ""

    def token(self, token: int) -> str | None:
        """How the tokenizer writes one token, special or not; None for an id it does not have."""
        text = self._core.id_to_token(token)
        return None if text is None else str(text)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as tokens arrive; joined they are `decode` of all ids.

        A character that spans tokens comes out whole. What later tokens can change is held back:
        a replacement character at the end, which may be a character's beginning, and bytes written
        as tokens (`<0xC3>`), which are decoded together once their run has ended.
        """
        seen: list[int] = []
        shown = ""
        for token in ids:
            seen.append(token)
            text = self._settled(seen)
            if len(text) > len(shown) and text.startswith(shown):
                yield text[len(shown) :]
                shown = text
        rest = self.decode(seen)[len(shown) :]
        if rest:
            yield rest

    def _settled(self, ids: Sequence[int]) -> str:
        """The beginning of `decode(ids)` that stays, whatever tokens follow."""
        if self._edits_joined_text:
            return ""
        end = len(ids)
        while end and self._joins(ids[end - 1]):
            end -= 1
        return self.decode(ids[:end]).rstrip(_REPLACEMENT)

    def _joins(self, token: int) -> bool:
        """Whether the tokens on both sides of it may be bytes of one run."""
        text = self.token(token)
        return text is None or token in self._unsaid or _BYTE.match(text) is not None

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt text for `messages` ({"role", "content"}), up to the assistant's turn.

        Encode it with `add_bos=False`: templates write the BOS themselves. Raises ModelError if
        the model has no template or it fails.
        """
        if self.chat_template is None:
            raise ModelError(f"The model in {self.folder} has no chat template; use --raw.")
        return render(self.chat_template, messages, self._names, str(self.folder))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._core.get_vocab_size())

    @property
    def added_tokens(self) -> list[str]:
        """Texts that are found before anything is cut, special tokens among them."""
        return [token.content for token in self._core.get_added_tokens_decoder().values()]

    def _special(self, key: str) -> int | None:
        """The id of a special token: by its text, or by the id that another file has for it."""
        name = self._names.get(f"{key}_token")
        token = self._core.token_to_id(name) if name is not None else None
        return int(token) if token is not None else next(iter(self._ids(key)), None)

    def _ids(self, key: str) -> list[int]:
        name = f"{key}_token_id"
        return [i for path, c in self._configs.items() for i in assets.token_ids(c, name, path)]


def generate(
    model: CausalLM,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Continue one prompt, token by token, with the KV cache; an end token is not yielded.

    Temperature 0 takes the likeliest token. Raises DataError for an empty prompt or a token
    outside the embedding table, GraphError if logits are not finite or name such a token.
    """
    if not ids:
        raise DataError("The prompt is empty: there is no token to start from.")
    if max(ids) >= model.embedding_rows or min(ids) < 0:
        raise DataError(f"The prompt holds a token id outside 0..{model.embedding_rows - 1}.")
    random = np.random.default_rng(seed)
    tokens = np.asarray([ids], np.int64)
    past, seen = None, 0
    for _ in range(max_new_tokens):
        total = seen + tokens.shape[1]
        step = model.forward(
            tokens, np.ones((1, total), np.int64), np.arange(seen, total)[None], past
        )
        token = _choose(step.logits[0, -1], temperature, top_p, random)
        if token in eos_ids:
            return
        if token >= model.embedding_rows:
            raise GraphError(
                f"The model wrote token {token}, for which its embedding table has no row "
                f"({model.embedding_rows} rows): the logits beyond mean nothing."
            )
        yield token
        past, seen, tokens = step.present, total, np.asarray([[token]], np.int64)


def _choose(
    logits: NDArray[np.float32], temperature: float, top_p: float, random: np.random.Generator
) -> int:
    """One token id from logits `[vocab]`, by nucleus sampling or, at temperature 0, the maximum."""
    if not np.isfinite(logits).all():
        raise GraphError("The model's logits are not finite: it overflowed in half precision.")
    if temperature <= 0:
        return int(logits.argmax())
    below = logits.astype(np.float64) - logits.max()
    with np.errstate(over="ignore"):  # by a tiny temperature: all but the likeliest get weight 0
        weights = np.exp(below / temperature)
    weights /= weights.sum()
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    kept = order[before < top_p] if top_p < 1 else order
    kept = kept if len(kept) else order[:1]
    return int(random.choice(kept, p=weights[kept] / weights[kept].sum()))
