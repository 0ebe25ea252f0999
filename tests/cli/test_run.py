"""run streams text, follows its seed, and says in one sentence what it cannot do."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from iq_export.cli import main
from tests.cli.conftest import FakeModel


class SpeakingTokenizer:
    """One token per word, its length; tokens come out as `<id>`."""

    bos_id = 1
    eos_ids = frozenset((0,))

    def __init__(self, folder: Path) -> None:
        pass

    def encode(self, text: str, add_bos: bool | None) -> list[int]:
        # add_bos=None: what the tokenizer does by itself, here: a BOS.
        return ([self.bos_id] if add_bos is None else []) + [len(word) for word in text.split()]

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        return (f"<{token}>" for token in ids)

    def token(self, token: int) -> str:
        return f"<{token}>"

    def apply_chat_template(self, messages: list[dict[str, str]]) -> str:
        return " ".join(f"{m['role']} {m['content']}" for m in messages)


@pytest.fixture(autouse=True)
def tokenizer(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iq_export.run.generate.Tokenizer", SpeakingTokenizer)


def answer(capsys: pytest.CaptureFixture[str], bundle: Path, *options: str) -> dict[str, object]:
    assert main(["run", str(bundle), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_text_goes_to_stdout(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(bundle), "--prompt", "what is it", "--max-new-tokens", "3"]
    assert main(arguments) == 0
    streams = capsys.readouterr()
    assert streams.out.count("<") == 3 and streams.out.endswith(">\n")
    assert "3 tokens" in streams.err
    assert main([*arguments, "-q"]) == 0
    assert capsys.readouterr() == (streams.out, "")


def test_json_is_one_document(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = answer(capsys, bundle, "--prompt", "what is it", "--max-new-tokens", "3")
    assert document["new_tokens"] == len(document["ids"]) == 3  # type: ignore[arg-type]
    assert document["prompt_tokens"] == 4  # "user" and three words
    assert document["finished"] is False
    assert document["text"] == "".join(f"<{token}>" for token in document["ids"])  # type: ignore[attr-defined]


def test_prompts(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a system message, as it is, and from stdin."""
    short = ("--max-new-tokens", "1")
    assert answer(capsys, bundle, "--prompt", "a b", *short)["prompt_tokens"] == 3
    system = answer(capsys, bundle, "--prompt", "a b", "--system", "be kind", *short)
    assert system["prompt_tokens"] == 6
    assert answer(capsys, bundle, "--prompt", "a b", "--raw", *short)["prompt_tokens"] == 3
    monkeypatch.setattr("sys.stdin", io.StringIO("a b c d"))
    assert answer(capsys, bundle, "--prompt", "-", "--raw", *short)["prompt_tokens"] == 5


