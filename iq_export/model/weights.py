"""A model's weights, read one at a time: a torch model whose large tensors lie in files.

In the model stand placeholders of the right shapes that take no memory. What computes with the
model has the weights of a layer filled in while that layer runs (`Weights.streamed`); a trace needs
none at all, since the graph refers to the files (`graph.stored`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iq_export import parallel
from iq_export.errors import ModelError
from iq_export.files import open_belonging
from iq_export.graph.stored import TYPES, Merged, Stamp, Stored, StoredTensor

if TYPE_CHECKING:
    import torch

# Weights that lie in no file of the source as they are, beside the graph.
DATA_FILE = "model.onnx.data"

_ALIGNMENT = 64
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


class Weights:
    """The placeholders in a torch model, and the places of the weights that they stand for.

    A placeholder is one number, repeated: so near to float32's largest that whatever was computed
    with it would not be finite. Each place has a number of its own, since transformers compares
    weights that are to be tied.
    """

    def __init__(self) -> None:
        self._places: dict[int, Stored | Merged] = {}
        self._numbers: list[torch.Tensor] = []

    @property
    def empty(self) -> bool:
        """Whether no placeholder was made."""
        return not self._places

    def forget(self) -> None:
        """Be as one that made no placeholder."""
        self._places.clear()
        self._numbers.clear()

    def placeholder(self, place: Stored | Merged) -> torch.Tensor:
        """A tensor that stands for the weight at `place`."""
        import torch

        bits = np.uint32(0x7F7FFFFF - len(self._numbers))
        number = torch.from_numpy(np.array([bits]).view(np.float32))
        self._numbers.append(number)
        self._places[number.data_ptr()] = place
        return number[0].expand(place.shape)

    def place(self, tensor: torch.Tensor) -> Stored | Merged | None:
        """Where the weight lies that `tensor` stands for; None if it holds its own values."""
        found = self._places.get(tensor.data_ptr()) if tensor.numel() else None
        return found if found is not None and found.shape == tuple(tensor.shape) else None

    def stands_in(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is a placeholder, or was computed of one as a view."""
        return tensor.data_ptr() in self._places

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The values of a parameter, read from its file if they lie there."""
        import torch

        place = self.place(tensor)
        return tensor if place is None else torch.from_numpy(place.read())

    @contextmanager
    def filled(self, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """In the block the placeholders among the parameters `tensors` hold their weights."""
        undo = self.fill(tensors)
        try:
            yield
        finally:
            undo()

    @contextmanager
    def streamed(self, model: Any, layers: Iterable[Any]) -> Iterator[None]:
        """In the block the model computes as if it were whole: `layers`, the modules in which most
        of its weights are, have theirs while they run, and the rest of the model all the time."""
        layers = list(layers)
        inner = {id(tensor) for layer in layers for tensor in _tensors(layer)}
        undo: dict[Any, Callable[[], None]] = {}

        def before(layer: Any, _: Any) -> None:
            undo[layer] = self.fill(_tensors(layer))

        def after(layer: Any, *_: Any) -> None:
            undo.pop(layer, lambda: None)()

        with ExitStack() as stack:
            stack.enter_context(
                self.filled(tensor for tensor in _tensors(model) if id(tensor) not in inner)
            )
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(before).remove)
                stack.callback(layer.register_forward_hook(after, always_call=True).remove)
            yield

    def fill(self, tensors: Iterable[torch.Tensor]) -> Callable[[], None]:
        """As `filled`, until the function that is returned is called."""
        import torch

        # Modes in which a model is computed otherwise (`arithmetic`) are not about this.
        with torch._C.DisableTorchFunction():
            held = [(tensor, tensor.data) for tensor in tensors if self.place(tensor) is not None]
            found = {data.data_ptr(): data for _, data in held}
            read = dict(zip(found, parallel.each(self.read, found.values()), strict=True))
            for tensor, data in held:
                tensor.data = read[data.data_ptr()]

        def undo() -> None:
            with torch._C.DisableTorchFunction():
                for tensor, data in held:
                    tensor.data = data

        return undo


class DataFile:
    """A file of weights in float32 beside the graph, written one after the other."""

    def __init__(self, folder: Path, file: BinaryIO) -> None:
        self._folder, self._file = folder, file

    def add(self, values: NDArray[np.float32]) -> Stored:
        """Write a weight; returns its place."""
        self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(values, "<f4").data)
        return Stored(self._folder, DATA_FILE, ir.DataType.FLOAT, values.shape, offset)


@contextmanager
def data_file(folder: Path) -> Iterator[DataFile]:
    """The file `DATA_FILE` of `folder`, made anew."""
    with (folder / DATA_FILE).open("wb") as file:
        yield DataFile(folder, file)


def stored_tensors(folder: Path) -> dict[str, Stored] | None:
    """Places of all tensors in the safetensors files of a model's folder, as transformers finds
    these; None if there are none, or some are of types that a graph cannot refer to."""
    if (folder / _SINGLE).is_file():
        names = [_SINGLE]
    elif (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    else:
        return None
    found: dict[str, Stored] = {}
    for name in names:
        header, begin, stamp = read_safetensors(folder, name)
        for key, entry in header.items():
            dtype = _TYPES.get(entry["dtype"])
            if dtype not in TYPES:
                return None
            start = begin + entry["data_offsets"][0]
            found[key] = Stored(folder, name, dtype, tuple(entry["shape"]), start, stamp)
    return found


def merged_experts(stored: Mapping[str, Stored], kind: str) -> dict[str, Stored | Merged]:
    """`stored`, with one entry for what transformers stacks and joins as it loads models of type
    `kind`: matrices of the experts of a layer."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    found: dict[str, Stored | Merged] = dict(stored)
    for rule in get_checkpoint_conversion_mapping(kind) or ():
        steps = [
            (type(step).__name__, getattr(step, "dim", None))
            for step in getattr(rule, "operations", ())
        ]
        sources, targets = rule.source_patterns, rule.target_patterns
        if steps not in _MERGING or len(targets) > 1 or any(p.count("*") != 1 for p in sources):
            continue
        for prefix, keys in _by_expert(stored, sources).items():
            count, left = divmod(len(keys), len(sources))
            places = [(e, n) for e in range(count) for n in range(len(sources))]
            if left or any(place not in keys for place in places):
                continue
            parts = [stored[keys[place]] for place in places]
            if _alike(parts):
                starts = range(0, len(parts), len(sources))
                its = tuple(tuple(parts[start : start + len(sources)]) for start in starts)
                found[prefix + targets[0]] = Merged(its)
                for key in keys.values():
                    del found[key]
    return found


