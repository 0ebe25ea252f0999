"""Run a graph over token windows, piece by piece, and hand out intermediate values.

One piece of the graph has its weights in memory at a time (`segments`): all windows pass it before
the next one is loaded, and between pieces one row of the residual stream is kept per token. Nothing
else is kept here: callers reduce.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from iq_export.errors import GraphError
from iq_export.graph import io
from iq_export.graph.edit import separate_types
from iq_export.graph.interface import Interface
from iq_export.memory import give_back
from iq_export.observe.samples import Sample
from iq_export.observe.segments import segments
from iq_export.progress import Progress
from iq_export.run.ort import model_session, needed_only, ort_errors

_LONGEST = 300  # characters of another's words in an error
CPU = ("CPUExecutionProvider",)
WHOLE = sys.maxsize  # tokens: all that a window has

# A graph: a file, or a model in memory, which is not changed.
Graph = Path | ir.Model
# name -> value of one window, [seq, features] or [seq]; keys and values with their heads joined
Values = dict[str, np.ndarray]
# name -> value of one window as the graph has it, with its batch axis
Carried = dict[str, np.ndarray]


def walk(
    graph: Graph,
    names: Sequence[str],
    windows: Sequence[Sample],
    *,
    always: Sequence[str] = (),
    providers: Sequence[str] = CPU,
    progress: Progress,
    round_half: bool = False,
    raw: bool = False,
    reach: Callable[[str, int], int] = lambda name, window: WHOLE,
) -> Iterator[tuple[int, Values]]:
    """Yield `(window number, values)`: for every piece of the graph that makes some of `names`,
    every window with these. What is behind the last of them is not run.

    `always` names values (indices of sinks) that come with each, from the piece that makes them
    on. `reach(name, window number)` tells how many of a window's first tokens some value is wanted
    for, 0: none. A window goes no further than to the last value that it wants, and with no more
    tokens than are wanted from there on: a causal model needs no later ones. Beginnings that are
    equal run once. Float values come as fp32. `round_half` as at `run.ort.open_session`. `raw`:
    values as the graph has them, with their batch axis and what is not finite.

    Raises GraphError naming the tensor, its window and position if a value is NaN or Inf.
    """
    model, label = loaded(graph), named(graph)
    pieces = segments(model.graph)
    place = {name: number for number, piece in enumerate(pieces) for name in piece.made}
    if unknown := set(names) - set(place):
        raise GraphError(f"{label} has no values {sorted(unknown)}.")
    wanted = [
        {name: tokens for name in names if (tokens := reach(name, order))}
        for order in range(len(windows))
    ]
    # of every window, one behind the last piece that it needs
    ends = [max((place[name] + 1 for name in its), default=0) for its in wanted]
    left = list(windows)
    carried: list[Carried] = [{} for _ in windows]

    def same(order: int) -> tuple[int, ...]:
        """What windows that run together have in common: whole ones never do."""
        its = left[order]
        return (order,) if its.rows == windows[order].rows else (-1, *its.tokens.tolist())

    for number in range(max(ends, default=0)):
        piece = pieces[number]
        inside = [order for order, end in enumerate(ends) if end > number]
        for order in inside:
            most = max(tokens for name, tokens in wanted[order].items() if place[name] >= number)
            left[order], carried[order] = _beginning(left[order], carried[order], most)
        taps = [n for n in names if n in piece.made and any(n in wanted[i] for i in inside)]
        here = [name for name in always if name in piece.made]
        last = number + 1 == max(ends)
        kept = [] if last else [name for name in piece.kept if name in piece.made]
        outputs = list(dict.fromkeys([*taps, *here, *kept]))
        part = cut(model, piece.carried, outputs)
        groups: dict[tuple[int, ...], list[int]] = {}  # of windows that run together
        mine: dict[int, list[str]] = {}
        for order in inside:
            groups.setdefault(same(order), []).append(order)
            mine[order] = [name for name in taps if name in wanted[order]]
        runs: dict[tuple[int, ...], Carried] = {}
        with Piece(part, outputs, providers, label, round_half=round_half) as runner:
            for done, order in enumerate(inside, start=1):
                key = same(order)
                group = groups[key]
                if order == group[0]:
                    needed = [*here, *(name for each in group for name in mine[each])]
                    needed += kept if any(ends[each] > number + 1 for each in group) else []
                    runs[key] = runner.run(left[order], carried[order], needed)
                found = runs.pop(key) if order == group[-1] else runs[key]
                now = {**carried[order], **found}
                through = (*piece.kept, *always) if ends[order] > number + 1 else ()
                carried[order] = {name: now[name] for name in through if name in now}
                if mine[order]:
                    values = {name: found[name] for name in mine[order]}
                    values |= {name: now[name] for name in always if name in now}
                    yield order, values if raw else _all_checked(values, order)
                progress.update(number * len(inside) + done, max(ends) * len(inside))


def _beginning(window: Sample, carried: Carried, tokens: int) -> tuple[Sample, Carried]:
    """The first `tokens` of a window and of what came to it, `[1, seq]` or `[1, seq, features]`:
    whole, where that has other axes."""
    short = window.beginning(tokens)
    fits = all(v.ndim in (2, 3) and v.shape[:2] == (1, window.rows) for v in carried.values())
    if short is window or not fits:
        return window, carried
    return short, {name: value[:, :tokens] for name, value in carried.items()}


class Observer(ABC):
    """What reduces values on a walk: `names` are those that it wants of the windows whose numbers
    are in `of`, and `add` gets those of one piece of one window, which may be a beginning only.
    With `raw` as the graph has them, with their batch axis."""

    names: Sequence[str]
    of: range
    raw: bool = False

    def reach(self, number: int) -> int:
        """How many of the first tokens of its window `number` it wants; 0: none."""
        return WHOLE

    @abstractmethod
    def add(self, number: int, values: Values) -> None:
        """Take the values of its window `number` that one piece of the graph makes."""


def observe(
    graph: Graph,
    observers: Sequence[Observer],
    windows: Sequence[Sample],
    *,
    providers: Sequence[str] = CPU,
    progress: Progress,
) -> None:
    """Let all `observers` ride on one walk; each counts its own windows from 0.

    Raises GraphError as `walk` does.
    """
    wanted = [
        (each, set(each.names), {number: each.reach(number - each.of.start) for number in each.of})
        for each in observers
    ]
    names = list(dict.fromkeys(name for each in observers for name in each.names))

    def reach(name: str, number: int) -> int:
        return max((tokens.get(number, 0) for _, its, tokens in wanted if name in its), default=0)

    for number, found in walk(
        graph, names, windows, providers=providers, progress=progress, reach=reach, raw=True
    ):
        plain = _all_checked(found, number)
        for each, its, tokens in wanted:
            values = found if each.raw else plain
            mine = {name: value for name, value in values.items() if name in its}
            if mine and tokens.get(number):
                each.add(number - each.of.start, mine)


def loaded(graph: Graph) -> ir.Model:
    """The model of a graph."""
    return io.load(graph) if isinstance(graph, Path) else graph


def named(graph: Graph) -> str:
    """What a graph is called in errors: the name inside of it is its author's, and not shown."""
    return graph.name if isinstance(graph, Path) else "the graph"


