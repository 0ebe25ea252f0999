"""The end of a graph, run again at little cost: what enters its last piece is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir

from iq_export.graph.interface import Role, name_of
from iq_export.observe.samples import Window
from iq_export.observe.segments import segments
from iq_export.observe.walk import (
    Graph,
    Observer,
    Piece,
    Values,
    checked,
    cut,
    loaded,
    named,
    observe,
)
from iq_export.progress import Progress

_LOGITS = name_of(Role.LOGITS)


class Tail(Observer):
    """The logits of a causal LM on the first windows of a walk, as often as they are asked for: an
    observer that keeps one row of the residual stream per token, in a dict of `rows` by window."""

    def __init__(self, graph: Graph, rows: list[Values], providers: Sequence[str]) -> None:
        self._model, self._label = loaded(graph), named(graph)
        self.names = list(segments(self._model.graph)[-1].carried)
        self.of = range(len(rows))
        self._providers = providers
        self.rows = rows

    @classmethod
    def of_graph(
        cls,
        graph: Graph,
        windows: Sequence[Window],
        *,
        providers: Sequence[str],
        progress: Progress,
    ) -> Tail:
        """Walk `graph` over `windows` for its tail alone. Raises GraphError as `walk` does."""
        tail = cls(graph, [{} for _ in windows], providers)
        observe(graph, [tail], windows, providers=providers, progress=progress)
        return tail

    def add(self, number: int, values: Values) -> None:
        self.rows[number] |= values

    @contextmanager
    def stored_logits(
        self, windows: Sequence[Window], folder: Path
    ) -> Iterator[Callable[[], Iterator[np.ndarray]]]:
        """In the block, `logits` as often as the function that is given is called, with no head in
        memory: they are written to a new `folder` when they are first asked for."""
        places = [folder / f"{number}.npy" for number in range(len(windows))]

        def read() -> Iterator[np.ndarray]:
            if not folder.exists():
                folder.mkdir()
                for place, found in zip(places, self.logits(windows), strict=True):
                    np.save(place, found)
            yield from map(np.load, places)

        try:
            yield read
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def logits(self, windows: Sequence[Window]) -> Iterator[np.ndarray]:
        """float32 `[seq, vocab]` of each of `windows`: those that were walked, or their beginnings.

        Raises GraphError if one is NaN or infinite.
        """
        part: ir.Model = cut(self._model, self.names, [_LOGITS])
        with Piece(part, [_LOGITS], self._providers, self._label) as runner:
            for number, (window, rows) in enumerate(zip(windows, self.rows, strict=False)):
                given = {name: value[: len(window.ids)][None] for name, value in rows.items()}
                yield checked(_LOGITS, runner.run(window, given)[_LOGITS], number)