def test_sampling_follows_the_seed(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ids(seed: str) -> object:
        options = ("--prompt", "a", "--temperature", "2", "--seed", seed, "--top-p", "0.9")
        return answer(capsys, bundle, *options)["ids"]

    assert ids("1") == ids("1") != ids("2")


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (("--temperature", "-1"), "--temperature"),
        (("--top-p", "0"), "--top-p"),
        (("--raw", "--system", "x"), "--raw"),
    ),
)
def test_options_that_cannot_be(
    options: tuple[str, ...], message: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(bundle), "--prompt", "a", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_damaged_bundle_is_not_run(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "model.onnx").write_bytes(b"other")
    assert main(["run", str(bundle), "--prompt", "a"]) == 7
    assert "model.onnx" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "values"),
    (
        ("--temperature", ("nan", "inf", "-inf", "-0.5")),
        ("--top-p", ("nan", "inf", "-1", "1.5")),
        ("--seed", ("-1", str(-(2**70)))),
    ),
)
def test_numbers_that_mean_nothing(
    option: str, values: tuple[str, ...], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in values:
        assert main(["run", str(bundle), "--prompt", "a", f"{option}={value}"]) == 2
        error = capsys.readouterr().err
        assert option in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    (("--seed", str(2**70)), ("--temperature", "1e-320"), ("--temperature", "1e300"),
     ("--top-p", "1e-320")),
)  # fmt: skip
def test_numbers_at_the_edge(
    options: tuple[str, ...], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--prompt", "a b", "--max-new-tokens", "2", "--temperature", "1")
    assert answer(capsys, bundle, *common, *options)["new_tokens"] == 2


def test_prompts_that_are_no_text(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An argument that is not UTF-8 comes as surrogates; a closed stdin is None."""

    def refused(*options: str) -> str:
        assert main(["run", str(bundle), "--raw", *options]) == 4
        return capsys.readouterr().err

    assert "The prompt is not UTF-8" in refused("--prompt", "a \udcff")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a \xff"), "ascii"))
    assert "not UTF-8 (byte 2)" in refused("--prompt", "-")
    monkeypatch.setattr("sys.stdin", None)
    assert "stdin is closed" in refused("--prompt", "-")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stdin", closed)
    assert "cannot be read from stdin" in refused("--prompt", "-")


def test_a_prompt_in_another_locale(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO("é é".encode()), encoding="ascii")
    monkeypatch.setattr("sys.stdin", stream)
    options = ("--prompt", "-", "--raw", "--max-new-tokens", "1")
    assert answer(capsys, bundle, *options)["prompt_tokens"] == 3


def test_an_empty_prompt(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template makes a prompt of it; without template and BOS there is nothing to go on."""
    assert answer(capsys, bundle, "--prompt", "", "--max-new-tokens", "1")["prompt_tokens"] == 1
    monkeypatch.setattr(SpeakingTokenizer, "encode", lambda *_, **__: [])
    assert main(["run", str(bundle), "--prompt", "", "--raw"]) == 4
    assert "The prompt is empty" in capsys.readouterr().err


def test_whatever_the_arguments(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd values of every option: an answer, or a sentence and a code of the table."""
    rng = random.Random(0)
    numbers = ["0", "1", "-1", "nan", "inf", "-inf", "1e-320", "1e309", "0x10", "", " 7", "1_0",
               "9" * 400, "½", "--", "\udcff", str(2**64), "0.5", "None"]  # fmt: skip
    texts = ["", "a b", "\udcff", "\0", "-", "é 🎉", "a" * 5000, "{{ x }}", "--json", "\n"]
    stdins = [b"", b"a b", b"\xff", b"\xef\xbb\xbfa", None]
    values = {
        "--temperature": numbers, "--top-p": numbers, "--seed": numbers, "--system": texts,
        "--device": ["cpu", "tpu", ""],
    }  # fmt: skip
    codes = set()
    for _ in range(150):
        arguments = [f"--prompt={rng.choice(texts)}", "--max-new-tokens=2"]
        for option in rng.sample(list(values), rng.randrange(4)):
            arguments.append(f"{option}={rng.choice(values[option])}")
        arguments += rng.sample(["--raw", "--json", "-q"], rng.randrange(3))
        stdin = rng.choice(stdins)
        stream = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin))
        monkeypatch.setattr("sys.stdin", stream)
        try:
            code = main(["run", str(bundle), *arguments])
        except SystemExit as stop:  # argparse, whose message comes after its usage
            code = stop.code
        error = capsys.readouterr().err
        assert code in (0, 2, 4), (arguments, stdin, error)
        assert code == 0 or "error: " in error.splitlines()[-1], (arguments, error)
        codes.add(code)
    assert codes == {0, 2, 4}


@pytest.mark.parametrize(
    ("weights", "memory", "unpack", "says"),
    (
        (0, 10**9, False, None),
        (4 * 10**8, 10**9, True, "they are unpacked once instead, which takes 800.0 MB of memory"),
        (
            6 * 10**8,
            10**9,
            False,
            "hence it is slow; unpacking them once would take 1.2 GB of memory",
        ),
        (6 * 10**8, None, True, "unpacked once instead"),
    ),
)
def test_int8_weights_on_a_cpu(
    weights: int, memory: int | None, unpack: bool, says: str | None, bundle: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What is done about them is said once, unless nothing shall be said."""
    asked = []

    class Model(FakeModel):
        def __init__(self, path: Path, **options: object) -> None:
            asked.append(options["unpack"])
            super().__init__(path)

    monkeypatch.setattr("iq_export.run.ort.CausalLM", Model)
    monkeypatch.setattr("iq_export.run.ort.unpacked_bytes", lambda _: weights)
    monkeypatch.setattr("iq_export.cli.run.memory_bytes", lambda: memory)
    arguments = ["run", str(bundle), "--prompt", "a", "--max-new-tokens", "1"]
    assert main(arguments) == 0
    error = capsys.readouterr().err
    assert error.count("note:") == (says is not None) and (says or "") in error
    assert main([*arguments, "-q", "--device", "cuda"]) == 0
    assert asked == [unpack, False] and capsys.readouterr().err == ""
