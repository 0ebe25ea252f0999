"""Tokenizer of an assets folder, sampling, and generation with the cache."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from iq_export.errors import DataError, GraphError, ModelError
from iq_export.run.generate import Tokenizer, generate
from iq_export.run.ort import CausalLM, Step

Maker = Callable[..., Path]


class FixedModel:
    """Gives the same logits at every step."""

    vocab_size = embedding_rows = 4

    def __init__(self, logits: list[float]) -> None:
        self.logits = np.asarray(logits, np.float32)

    def forward(self, input_ids: np.ndarray, *rest: object) -> Step:
        return Step(np.tile(self.logits, (*input_ids.shape, 1)), [])


def test_special_tokens_come_from_the_files(assets: Path) -> None:
    tokenizer = Tokenizer(assets)
    assert tokenizer.bos_id == 256
    assert tokenizer.eos_ids == {257, 258}
    assert tokenizer.pad_id == 257  # no pad token: any end token will do
    assert tokenizer.vocab_size == 259


def test_encode_with_and_without_bos(assets: Path) -> None:
    tokenizer = Tokenizer(assets)
    plain = tokenizer.encode("ab", add_bos=False)
    assert tokenizer.encode("ab", add_bos=True) == [256, *plain]
    assert tokenizer.encode("ab", add_bos=None) == plain
    assert tokenizer.encode("<s>ab", add_bos=False) == [256, *plain]
    assert tokenizer.decode([256, *plain, 257]) == "ab"


def test_nothing_is_cut_or_padded(assets: Path) -> None:
    """Whatever the file says: such settings are left over from training."""
    path = assets / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<s>",
    }  # fmt: skip
    path.write_text(json.dumps(content))
    assert len(Tokenizer(assets).encode("abcd", add_bos=False)) == 4


def test_no_bos_to_add(assets: Path) -> None:
    (assets / "tokenizer_config.json").write_text("{}")
    tokenizer = Tokenizer(assets)
    assert tokenizer.bos_id is None
    with pytest.raises(DataError, match="no BOS"):
        tokenizer.encode("ab", add_bos=True)


def test_streamed_text_is_whole_characters(assets: Path) -> None:
    tokenizer = Tokenizer(assets)
    text = "né 🎉 ok"
    ids = tokenizer.encode(text, add_bos=False)
    pieces = list(tokenizer.stream(iter(ids)))
    assert "".join(pieces) == text
    assert "🎉" in pieces and len(pieces) < len(ids)


def test_chat_template(assets: Path) -> None:
    (assets / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
        "[{{ m.role }}] {{ m.content | tojson }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    text = Tokenizer(assets).apply_chat_template(
        [{"role": "skip", "content": ""}, {"role": "user", "content": "a < 'b'"}]
    )
    assert text == "<s>[user] \"a < 'b'\"\n[assistant]"


def test_a_template_in_the_configuration(assets: Path) -> None:
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    (assets / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer(assets).apply_chat_template([]) == "yes"


@pytest.mark.parametrize(
    ("template", "message"),
    (
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "fails"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not callable|safely"),
    ),
)
def test_templates_that_fail(template: str | None, message: str, assets: Path) -> None:
    """Including those that reach for what a template has no business with."""
    if template is not None:
        (assets / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=message):
        Tokenizer(assets).apply_chat_template([{"role": "user", "content": "x"}])


def test_damaged_tokenizer_files(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    whole = (assets / "tokenizer.json").read_text()
    (assets / "tokenizer.json").write_text(whole[:100])
    with pytest.raises(ModelError, match="damaged"):
        Tokenizer(assets)
    (assets / "tokenizer.json").write_text(whole)
    (assets / "config.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        Tokenizer(assets)


@pytest.mark.parametrize("half", (False, True))
def test_generation_counts(half: bool, counting: Maker) -> None:
    model = CausalLM(counting(half=half))
    assert list(generate(model, [3, 4], max_new_tokens=5)) == [5, 6, 7, 8, 9]
    assert list(generate(model, [3], max_new_tokens=99, eos_ids={7})) == [4, 5, 6]
    assert list(generate(model, [3], max_new_tokens=0)) == []


def test_prompts_that_cannot_start(counting: Maker) -> None:
    model = CausalLM(counting())
    with pytest.raises(DataError, match="empty"):
        next(generate(model, [], max_new_tokens=1))
    with pytest.raises(DataError, match=r"0\.\.11"):
        next(generate(model, [12], max_new_tokens=1))


def test_sampling_follows_the_seed() -> None:
    model = FixedModel([0.0, 1.0, 2.0, 1.5])

    def draw(seed: int) -> list[int]:
        return list(generate(model, [0], max_new_tokens=40, temperature=1.0, seed=seed))

    assert draw(1) == draw(1) != draw(2)
    assert set(draw(1)) == {0, 1, 2, 3}


def test_nucleus_sampling_keeps_the_likeliest() -> None:
    model = FixedModel(np.log([0.5, 0.3, 0.15, 0.05]).tolist())

    def drawn(top_p: float, temperature: float = 1.0) -> set[int]:
        tokens = generate(model, [0], max_new_tokens=300, temperature=temperature, top_p=top_p)
        return set(tokens)

    assert drawn(0.4) == {0}
    assert drawn(0.6) == {0, 1}
    assert drawn(1.0) == {0, 1, 2, 3}
    assert drawn(1.0, temperature=0.01) == {0}


def test_sampling_has_the_right_frequencies() -> None:
    weights = np.asarray([0.5, 0.3, 0.15, 0.05])
    model = FixedModel(np.log(weights).tolist())
    tokens = list(generate(model, [0], max_new_tokens=4000, temperature=1.0))
    found = np.bincount(tokens, minlength=4) / len(tokens)
    np.testing.assert_allclose(found, weights, atol=0.03)


def test_running_needs_the_light_install_only() -> None:
    """Neither torch nor transformers nor onnx: a device has none of them."""
    code = (
        "import sys, iq_export.cli.run, iq_export.run.generate, iq_export.run.ort\n"
        "print({'torch', 'transformers', 'onnx', 'onnx_ir'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(GraphError, match="not finite"):
        next(generate(FixedModel([0.0, np.nan, 0.0, 0.0]), [0], max_new_tokens=1))
