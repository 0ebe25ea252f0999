"""What the files beside a model say of its tokenizer, read once and checked.

`tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` (older folders),
`generation_config.json`, `config.json` and `chat_template.jinja`. A value of a kind that has no
meaning is a ModelError that names file and key: a lost end token would let a model talk for ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from iq_export.errors import ModelError
from iq_export.files import read_belonging

_USUAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_PROBE = "The 1 é\n"
# The largest tokenizer.json known has 35 MB.
_LARGEST = 1 << 28


def load_core(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of `folder`/tokenizer.json; ModelError if it does not work."""
    from tokenizers import Tokenizer as Core

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"There is no tokenizer.json in {folder}.")
    with _no_panic_on_stderr(), one_sentence(f"{path} is damaged"):
        core = Core.from_str(_text(path))
        # Left over from training: texts are cut into windows here, and batches padded by
        # `left_pad`.
        core.no_truncation()
        core.no_padding()
        # What is wrong with an added token or a template shows when it is used.
        core.encode("")
        with contextlib.suppress(Exception):  # a vocabulary may lack these characters
            core.encode(_PROBE)
    return core


def edits_joined_text(core: Any) -> bool:
    """Whether the decoder changes the text after joining it, so that a token can change what came
    before it. Cutting spaces at the ends is no such thing."""
    if core.decoder is None:
        return False
    spec = json.loads(core.decoder.__getstate__())
    kinds = [part.get("type") for part in spec.get("decoders", ())]
    return "Fuse" in kinds and bool(set(kinds[kinds.index("Fuse") :]) - {"Fuse", "Strip"})


@contextlib.contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """ModelError for what the Rust library raises: a bare Exception for everything that it cannot
    do, or a panic, which is not even that."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{what}: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _no_panic_on_stderr() -> Iterator[None]:
    """A panic writes its stack to file 2 before Python hears of it."""
    try:
        kept = os.dup(2)
    except OSError:  # closed: nothing can be written there
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an absent file counts as an empty one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged: it holds no JSON object, but {_shown(value)}")
    return value


def special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the special tokens by the names that chat templates use: `bos_token`, ...

    config: `tokenizer_config.json`. Besides the usual names any other that ends in `_token` may be
    one, as transformers has it, and the groups of named ones hold more.
    """
    given = dict(read_object(folder / "special_tokens_map.json"))
    for group in ("model_specific_special_tokens", "extra_special_tokens"):
        value = config.get(group)
        given.update(value if isinstance(value, dict) else {})
    given.update({key: value for key, value in config.items() if value is not None})
    found: dict[str, str] = {}
    for key, value in given.items():
        # A special token is written as a string or as an object with its `content`.
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and key.endswith("_token") and not _HALF_CHARACTER.search(text):
            found[key] = text
        elif key in _USUAL and value is not None:
            path = folder / "tokenizer_config.json"
            raise ModelError(f"{path}: {key} is {_shown(value)}, which is no token")
    return found


def token_ids(config: Mapping[str, Any], key: str, path: Path) -> list[int]:
    """The ids at `key`: a number, a list of numbers, or none (null, or -1 as some write it)."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise ModelError(
                f"{path}: {key} is {_shown(value)}; token ids are whole numbers, or a list of them"
            )
    return [token for token in ids if token >= 0]


def chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja`, or the (default) template of `tokenizer_config.json`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _text(path)
    template = config.get("chat_template")
    where = f"{folder / 'tokenizer_config.json'}: chat_template"
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in named if e.get("name") == "default"), None)
    elif isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{where} is {_shown(template)}, which is no template")
    return template


def _text(path: Path) -> str:
    try:
        return read_belonging(path.parent, path.name, _LARGEST, ModelError).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is damaged: byte {error.start} is not UTF-8") from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
