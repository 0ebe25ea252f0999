"""Pictures and recordings as windows of a graph that looks at them as a whole."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from iq_export.errors import DataError
from iq_export.graph import io
from iq_export.graph.interface import Interface, Role
from iq_export.graph.sites import find_sites
from iq_export.observe.pictures import load_pictures, picture_files
from iq_export.observe.preprocessor import PictureSteps, read_steps
from iq_export.observe.samples import TextTokenizer, Whole, windows
from iq_export.observe.sound import load_recordings, recordings
from iq_export.observe.walk import walk
from iq_export.progress import Progress

_WORD = "word"


def check_signals(folder: Path, place: Path) -> None:
    """Refuse what `load_signals` would refuse before it reads a picture or recording."""
    steps = read_steps(place)
    if isinstance(steps, PictureSteps):
        picture_files(folder)
    else:
        recordings(folder)


def load_signals(folder: Path, place: Path, count: int, seed: int) -> list[np.ndarray]:
    """Up to `count` pictures or recordings below `folder`, as the file of preprocessing at `place`,
    or in the folder there, makes input of them.

    Raises DataError if there are none or one cannot be read, ModelError if nothing says how.
    """
    steps = read_steps(place)
    if isinstance(steps, PictureSteps):
        return list(load_pictures(folder, steps, count=count, seed=seed))
    return list(load_recordings(folder, steps, count=count, seed=seed))


class WholeTokenizer(TextTokenizer, Protocol):
    """What `sentences` needs besides."""

    def encode(self, text: str, add_bos: bool | None) -> list[int]:
        """The token ids of `text`; with None those that the tokenizer itself puts around it too."""


def sentences(
    tokenizer: WholeTokenizer, text: str, length: int, count: int, seed: int
) -> list[np.ndarray]:
    """Up to `count` windows of `length` ids of one text, with what the tokenizer puts around each.

    Fewer if the text is short. Raises DataError if it is shorter than one window.
    """
    bare, whole = tokenizer.encode(_WORD, False), tokenizer.encode(_WORD, None)
    places = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    if not places:
        raise DataError("the tokenizer changes a text by what it puts around it: that is not known")
    front, back = whole[: places[0]], whole[places[0] + len(bare) :]
    inner = length - len(front) - len(back)
    cut = windows(tokenizer, text, length=inner, count=count, seed=seed, bos="without")
    order = random.Random(seed).sample(
        range(len(cut)), len(cut)
    )  # what is held out is so by chance
    return [np.asarray([*front, *cut[i].ids, *back], np.int64) for i in order]


def whole_windows(graph: Path, arrays: Sequence[np.ndarray]) -> list[Whole]:
    """Each of `arrays` as a window of the traced graph at `graph`.

    Raises DataError if it does not take that size, GraphError if it is not understood.
    """
    model = io.load(graph)
    stream, primary = find_sites(model).embedding, Interface.of_graph(model.graph).primary
    rows: dict[tuple[int, ...], int] = {}
    for array in arrays:
        if array.shape in rows:
            continue
        if primary is not None and primary.role is not Role.IDS:
            _check_size(array, primary.shape[1:])
        sample = [Whole(array, 1)]
        for _, values in walk(model, [stream], sample, progress=Progress(quiet=True), raw=True):
            rows[array.shape] = values[stream].shape[1]
    return [Whole(array, rows[array.shape]) for array in arrays]


def _check_size(array: np.ndarray, wanted: tuple[int | str | None, ...]) -> None:
    fits = len(wanted) == array.ndim and all(
        not isinstance(size, int) or size == has
        for size, has in zip(wanted, array.shape, strict=True)
    )
    if not fits:
        raise DataError(
            f"what preprocessing makes has the shape {list(array.shape)}, and the model takes "
            f"{list(wanted)}: give the preprocessing of this model"
        )
