"""Whatever the command line is given, a sentence comes out: `python -m tests.cli.fuzz` in part.

The fuzzer runs in a process of its own, whose children are forks: this one has threads.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import fuzz
from tests.cli import fuzz_inputs as inputs


def run(folder: Path, *argv: str) -> None:
    command = [sys.executable, "-m", "tests.cli.fuzz", "--base", str(folder), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_a_sample(tmp_path: Path) -> None:
    run(tmp_path, "--calls", "30", "--light")


@pytest.mark.heavy
def test_two_thousand_calls(tmp_path: Path) -> None:
    run(tmp_path, "--calls", "2000")


def test_a_call_does_not_depend_on_those_before_it() -> None:
    """A value that is put in is a copy: else the next change would be made to the list of them."""
    text, known = '{"a": {"b": [1, 2, 3], "c": {}}, "d": "x"}', repr(inputs.JSON_VALUES)
    first = [inputs.damage_json(random.Random(n), text) for n in range(400)]
    assert first == [inputs.damage_json(random.Random(n), text) for n in range(400)]
    assert repr(inputs.JSON_VALUES) == known


def judged(argv: list[str], code: int, output: str, error: str) -> list[str]:
    return fuzz._about_output(argv, code, output, error, False)


@pytest.mark.parametrize(
    ("code", "error", "why"),
    [
        (-11, "", "dies of signal 11"),
        (99, "Traceback (most recent call last):\n", "traceback"),
        (1, "iq-export: error: unexpected KeyError: 'x'\n", "unexpected"),
        (3, "", "says nothing"),
        (9, "iq-export: error: x\n", "code 9"),
        (2, "iq-export run: error: " + "x" * 2000, "says too much (2022 characters)"),
        (3, "iq-export: error: \x1b[31mred\n", "control characters"),
    ],
)
def test_the_judge_sees(code: int, error: str, why: str) -> None:
    assert why in judged(["verify"], code, "", error)


def test_the_judge_lets_a_sentence_pass() -> None:
    assert not judged(["verify", "x"], 7, "", "iq-export: error: x is not a folder\n")
    assert not judged(["doctor", "--json"], 0, "[]\n", "")
    assert judged(["doctor", "--json"], 0, "no\n", "") == ["stdout is no JSON"]


def test_the_judge_sees_what_stays_behind(tmp_path: Path) -> None:
    box = fuzz.Box(tmp_path / "box")
    (box.folder / "in" / "text.txt").write_text("a")
    before = box.state()
    (box.folder / "in" / "text.txt").write_text("b")
    (box.folder / "out" / "model.onnx").touch()
    (box.folder / "out" / ".o.7.partial").mkdir()
    (box.folder / "outside" / "canary").unlink()
    why = fuzz._about_files(["compile"], 3, before, box.state(), False)
    assert why == ["changes its input", "leaves a temporary file", "leaves output after a failure",
                   "writes outside"]  # fmt: skip
