"""Which token ids and positions a graph can take, read from its file without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from iq_export.errors import DataError, GraphError
from iq_export.graph.interface import Interface, Role, name_of
from iq_export.graph.proto import read

if TYPE_CHECKING:
    import onnx

# On the way from an input to the table these leave its numbers as they are.
_PASSING = frozenset({"Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})


class Names(Protocol):
    """What `check` needs of a tokenizer (`iq_export.run.generate.Tokenizer` has it)."""

    def token(self, token: int) -> str | None:
        """How one token is written."""


@dataclass(frozen=True)
class Vocabulary:
    """`rows` of the smallest table that token ids index, and the width of the logits; None where
    the graph does not say.

    Neither is the tokenizer's size: a tokenizer may have more ids than the table has rows (image
    tokens of a text model), and the logits may be narrower or wider than the table.
    """

    rows: int | None = None
    logits: int | None = None

    def check(
        self, ids: Sequence[int], names: Names, where: str, *, predicted: bool = False
    ) -> None:
        """DataError for the first of `ids` that the graph cannot take, with its text.

        where: "the prompt", for the message; predicted: each is compared with the logits too.
        """
        limits = [
            (self.rows, "embedding table has {} rows"),
            (self.logits if predicted else None, "logits are {} wide"),
        ]
        for limit, words in limits:
            bad = None if limit is None else next((i for i in ids if not 0 <= i < limit), None)
            if bad is not None:
                raise DataError(
                    f"{where} holds the token {names.token(bad)!r} with id {bad}, and the model's "
                    f"{words.format(limit)}: take it out of {where}, or check that the tokenizer "
                    "is this model's"
                )


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of the graph at `path`; nothing is known of a file that cannot be read."""
    graph = _graph(path)
    if graph is None:
        return Vocabulary()
    logits = Interface.of_proto(graph).find(Role.LOGITS)
    width = next((size for size in logits.shape[-1:] if isinstance(size, int)), 0) if logits else 0
    return Vocabulary(_table_rows(graph, Role.IDS), width or None)


def position_rows(path: Path) -> int | None:
    """How many positions the smallest table that they index has in the graph at `path`: its rows
    from that of position 0 on.

    None without one, behind other arithmetic than an addition, or if the file cannot be read.
    """
    graph = _graph(path)
    return None if graph is None else _table_rows(graph, Role.POSITIONS)


def _graph(path: Path) -> onnx.GraphProto | None:
    from google.protobuf.message import DecodeError

    try:
        return read(path).graph
    except (OSError, GraphError, DecodeError):
        return None


def _table_rows(graph: onnx.GraphProto, role: Role) -> int | None:
    """Rows of the smallest table that the input of `role` indexes, without those in front of what
    is added to it."""
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in graph.value_info:
        sizes.setdefault(value.name, _shape(value))
    numbers = {tensor.name: number for tensor in graph.initializer if (number := _number(tensor))}
    first = {name_of(role): 0}  # by the name of a value: the row of 0
    rows = []
    for node in graph.node:  # in topological order
        if node.op_type in _PASSING and node.input[0] in first:
            first |= dict.fromkeys(node.output, first[node.input[0]])
        elif node.op_type == "Add" and (known := first.keys() & set(node.input)):
            added = [numbers[name] for name in node.input if name in numbers]
            if added:
                first[node.output[0]] = first[known.pop()] + added[0]
        elif node.op_type == "Gather" and node.input[1] in first:
            table = sizes.get(node.input[0], [])
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            rows += [size - first[node.input[1]] for size in table[axis : axis + 1] if size]
    return min(rows, default=None)


def _number(tensor: onnx.TensorProto) -> int | None:
    """A single whole number that the file holds itself; None for anything else."""
    from onnx import TensorProto, numpy_helper

    if tensor.data_type != TensorProto.INT64 or tensor.data_location == TensorProto.EXTERNAL:
        return None
    array = numpy_helper.to_array(tensor)
    return int(array.item()) if array.size == 1 else None


def _shape(value: object) -> list[int]:
    """Sizes of a graph value, 0 where one is dynamic."""
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]  # type: ignore[attr-defined]
