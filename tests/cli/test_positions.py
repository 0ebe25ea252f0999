"""run and eval keep to the positions that the model of a bundle has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from iq_export.bundle.package import Bundle, update_manifest
from iq_export.cli import main
from tests.cli.conftest import runnable
from tests.cli.test_run import SpeakingTokenizer

EVAL = ("--windows", "2", "--bundle-only", "--json")


def states(bundle: Path, **config: object) -> Path:
    (bundle / "config.json").write_text(json.dumps(config))
    update_manifest(Bundle.open(bundle), rehash=["config.json"])
    return bundle


def table(bundle: Path) -> Path:
    return states(bundle, model_type="gpt_bigcode", n_positions=8)


def rotation(bundle: Path) -> Path:
    return states(bundle, model_type="llama", max_position_embeddings=8)


@pytest.fixture
def speaking(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iq_export.run.generate.Tokenizer", SpeakingTokenizer)


def run(bundle: Path, words: int, new: int) -> int:
    prompt = " ".join(["word"] * words)
    argv = ["run", str(bundle), "--raw", "--prompt", prompt, "--max-new-tokens", str(new)]
    return main([*argv, "--json"])


@pytest.mark.usefixtures("speaking")
def test_run_beyond_a_table(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(table(bundle), words=8, new=1) == 4  # and a BOS
    (line,) = capsys.readouterr().err.splitlines()
    assert "The prompt has 9 tokens, and the model has 8 positions" in line
    assert run(bundle, words=5, new=9) == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out)["new_tokens"] == 3
    assert "at most 3 new tokens" in streams.err


@pytest.mark.usefixtures("speaking")
def test_run_beyond_what_a_rotation_was_trained_for(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(rotation(bundle), words=12, new=2) == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out)["new_tokens"] == 2
    (line,) = streams.err.splitlines()
    assert "more than the model's 8 positions" in line


def test_eval_beyond_a_table(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runnable(bundle)
    assert main(["eval", str(table(bundle)), *EVAL, "--length", "9"]) == 2
    assert "--length 8 or less" in capsys.readouterr().err
    assert main(["eval", str(bundle), *EVAL]) == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out)["length"] == 8
    assert "windows of 8 tokens, not 512" in streams.err


def test_eval_beyond_what_a_rotation_was_trained_for(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runnable(bundle)
    assert main(["eval", str(rotation(bundle)), *EVAL, "--length", "16"]) == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out)["length"] == 16
    assert "longer than the model's 8 positions" in streams.err
