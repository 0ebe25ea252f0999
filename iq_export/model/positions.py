"""How a transformers model is told the positions of its tokens.

The graph has them as an input, from 0 for the first token that is no pad. A model may number them
otherwise when it counts itself (from 2 on, behind a pad token's row), or take none and always
count from the length of the cache: padded rows come out wrong then, and the graph's do not. Both
show in the table that a model looks its positions up in, whatever it is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from iq_export.errors import ModelError

if TYPE_CHECKING:
    import torch

ARGUMENT = "position_ids"
# Tokens of the calls by which a table is found that is looked up by counting: none follows another.
_TOKENS = (7, 5, 9, 6, 8, 4)
_CALLS = (3, 2)


@dataclass(frozen=True)
class Positions:
    """`shift`: what is added to positions that are handed over. `tables`: of a model that takes
    none, the tables that it looks them up in, and what their rows begin at. `rows`: the number of
    positions that there are rows for, None if no table is known."""

    shift: int = 0
    tables: tuple[tuple[torch.nn.Module, int], ...] = ()
    rows: int | None = None

    @property
    def as_counted(self) -> bool:
        """Whether they are what the model counts by itself."""
        return not self.shift and not self.tables

    @contextmanager
    def given(self, positions: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
        """The arguments by which a model that is called in the block has `positions`
        `[batch, seq]`."""
        if not self.tables:
            yield {ARGUMENT: positions + self.shift if self.shift else positions}
            return
        with ExitStack() as held:
            for table, first in self.tables:
                held.enter_context(_looked_up(table, positions + first))
            yield {}


def positions_of(model: Any) -> Positions:
    """Look which table a causal LM looks up by counting, in two short calls.

    Raises ModelError if it takes no positions and there is no such table.
    """
    import torch

    words = model.get_input_embeddings()
    tables = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module is not words
    ]
    takes = takes_positions(type(model)) or any(
        takes_positions(type(module)) for module in model.modules() if _is_model(module)
    )
    if not tables and takes:
        return Positions()
    try:
        counted = _counted(model, tables, handed=False)
    except Exception as error:  # of a model's own code, which may want more than ids and a cache
        if takes:
            return Positions()
        raise ModelError(
            f"Which positions a '{model.config.model_type}' counts cannot be told: its code takes "
            f"no '{ARGUMENT}' and does not run on ids and a cache alone."
        ) from error
    rows = min((table.weight.shape[0] - first for table, first in counted.items()), default=None)
    if takes:
        handed = _counted(model, list(counted), handed=True) if counted else {}
        shifts = {first - handed[table] for table, first in counted.items() if table in handed}
        return Positions(shift=shifts.pop() if len(shifts) == 1 else 0, rows=rows)
    if not counted:
        raise ModelError(
            f"Model type '{model.config.model_type}' takes no '{ARGUMENT}' and looks none up by "
            "counting; this architecture is not supported."
        )
    return Positions(tables=tuple(counted.items()), rows=rows)


def takes_positions(kind: type) -> bool:
    """Whether the forward method of a class names positions."""
    return ARGUMENT in inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]


def counts_positions(kind: type) -> bool:
    """Whether a class is a table that counts positions by itself."""
    import torch

    taken = inspect.signature(kind.forward).parameters if hasattr(kind, "forward") else {}
    return (
        issubclass(kind, torch.nn.Embedding)
        and kind is not torch.nn.Embedding
        and bool({ARGUMENT, "past_key_values_length"} & set(taken))
    )


def _is_model(module: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def _counted(model: Any, tables: list[Any], *, handed: bool) -> dict[Any, int]:
    """Those of `tables` that are looked up at one number after the other, and the first number.

    `handed`: where the model is given positions from 0 on.
    """
    import torch
    from transformers import DynamicCache

    tokens = [token for token in _TOKENS if token != getattr(model.config, "pad_token_id", None)]
    cache, done = DynamicCache(), 0
    found: dict[Any, set[int | None]] = {table: set() for table in tables}
    for count in _CALLS:
        ids = torch.tensor([tokens[done : done + count]])
        numbers = torch.arange(done, done + count)[None]
        with torch.no_grad(), _seen_lookups() as lookups:
            more = {ARGUMENT: numbers} if handed else {}
            model(input_ids=ids, past_key_values=cache, use_cache=True, **more)
        for table in tables:
            for index in (index for weight, index in lookups if weight is table.weight):
                firsts: set[int | None] = {None}
                if index.shape[-1:] == (count,):
                    firsts = set((index.reshape(-1, count) - numbers).flatten().tolist())
                found[table].add(firsts.pop() if len(firsts) == 1 else None)
        done += count
    return {
        table: first
        for table, firsts in found.items()
        if len(firsts) == 1 and (first := next(iter(firsts))) is not None
    }


@contextmanager
def _seen_lookups() -> Iterator[list[tuple[Any, torch.Tensor]]]:
    """Weight and index of each lookup in a table."""
    import torch
    from torch.overrides import TorchFunctionMode

    seen: list[tuple[Any, torch.Tensor]] = []

    class Listener(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.nn.functional.embedding:
                seen.append((args[1], args[0]))
            return func(*args, **(kwargs or {}))

    with Listener():
        yield seen


@contextmanager
def _looked_up(table: Any, index: torch.Tensor) -> Iterator[None]:
    """Let `table` give its rows at `index`, whatever it is called with."""
    import torch

    table.forward = lambda *args, **kwargs: torch.nn.functional.embedding(index, table.weight)
    try:
        yield
    finally:
        del table.forward
