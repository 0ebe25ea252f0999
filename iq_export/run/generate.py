"""Tokenizer of a model's assets folder, and token generation with the KV cache."""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iq_export.errors import DataError, GraphError, ModelError
from iq_export.run.ort import CausalLM


class Tokenizer:
    """`tokenizer.json` of an assets folder with its special tokens and chat template.

    Needs neither torch nor transformers. Raises ModelError if the folder's files are missing or
    unreadable.
    """

    def __init__(self, assets: str | Path) -> None:
        self.folder = Path(assets)
        self._core = _load_core(self.folder)
        config = _read_json(self.folder / "tokenizer_config.json")
        # Older folders name them only there.
        named = _read_json(self.folder / "special_tokens_map.json") | config
        generation = _read_json(self.folder / "generation_config.json")
        model = _read_json(self.folder / "config.json")
        self._names = {
            key: _token_text(named.get(f"{key}_token")) for key in ("bos", "eos", "pad", "unk")
        }
        self.bos_id = self._special("bos", generation, model)
        self.eos_ids = self._eos_ids(generation, model)
        pad = self._special("pad", generation, model)
        # A pad token's own value never matters: it is masked.
        self.pad_id: int = pad if pad is not None else next(iter(sorted(self.eos_ids)), 0)
        self.chat_template = _chat_template(self.folder, config)

    def encode(self, text: str, add_bos: bool | None) -> list[int]:
        """Token ids of `text`; special tokens written out in it are recognised.

        add_bos: put the BOS token in front, or (None) do what the tokenizer does by itself.
        Raises DataError if a BOS is asked for and the tokenizer has none.
        """
        if add_bos is None:
            return list(self._core.encode(text).ids)
        ids = list(self._core.encode(text, add_special_tokens=False).ids)
        if not add_bos:
            return ids
        if self.bos_id is None:
            raise DataError(f"The tokenizer in {self.folder} has no BOS token.")
        return [self.bos_id, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        return str(self._core.decode(list(ids), skip_special_tokens=True))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as tokens arrive; a character that spans tokens comes out whole."""
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(skip_special_tokens=True)
        for token in ids:
            piece = decoder.step(self._core, token)
            if piece:
                yield piece

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt text for `messages` ({"role", "content"}), up to the assistant's turn.

        Encode it with `add_bos=False`: templates write the BOS themselves. Raises ModelError if
        the model has no template or it fails.
        """
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.chat_template is None:
            raise ModelError(f"The model in {self.folder} has no chat template; use --raw.")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        tokens = {f"{key}_token": text for key, text in self._names.items() if text is not None}
        try:
            template = environment.from_string(self.chat_template)
            return template.render(messages=list(messages), add_generation_prompt=True, **tokens)
        except jinja2.TemplateError as error:
            raise ModelError(f"The chat template of {self.folder} fails: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._core.get_vocab_size())

    @property
    def added_tokens(self) -> list[str]:
        """Texts that are found before anything is cut, special tokens among them."""
        return [token.content for token in self._core.get_added_tokens_decoder().values()]

    def token(self, index: int) -> str | None:
        """How the vocabulary spells a token id; None outside of it."""
        text = self._core.id_to_token(index)
        return None if text is None else str(text)

    def _special(self, key: str, *configs: dict[str, Any]) -> int | None:
        name = self._names[key]
        token = self._core.token_to_id(name) if name is not None else None
        for config in configs:
            if token is None and isinstance(config.get(f"{key}_token_id"), int):
                token = config[f"{key}_token_id"]
        return int(token) if token is not None else None

    def _eos_ids(self, *configs: dict[str, Any]) -> frozenset[int]:
        found = {self._special("eos")}
        for config in configs:
            value = config.get("eos_token_id")
            found.update(value if isinstance(value, list) else [value])
        return frozenset(int(token) for token in found if token is not None)


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
    outside the vocabulary, GraphError if logits are not finite.
    """
    if not ids:
        raise DataError("The prompt is empty: there is no token to start from.")
    if max(ids) >= model.vocab_size or min(ids) < 0:
        raise DataError(f"The prompt holds a token id outside 0..{model.vocab_size - 1}.")
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
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    kept = order[before < top_p] if top_p < 1 else order
    kept = kept if len(kept) else order[:1]
    return int(random.choice(kept, p=weights[kept] / weights[kept].sum()))


def _load_core(folder: Path) -> Any:
    from tokenizers import Tokenizer as Core

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"There is no tokenizer.json in {folder}.")
    try:
        core = Core.from_str(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    except Exception as error:
        # The Rust library raises bare Exception for everything it cannot parse.
        if type(error) is not Exception:
            raise
        raise ModelError(f"{path} is damaged: {error}") from error
    # Left over from training: texts are cut into windows here, and batches padded by `left_pad`.
    core.no_truncation()
    core.no_padding()
    return core


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an absent file counts as an empty one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    return value if isinstance(value, dict) else {}


def _token_text(value: Any) -> str | None:
    """A special token is written as a string or as an object with its `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _to_json(value: Any, indent: int | None = None) -> str:
    # jinja2's own filter escapes HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
