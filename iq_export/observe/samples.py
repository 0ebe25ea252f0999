"""Text for calibration and evaluation, and the token windows cut from it.

`builtin` is the prose of the manual pages that every CPython carries (`pydoc_data.topics`), so a
first compile needs no download. A third of it is held out (`builtin-heldout`) for evaluation.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from iq_export.checksum import sha256_file
from iq_export.errors import DataError, UsageError
from iq_export.graph.vocabulary import Names, read_vocabulary

BUILTIN = "builtin"
BUILTIN_HELDOUT = "builtin-heldout"
Bos = Literal["with", "without", "mixed"]

# Tokenizing holds several copies of the text in memory; a calibration needs a few hundred KB.
_MAX_BYTES = 64 << 20
_DESCRIPTOR = re.compile(r"/dev/stdin|/dev/fd/\d+|/proc/self/fd/\d+")
# Neighbouring paragraphs go to the same side of the split, so windows keep a running text.
_BLOCK_PARAGRAPHS = 24
_FIRST_TOKEN_TRIES = 8
_SHORT_PARAGRAPH = 40


class TextTokenizer(Protocol):
    """What `windows` needs of a tokenizer (`iq_export.run.generate.Tokenizer` has it)."""

    @property
    def bos_id(self) -> int | None:
        """The id of the beginning-of-sequence token, None if the model has none."""

    def encode(self, text: str, add_bos: bool) -> list[int]:
        """The token ids of `text`, with a BOS in front if `add_bos`."""


class Sample(Protocol):
    """What a model sees in one call, and what is kept of it: one row of the stream for each token,
    patch or frame."""

    causal: ClassVar[bool]  # whether rows need no later ones

    @property
    def values(self) -> Any:
        """What `Interface.feeds` takes."""

    @property
    def rows(self) -> int:
        """How many rows of the stream it makes."""

    @property
    def tokens(self) -> np.ndarray:
        """int64 `[rows]`: the token id of each, -1 where a row is no token."""

    def beginning(self, rows: int) -> Sample:
        """What its first `rows` need."""


@dataclass(frozen=True)
class Window:
    """`ids` [length] of one piece of text; `bos` tells whether ids[0] is the BOS token; `start` is
    where the piece begins among the text's tokens. A row needs no later one."""

    ids: list[int]
    bos: bool
    start: int = 0

    causal: ClassVar[bool] = True

    @property
    def values(self) -> list[int]:
        return self.ids

    @property
    def rows(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> np.ndarray:
        return np.asarray(self.ids, np.int64)

    def beginning(self, rows: int) -> Window:
        return self if rows >= len(self.ids) else replace(self, ids=self.ids[:rows])


@dataclass(frozen=True, eq=False)
class Whole:
    """What a model sees at once, each row beside all others: pixels float32 `[channels, height,
    width]`, a spectrogram float32 `[bands, frames]`, or ids int64 `[seq]`. `rows` are those of the
    stream."""

    values: np.ndarray
    rows: int

    causal: ClassVar[bool] = False

    @property
    def tokens(self) -> np.ndarray:
        if self.values.ndim == 1:
            return self.values.astype(np.int64)
        return np.full(self.rows, -1, np.int64)

    def beginning(self, rows: int) -> Whole:
        return self


def text_sha256(text: str) -> str:
    """By which a text is known wherever its file lies."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def folder_sha256(folder: Path) -> str:
    """By which a folder of pictures or recordings is known wherever it lies: the contents of its
    files, whatever their names."""
    found = sorted(sha256_file(path) for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def is_pipe(spec: str | Path) -> bool:
    """Whether a text is named by a descriptor of this process, which is read only once:
    `<(...)` of a shell, `/dev/stdin`."""
    return _DESCRIPTOR.fullmatch(str(spec)) is not None


def load_text(spec: str | Path) -> str:
    """The text that `spec` names: `builtin`, `builtin-heldout`, a UTF-8 file or an open pipe.

    A pipe can be read only once. Raises DataError if the text is missing, empty, no text or larger
    than 64 MiB, of which no more is read.
    """
    if spec in (BUILTIN, BUILTIN_HELDOUT):
        return _builtin_text(heldout=spec == BUILTIN_HELDOUT)
    path = Path(spec)
    try:
        text = io.TextIOWrapper(io.BytesIO(_content(path)), encoding="utf-8-sig").read()
    except FileNotFoundError as error:
        raise DataError(f"text {path} does not exist: give a UTF-8 file or '{BUILTIN}'") from error
    except UnicodeDecodeError as error:
        raise DataError(f"text {path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"cannot read text {path}: {error.strerror}") from error
    if "\0" in text:
        raise DataError(f"text {path} holds NUL characters: it is not a text file")
    if not text.strip():
        raise DataError(f"text {path} is empty")
    return text


def _content(path: Path) -> bytes:
    """The bytes of a regular file or of a pipe that is open already: a FIFO waits for a writer that
    may never come, and a device never ends."""
    if path.is_dir():
        raise DataError(f"text {path} is a folder: give a UTF-8 text file or '{BUILTIN}'")
    # It may have become something else since: opening must not wait.
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    with os.fdopen(opened, "rb") as stream:
        mode = os.fstat(opened).st_mode
        if not stat.S_ISREG(mode) and not (stat.S_ISFIFO(mode) and is_pipe(path)):
            raise DataError(f"text {path} is not a file: give a UTF-8 text file or '{BUILTIN}'")
        os.set_blocking(opened, True)
        content = stream.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise DataError(
            f"text {path} has more than {_MAX_BYTES >> 20} MiB: give an excerpt (a few hundred KB "
            "are plenty)"
        )
    return content


def _builtin_text(*, heldout: bool) -> str:
    """One side of the split of the manual pages: every third block of 24 paragraphs is held out."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("this Python carries no pydoc_data: give a text file instead") from error
    # Pages quote each other: a paragraph counts once, or held-out text would have been seen.
    distinct = dict.fromkeys(
        " ".join(paragraph.split())
        for name in sorted(topics)
        for paragraph in topics[name].split("\n\n")
        if _is_prose(paragraph)
    )
    paragraphs = list(distinct)
    blocks = [
        paragraphs[start : start + _BLOCK_PARAGRAPHS]
        for start in range(0, len(paragraphs), _BLOCK_PARAGRAPHS)
    ]
    chosen = [block for number, block in enumerate(blocks) if (number % 3 == 2) == heldout]
    return "\n\n".join(paragraph for block in chosen for paragraph in block)


def _is_prose(paragraph: str) -> bool:
    """At least a sentence, not underlined as a heading is; indented ones are mostly code."""
    lines = paragraph.strip("\n").splitlines()
    if not lines or len(paragraph) <= _SHORT_PARAGRAPH:
        return False
    if len(lines) > 1 and not lines[1].strip("*=-~^"):
        return False
    first = lines[0].lstrip()
    return not lines[0].startswith("   ") or (first[:1].isupper() and paragraph.endswith("."))


def windows(
    tokenizer: TextTokenizer, text: str, *, length: int, count: int, seed: int, bos: Bos
) -> list[Window]:
    """Up to `count` non-overlapping windows of `length` tokens, spread evenly over `text`.

    Deterministic in `seed`. First tokens differ between windows as far as the text allows.
    `bos`: "with" puts the BOS in front of the text's first length - 1 tokens, "without" cuts the
    same places with no BOS, "mixed" alternates (without BOS if the tokenizer has none). Fewer
    windows come back if the text is shorter than `count` of them.

    Raises DataError if the text is shorter than one window, or "with" is asked of a tokenizer that
    has no BOS; UsageError for a length below 2 or a count below 1.
    """
    if length < 2 or count < 1:
        raise UsageError(
            f"windows need a length of at least 2 and a count of at least 1, not {length}, {count}"
        )
    bos_id = tokenizer.bos_id
    if bos == "with" and bos_id is None:
        raise DataError("the tokenizer has no BOS token: windows with BOS cannot be cut")
    ids = tokenizer.encode(text, add_bos=False)
    if len(ids) < length:
        raise DataError(
            f"the text has {len(ids)} tokens, one window needs {length}: give more text or a "
            "smaller length"
        )
    starts = _starts(ids, length, min(count, len(ids) // length), random.Random(seed))
    return _cut(ids, starts, length, bos_id, bos)


def held_out_windows(
    tokenizer: TextTokenizer, text: str, taken: Sequence[Window], *, length: int, count: int
) -> list[Window]:
    """Up to `count` windows, as of `windows(bos="mixed")`, of what no window of `taken` covers.

    Fewer or none if the text has too little left. `taken` must be cut from the same text.
    """
    ids = tokenizer.encode(text, add_bos=False)
    free = np.ones(len(ids), bool)
    for window in taken:
        free[window.start : window.start + len(window.ids)] = False
    edges = np.flatnonzero(np.diff(np.concatenate([[False], free, [False]]).astype(np.int8)))
    gaps = edges.reshape(-1, 2).tolist()
    places = [s for low, high in gaps for s in range(low, high - length + 1, length)]
    chosen = np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)
    starts = [places[number] for number in chosen]
    return _cut(ids, starts, length, tokenizer.bos_id, "mixed")


def check_windows(cut: Sequence[Window], names: Names, graph: Path, where: str) -> None:
    """DataError, with the token's text, if `cut` holds an id that the graph cannot take or predict.

    where: which text it is, for the message.
    """
    ids = [token for window in cut for token in window.ids]
    read_vocabulary(graph).check(ids, names, where, predicted=True)


def _cut(
    ids: list[int], starts: Sequence[int], length: int, bos_id: int | None, bos: Bos
) -> list[Window]:
    """The windows that begin at `starts`, with a BOS as `bos` says if there is one."""
    pattern = {"with": (True,), "without": (False,), "mixed": (True, False)}[bos]
    cut = []
    for start, wanted in zip(starts, cycle(pattern), strict=False):
        if wanted and bos_id is not None:
            cut.append(Window([bos_id, *ids[start : start + length - 1]], True, start))
        else:
            cut.append(Window(ids[start : start + length], False, start))
    return cut


def _starts(ids: list[int], length: int, count: int, rng: random.Random) -> list[int]:
    """One start per equal segment of `ids`, preferring first tokens that no window has yet."""
    starts: list[int] = []
    seen: set[int] = set()
    for number in range(count):
        low = number * len(ids) // count
        high = (number + 1) * len(ids) // count - length
        tries = [rng.randint(low, high) for _ in range(_FIRST_TOKEN_TRIES)]
        start = next((t for t in tries if ids[t] not in seen), tries[0])
        seen.add(ids[start])
        starts.append(start)
    return starts
