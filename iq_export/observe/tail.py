"""The end of a graph, run again at little cost: what enters its last piece is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir

from iq_export.observe.outputs import Output
from iq_export.observe.samples import Sample
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


class Tail(Observer):
    """What a graph is compared by (`output`) on the first windows of a walk, as often as it is
    asked for: an observer that keeps what enters the last piece, one row of the residual stream per
    token as a rule, in a dict of `rows` by window."""

    raw = True

    def __init__(self, graph: Graph, rows: list[Values], providers: Sequence[str]) -> None:
        self._model, self._label = loaded(graph), named(graph)
        self.output = Output.of(self._model.graph)
        self.names = list(segments(self._model.graph)[-1].carried)
        self.of = range(len(rows))
        self._providers = providers
        self.rows = rows

    @classmethod
    def of_graph(
        cls,
        graph: Graph,
        windows: Sequence[Sample],
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
    def stored_results(
        self, windows: Sequence[Sample], folder: Path
    ) -> Iterator[Callable[[], Iterator[np.ndarray]]]:
        """In the block, `results` as often as the function that is given is called, with no head in
        memory: they are written to a new `folder` when they are first asked for."""
        places = [folder / f"{number}.npy" for number in range(len(windows))]

        def read() -> Iterator[np.ndarray]:
            if not folder.exists():
                folder.mkdir()
                for place, found in zip(places, self.results(windows), strict=True):
                    np.save(place, found)
            yield from map(np.load, places)

        try:
            yield read
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def results(self, windows: Sequence[Sample]) -> Iterator[np.ndarray]:
        """Of each of `windows`, those that were walked or their beginnings, what `Output.rows`
        gives.

        Raises GraphError if one is NaN or infinite.
        """
        name = self.output.name
        part: ir.Model = cut(self._model, self.names, [name])
        with Piece(part, [name], self._providers, self._label) as runner:
            for number, (window, rows) in enumerate(zip(windows, self.rows, strict=False)):
                given = rows
                if window.causal:  # the beginning of what was walked
                    given = {key: value[:, : window.rows] for key, value in rows.items()}
                found = runner.run(window, given)[name]
                checked(name, found, number)
                yield self.output.rows(found)
