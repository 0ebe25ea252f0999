"""Weights that stay where they are: in the files of the model that a graph was traced from.

Such a graph is plain ONNX, with the types and layouts of those files: an external initializer
`NAME.stored`, behind it a Cast to float32 and a Transpose as needed, and NAME their result. Where
the files lie, and what they were when the graph was traced, stands in the model's metadata. `lift`
makes of it what passes work on: NAME itself is an initializer, float32, read when it is asked for.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iq_export.errors import GraphError, ModelError
from iq_export.files import open_belonging

SUFFIX = ".stored"
_SOURCE = "iq_export.source"
_RAW = {ir.DataType.FLOAT: "<f4", ir.DataType.FLOAT16: "<f2", ir.DataType.BFLOAT16: "<u2"}
# Types of weights that can stay in their files.
TYPES = frozenset(_RAW)
_ROWS = 64  # transposed at a time, so that what is written stays in the processor's cache


@dataclass(frozen=True)
class Stamp:
    """What a file was when it was first looked at: its size in bytes, and when it was changed."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: BinaryIO) -> Stamp:
        """Of an open file."""
        found = os.fstat(file.fileno())
        return cls(found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Stored:
    """A weight's place: `file` below `folder`, from byte `offset` on, in C order.

    `stamp` is None for a file that lies beside the graph: it is checked with the graph's folder.
    """

    folder: Path
    file: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    stamp: Stamp | None = None

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * np.dtype(_RAW[self.dtype]).itemsize

    def part(self, number: int, start: int, stop: int) -> Stored:
        """Of a tensor of several axes: entries `start` to `stop` of entry `number`."""
        size = np.dtype(_RAW[self.dtype]).itemsize
        row = math.prod(self.shape[2:]) * size
        offset = self.offset + (number * self.shape[1] + start) * row
        return replace(self, shape=(stop - start, *self.shape[2:]), offset=offset)

    def is_there(self) -> bool:
        """Whether the file is there and what it was."""
        try:
            with open_belonging(self.folder, self.file, ModelError) as stream:
                return self.stamp in (None, Stamp.of(stream))
        except (OSError, ModelError):
            return False

    def read(self, *, transposed: bool = False) -> NDArray[np.float32]:
        """The values now. Raises ModelError if the file is not what it was, or not there."""
        path = self.folder / self.file
        try:
            with open_belonging(self.folder, self.file, ModelError) as stream:
                before = Stamp.of(stream)
                stream.seek(self.offset)
                raw = np.fromfile(stream, _RAW[self.dtype], math.prod(self.shape))
                after = Stamp.of(stream)
        except FileNotFoundError as error:
            raise ModelError(f"{path}, which holds the model's weights, is gone.") from error
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
        if self.stamp is not None and not before == after == self.stamp:
            raise ModelError(
                f"{path}, which holds the model's weights, has changed since the model was read; "
                "compile it again."
            )
        if raw.nbytes != self.nbytes:
            raise ModelError(f"{path} is damaged: it ends within a weight.")
        raw = raw.reshape(self.shape)
        return _widened(_transposed(raw) if transposed else raw)


@dataclass(frozen=True)
class Merged:
    """Matrices that count as one tensor `[n, rows, columns]`: the parts of each of the n, one below
    the other. Nothing holds it whole but what reads it."""

    parts: tuple[tuple[Stored, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        its = self.parts[0]
        return (len(self.parts), sum(part.shape[0] for part in its), its[0].shape[1])

    def read(self, *, transposed: bool = False) -> NDArray[np.float32]:
        """As `Stored.read`; it is no matrix, and not transposed."""
        assert not transposed
        return np.stack([np.concatenate([part.read() for part in its]) for its in self.parts])

    def part(self, number: int, start: int, stop: int) -> Stored:
        """As `Stored.part`, where the rows are those of one part."""
        for part in self.parts[number]:
            rows = part.shape[0]
            if start >= 0 and stop <= rows:
                width = part.nbytes // rows
                shape = (stop - start, part.shape[1])
                return replace(part, shape=shape, offset=part.offset + start * width)
            start, stop = start - rows, stop - rows
        raise GraphError("Rows of several stored weights were asked for as one.")


class StoredTensor(ir.LazyTensor):
    """A float32 tensor whose values are read from their file each time they are asked for.

    With `transposed` they are the transpose of the stored matrix.
    """

    __slots__ = ("place", "transposed")

    def __init__(
        self, place: Stored | Merged, name: str | None, *, transposed: bool = False
    ) -> None:
        self.place, self.transposed = place, transposed
        super().__init__(
            lambda: ir.Tensor(place.read(transposed=transposed), name=name),
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(place.shape[::-1] if transposed else place.shape),
            name=name,
        )

    def swapped(self) -> StoredTensor:
        """The transpose of a matrix."""
        return StoredTensor(self.place, self.name, transposed=not self.transposed)


def settle(model: ir.Model) -> None:
    """Write the stored weights of `model` as they lie in their files: what `lift` undoes."""
    graph = model.graph
    files: dict[str, Stamp] = {}
    folders: set[Path] = set()
    order = list(graph.initializers.values())
    graph.initializers.clear()
    nodes: list[ir.Node] = []
    for value in order:
        tensor = value.const_value
        place = tensor.place if isinstance(tensor, StoredTensor) else None
        if not isinstance(tensor, StoredTensor) or not isinstance(place, Stored):
            graph.initializers.add(value)
            continue
        if place.stamp is not None:
            files[place.file] = place.stamp
            folders.add(place.folder)
        stored, made = _spelt_out(value, place, transposed=tensor.transposed)
        graph.initializers.add(stored)
        nodes += made
    if nodes:
        graph.insert_before(graph[0], nodes)
    assert len(folders) < 2
    stamps = {name: [stamp.size, stamp.mtime_ns] for name, stamp in sorted(files.items())}
    folder = next((os.path.realpath(folder) for folder in folders), None)
    model.metadata_props[_SOURCE] = json.dumps({"folder": folder, "files": stamps})


def lift(model: ir.Model, folder: Path) -> None:
    """Let the stored weights of a graph in `folder` be float32 initializers that are read lazily.

    Nothing happens to a graph that was not `settle`d. Raises GraphError if it is damaged.
    """
    text = model.metadata_props.pop(_SOURCE, None)
    if text is None:
        return
    try:
        source = json.loads(text)
        stamps = {name: Stamp(*map(int, stamp)) for name, stamp in source["files"].items()}
        home = Path(source["folder"]) if stamps else folder
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GraphError(f"{folder}: what the graph says of its source is damaged.") from error
    graph = model.graph
    order = list(graph.initializers.values())
    graph.initializers.clear()
    for value in order:
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            graph.initializers.add(value)
            continue
        stamp = stamps.get(str(tensor.location))
        place = Stored(
            home if stamp else folder, str(tensor.location), tensor.dtype,
            tuple(tensor.shape.numpy()), tensor.offset or 0, stamp,
        )  # fmt: skip
        if place.dtype not in TYPES:
            raise GraphError(f"{folder}: the weight '{value.name}' is {place.dtype.name}.")
        graph.initializers.add(_lifted(value, place))


def _spelt_out(
    value: ir.Value, place: Stored, *, transposed: bool
) -> tuple[ir.Value, list[ir.Node]]:
    """The initializer for a stored weight, and the nodes that make `value`'s values of it."""
    name = str(value.name)
    steps: list[tuple[str, dict[str, ir.Attr], ir.DataType, tuple[int, ...]]] = []
    if place.dtype != ir.DataType.FLOAT:
        to = ir.AttrInt64("to", ir.DataType.FLOAT.value)
        steps.append(("Cast", {"to": to}, ir.DataType.FLOAT, place.shape))
    if transposed:
        perm = ir.AttrInt64s("perm", [1, 0])
        steps.append(("Transpose", {"perm": perm}, ir.DataType.FLOAT, place.shape[::-1]))
    external = ir.ExternalTensor(
        place.file, place.offset, place.nbytes, place.dtype, shape=ir.Shape(place.shape),
        name=name + SUFFIX if steps else name, base_dir=place.folder,
    )  # fmt: skip
    stored = ir.Value(
        name=external.name, shape=ir.Shape(place.shape), type=ir.TensorType(place.dtype),
        const_value=external,
    )  # fmt: skip
    current, nodes = stored, []
    for number, (kind, attributes, dtype, shape) in enumerate(steps, start=1):
        node = ir.Node("", kind, [current], list(attributes.values()), name=f"{name}/{kind}")
        current = node.outputs[0]
        current.name = name if number == len(steps) else f"{name}/{kind}/out"
        current.type, current.shape = ir.TensorType(dtype), ir.Shape(shape)
        nodes.append(node)
    value.name = None
    value.replace_all_uses_with(current)
    return stored, nodes


def _lifted(stored: ir.Value, place: Stored) -> ir.Value:
    """The initializer that stands for a stored weight and the nodes behind it, which go."""
    name, last, transposed = str(stored.name), stored, False
    if name.endswith(SUFFIX):
        name = name.removesuffix(SUFFIX)
        while last.name != name:
            nodes = [use.node for use in last.uses()]
            if len(nodes) != 1 or nodes[0].op_type not in ("Cast", "Transpose"):
                raise GraphError(f"The weight '{name}' of the traced graph is damaged.")
            transposed |= nodes[0].op_type == "Transpose"
            last = nodes[0].outputs[0]
    tensor = StoredTensor(place, name, transposed=transposed)
    value = ir.Value(
        name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    passed = list(_between(stored, last))
    last.replace_all_uses_with(value)
    for node in reversed(passed):
        assert node.graph is not None
        node.graph.remove(node, safe=True)
    return value


def _between(first: ir.Value, last: ir.Value) -> Iterator[ir.Node]:
    """The nodes from one value to another, each with one reader."""
    while first is not last:
        node = next(iter(first.uses())).node
        yield node
        first = node.outputs[0]


def _transposed(matrix: NDArray[np.generic]) -> NDArray[np.generic]:
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, len(matrix), _ROWS):
        out[:, start : start + _ROWS] = matrix[start : start + _ROWS].T
    return out


def _widened(raw: NDArray[np.generic]) -> NDArray[np.float32]:
    """Float32 of float32, float16 or the bits of bfloat16."""
    if raw.dtype != np.dtype("<u2"):
        return raw.astype(np.float32, copy=False)
    out = np.zeros(raw.shape, np.uint32)
    high = 1 if sys.byteorder == "little" else 0
    out.reshape(-1).view(np.uint16)[high::2] = raw.reshape(-1)
    return out.view(np.float32)