# What transformers does with matrices of experts that is no more than to put them together.
_STACK, _JOIN = ("MergeModulelist", 0), ("Concatenate", 1)
_MERGING = ([_STACK], [_STACK, _JOIN])


def _by_expert(
    stored: Mapping[str, Stored], sources: Sequence[str]
) -> dict[str, dict[tuple[int, int], str]]:
    """By what stands before one of the patterns `sources`, whose `*` is an expert's number: keys by
    that number and the pattern's."""
    found: dict[str, dict[tuple[int, int], str]] = {}
    for number, pattern in enumerate(sources):
        left, right = map(re.escape, pattern.split("*"))
        for key in stored:
            if match := re.fullmatch(rf"(.*?){left}(\d+){right}", key):
                found.setdefault(match[1], {})[int(match[2]), number] = key
    return found


def _alike(parts: list[Stored]) -> bool:
    """Whether they are matrices of one shape."""
    return len({part.shape for part in parts}) == 1 and len(parts[0].shape) == 2


def read_safetensors(folder: Path, name: str) -> tuple[dict[str, Any], int, Stamp]:
    """The header of a safetensors file that `load` has checked: its tensors' entries, where their
    data begins, and what the file is now."""
    with open_belonging(folder, name, ModelError) as file:
        stamp = Stamp.of(file)
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length, stamp


def checkpoint(weights: Weights, stored: Mapping[str, Stored | Merged]) -> dict[str, torch.Tensor]:
    """What transformers is to load: vectors as they are, placeholders for all else."""
    import torch

    loaded: dict[str, torch.Tensor] = {}
    shared = _equal_tables(stored)
    for key, place in stored.items():
        if len(place.shape) < 2:
            loaded[key] = torch.from_numpy(place.read())
        elif key in shared and shared[key] in loaded:
            loaded[key] = loaded[shared[key]]
        else:
            loaded[key] = weights.placeholder(place)
    return loaded


def moved(weights: Weights, model: Any, file: DataFile) -> None:
    """Let placeholders stand for the weights of a whole model, which are written to `file`."""
    held: dict[int, torch.Tensor] = {}
    for tensor in _tensors(model):
        if tensor.dim() < 2 or not tensor.is_floating_point() or not tensor.numel():
            continue
        key = tensor.data_ptr()
        if key not in held:
            place = file.add(tensor.detach().float().numpy())
            held[key] = weights.placeholder(place)
        tensor.data = held[key]


def refer_to_files(model: ir.Model, weights: Weights) -> None:
    """Let an exported graph read its weights from their files: there are placeholders in it."""
    for value in model.graph.initializers.values():
        raw = getattr(value.const_value, "raw", None)
        if hasattr(raw, "data_ptr") and (place := weights.place(raw)) is not None:
            value.const_value = StoredTensor(place, value.name)


def _equal_tables(stored: Mapping[str, Stored | Merged]) -> dict[str, str]:
    """Keys of weights outside of all layers -> the first one that has the same values: whether an
    LM head is tied to the embedding if both are there, transformers decides by that."""
    tables = [
        key for key, place in stored.items()
        if len(place.shape) == 2 and not any(part.isdigit() for part in key.split("."))
    ]  # fmt: skip
    same: dict[str, str] = {}
    for number, key in enumerate(tables):
        for first in tables[:number]:
            one, other = stored[first], stored[key]
            if first not in same and one.shape == other.shape and _equal(one, other):
                same[key] = first
                break
    return same


def _equal(one: Stored | Merged, other: Stored | Merged) -> bool:
    assert isinstance(one, Stored) and isinstance(other, Stored)  # tables are matrices
    if one.dtype == other.dtype and one.nbytes == 0:
        return True
    return bool(np.array_equal(one.read(), other.read()))


def _tensors(module: Any) -> Iterator[Any]:
    yield from module.parameters()
    yield from module.buffers()
