"""Tokenizer files of every odd kind: used as they are meant, or named in one sentence."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from iq_export.errors import DataError, IqError, ModelError
from iq_export.run.generate import Tokenizer


def set_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **values}))


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        (None, {257}), (258, {257, 258}), ([258, 3], {257, 258, 3}), ([], {257}),
        (-1, {257}), ([258, -1], {257, 258}), (999_999, {257, 999_999}),
    ],
)  # fmt: skip
def test_end_tokens(value: Any, ids: set[int], assets: Path) -> None:
    """Null and -1 are none; one beyond the vocabulary is never written, and does no harm."""
    set_json(assets / "generation_config.json", eos_token_id=value)
    assert Tokenizer(assets).eos_ids == ids


@pytest.mark.parametrize("value", [[[257, 258]], "257", 257.0, True, {"id": 257}, [257, None]])
@pytest.mark.parametrize("key", ["eos", "pad"])
def test_ids_that_are_none(key: str, value: Any, assets: Path) -> None:
    set_json(assets / "generation_config.json", **{f"{key}_token_id": value})
    with pytest.raises(ModelError, match=rf"generation_config\.json: {key}_token_id is"):
        Tokenizer(assets)


def test_special_tokens_are_texts_or_objects(assets: Path) -> None:
    """What templates see: any name that ends in `_token`, but no switch."""
    (assets / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": "<end>", "eos_token": "old"})
    )
    set_json(
        assets / "tokenizer_config.json", add_bos_token=True, unk_token=None, num_image_token=256,
        image_token={"__type": "AddedToken", "content": "<img>"},
        model_specific_special_tokens={"audio_token": "<audio>"},
        chat_template="{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ image_token }}"
        "{{ audio_token }}{{ unk_token is defined }}{{ num_image_token is defined }}",
    )  # fmt: skip
    tokenizer = Tokenizer(assets)
    assert tokenizer.pad_id == 258
    assert tokenizer.apply_chat_template([]) == "<s></s><end><img><audio>FalseFalse"


@pytest.mark.parametrize("value", [5, ["<s>"], {"text": "<s>"}, False])
def test_special_tokens_that_are_none(value: Any, assets: Path) -> None:
    set_json(assets / "tokenizer_config.json", bos_token=value)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: bos_token is"):
        Tokenizer(assets)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (5, "is no template"), ([{"name": "default", "template": 5}], "is no template"),
        ([5, {"name": "tool", "template": "x"}], None), ({"default": "yes"}, "yes"), ("", ""),
    ],
)  # fmt: skip
def test_chat_templates_of_every_type(value: Any, says: str | None, assets: Path) -> None:
    set_json(assets / "tokenizer_config.json", chat_template=value)
    if says is not None and "is no" in says:
        with pytest.raises(ModelError, match=says):
            Tokenizer(assets)
    elif says is None:
        with pytest.raises(ModelError, match="no chat template"):
            Tokenizer(assets).apply_chat_template([])
    else:
        assert Tokenizer(assets).apply_chat_template([]) == says


@pytest.mark.parametrize("content", [b"[1]", b"3", b"null", b"{", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json"])
def test_files_that_hold_no_object(name: str, content: bytes, assets: Path) -> None:
    (assets / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name} is damaged"):
        Tokenizer(assets)


def test_a_template_that_is_no_text(assets: Path) -> None:
    (assets / "chat_template.jinja").write_bytes(b"\xff\xfe{")
    with pytest.raises(ModelError, match=r"chat_template\.jinja is damaged: byte 0"):
        Tokenizer(assets)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("model.merges", [["x", "y"]]), ("model.merges", ["a b c"]), ("model.merges", [1]),
        ("model.vocab", {"a": -1}), ("model", None), ("version", 3), ("added_tokens", [{}]),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated",
                           "invert": False}),
        # The library panics at this one when it encodes.
        ("post_processor", {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                            "single": [{"SpecialToken": {"id": "<q>", "type_id": 0}}]}),
    ],
)  # fmt: skip
def test_a_corrupt_tokenizer(
    part: str, value: Any, assets: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((assets / "tokenizer.json").read_text())
    *outer, last = part.split(".")
    (content[outer[0]] if outer else content)[last] = value
    (assets / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"tokenizer\.json is damaged") as caught:
        Tokenizer(assets)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_text_that_the_vocabulary_does_not_have(assets: Path) -> None:
    content = json.loads((assets / "tokenizer.json").read_text())
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    (assets / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer(assets)
    assert tokenizer.encode("a", add_bos=False) == [0]
    with pytest.raises(ModelError, match="cannot encode the text: WordLevel error"):
        tokenizer.encode("b", add_bos=False)


def test_half_a_character(assets: Path) -> None:
    with pytest.raises(DataError, match="not UTF-8"):
        Tokenizer(assets).encode("a\udcff", add_bos=False)


def test_whatever_the_files_hold(assets: Path) -> None:
    """Values of all types at every key that is read, and bytes changed at random."""
    rng = random.Random(0)
    odd = [None, True, -1, 3, 2**70, 1.5, float("inf"), "", "<s>", "\ud800", [], [[]], [None], {},
           {"content": 3}, {"content": "<s>"}, ["<s>", 257], [{"name": []}]]  # fmt: skip
    keys = ["bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "eos_token_id",
            "bos_token_id", "pad_token_id", "extra_special_tokens"]  # fmt: skip
    names = ["tokenizer_config.json", "generation_config.json", "config.json",
             "special_tokens_map.json"]  # fmt: skip
    whole = (assets / "tokenizer.json").read_bytes()
    refused = 0
    for _ in range(200):
        for name in names:
            chosen = {key: rng.choice(odd) for key in rng.sample(keys, rng.randrange(3))}
            (assets / name).write_text(json.dumps(chosen))
        changed = bytearray(whole)
        for _ in range(rng.randrange(3)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        (assets / "tokenizer.json").write_bytes(changed)
        try:
            tokenizer = Tokenizer(assets)
            ids = tokenizer.encode("the <s> é", add_bos=None)
            "".join(tokenizer.stream(ids))
        except IqError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 50 < refused < 200