class Piece:
    """A piece of a graph (see `cut`) loaded in ONNX Runtime until the block ends; `label` names
    the graph in errors. `part` is used up: its constants are gone."""

    def __init__(
        self,
        part: ir.Model,
        outputs: Sequence[str],
        providers: Sequence[str],
        label: str,
        *,
        round_half: bool = False,
    ) -> None:
        self.names, self._label = list(outputs), label
        self._session = model_session(part, providers, label, round_half=round_half)
        # Nodes and values hold each other, so `part` is freed late: its weights are not.
        for value in part.graph.initializers.values():
            value.const_value = None

    def __enter__(self) -> Piece:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        give_back()

    def run(
        self, window: Sample, carried: Mapping[str, np.ndarray], names: Sequence[str] | None = None
    ) -> Carried:
        """The outputs of one window with an empty cache, by name, with their batch axis; only what
        `names` need is computed."""
        feeds = window_feeds(self._session, window, carried)
        names = list(dict.fromkeys(self.names if names is None else names))
        try:
            found = self._session.run(names, feeds, needed_only() if names != self.names else None)
        except ort_errors() as error:
            reason = str(error).splitlines()[0]
            raise GraphError(f"{self._label} fails in ONNX Runtime: {reason}") from error
        return dict(zip(names, found, strict=True))


def cut(model: ir.Model, carried: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """A copy of what makes `outputs` of the graph's inputs and of the values `carried`."""
    begin = [str(value.name) for value in model.graph.inputs]
    try:
        graph = ir.convenience.extract(model.graph, [*begin, *carried], list(outputs))
    except (RuntimeError, ValueError) as error:  # a node that reads what nothing makes
        reason = " ".join(str(error.__cause__ or error).split())[:_LONGEST]
        raise GraphError(f"The graph cannot be cut in front of {outputs[0]!r}: {reason}") from error
    piece = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    separate_types(graph)
    RemoveUnusedNodesPass()(piece)
    graph.inputs[:] = [value for value in graph.inputs if value.uses()]
    return piece


def window_feeds(
    session: Any, window: Sample, given: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Inputs of one window with an empty cache; `given` are inputs that only this graph has."""
    interface = Interface.of_session(session)
    wanted = {tensor.name for tensor in interface.inputs}
    known = {name: value for name, value in (given or {}).items() if name in wanted}
    return interface.feeds(window.values, known)


def _all_checked(values: Values, window: int) -> Values:
    return {name: checked(name, value, window) for name, value in values.items()}


def checked(name: str, value: np.ndarray, window: int) -> np.ndarray:
    """A value of one window without its batch axis, heads joined, as fp32.

    Raises GraphError if it is not finite.
    """
    value = value[0] if value.ndim else value
    if value.ndim == 3:  # [heads, seq, head_dim]
        value = value.transpose(1, 0, 2).reshape(value.shape[1], -1)
    if value.dtype == np.float16:
        value = value.astype(np.float32)
    if value.dtype == np.float32 and not _finite(value):
        row = int(np.argwhere(~np.isfinite(value))[0][0])
        raise GraphError(
            f"Tensor {name!r} holds NaN or Inf in calibration window {window}, position {row}. "
            "The model is not computable on this input in its own precision; check its weights."
        )
    return value


def _finite(value: np.ndarray) -> bool:
    with np.errstate(all="ignore"):
        # A sum is finite only if all are, and quicker to have; rarely it overflows by itself.
        return bool(np.isfinite(value.sum()) or np.isfinite(value).all())
