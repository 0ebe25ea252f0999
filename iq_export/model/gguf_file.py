"""The header of a GGUF file: its keys and its tensors' names, without reading weights.

The format is that of ggml's docs/gguf.md. `gguf.GGUFReader` needs a minute for a vocabulary of
262,144 tokens, which is why the header is read here.
"""

from __future__ import annotations

import math
import mmap
import struct
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iq_export.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Value types of a fixed size: (u)int 8 to 64, float 32 and 64, bool.
_FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_F32 = 0
# The keys with an entry per token or merge.
_TOKENS = tuple(f"tokenizer.ggml.{key}" for key in ("tokens", "scores", "token_type", "merges"))
_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place: `shape` in torch's order, `kind` the ggml type, `offset` in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Keys and tensors of one file."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, GgufTensor]
    # Where keys and the list of tensors stand in the file: first byte, and one behind the last.
    spans: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    listed: tuple[int, int] = field(default=(0, 0), repr=False)

    @property
    def architecture(self) -> str:
        """`general.architecture`, the prefix of the keys about the network."""
        return str(self.keys.get("general.architecture", ""))

    def read(self, name: str) -> NDArray[np.float32]:
        """Values of a tensor of any type, dequantized.

        Raises ModelError if it is cut off, NotImplementedError for a type that gguf does not know.
        """
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        tensor = self.tensors[name]
        kind = GGMLQuantizationType(tensor.kind)
        block, width = GGML_QUANT_SIZES[kind]
        rows = (*tensor.shape[:-1], tensor.shape[-1] // block * width)
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            data = np.fromfile(file, np.uint8, math.prod(rows))
        if data.size < math.prod(rows):
            raise ModelError(f"{self.path} is damaged: it ends within the tensor '{name}'.")
        values: NDArray[np.float32] = dequantize(data.reshape(rows), kind)
        return values

    def read_f32(self, name: str) -> NDArray[np.float32]:
        """Values of a float32 tensor. Raises ModelError if it is of another type or cut off."""
        tensor = self.tensors[name]
        count = int(np.prod(tensor.shape))
        if tensor.kind != _F32:
            raise ModelError(f"The tensor '{name}' of {self.path.name} is not float32.")
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            data = file.read(4 * count)
        if len(data) < 4 * count:
            raise ModelError(f"{self.path} is damaged: it ends within the tensor '{name}'.")
        return np.frombuffer(data, "<f4").reshape(tensor.shape)


def read_header(path: Path) -> GgufHeader:
    """Read the header. Raises ModelError if it is none, or damaged."""
    with path.open("rb") as file:
        head = file.read(8)
    if len(head) < 8 or head[:4] != _MAGIC:
        raise ModelError(f"{path} is not a GGUF file, or it is damaged: it has no GGUF header.")
    version = struct.unpack("<I", head[4:])[0]
    if version not in _VERSIONS:
        raise ModelError(f"{path} is GGUF version {version}; versions 2 and 3 can be read.")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        try:
            return _parse(path, data)
        except (struct.error, KeyError, OverflowError, MemoryError) as error:
            raise ModelError(
                f"{path.stem} cannot be loaded from {path}: its GGUF header is damaged or cut off."
            ) from error


@contextmanager
def without_tokens(header: GgufHeader, where: Path) -> Iterator[Path]:
    """A file of the same name in a folder in `where` until the block ends, with the keys and tensor
    names of `header` but no vocabulary, and a hole instead of weights: what `gguf.GGUFReader` reads
    at once."""
    kept = [span for name, span in header.spans.items() if name not in _TOKENS]
    with (
        tempfile.TemporaryDirectory(dir=where, ignore_cleanup_errors=True) as folder,
        header.path.open("rb") as whole,
    ):
        path = Path(folder) / header.path.name
        with path.open("wb") as file:
            file.write(whole.read(8))  # magic and version
            file.write(struct.pack("<QQ", len(header.tensors), len(kept)))
            for begin, end in (*kept, header.listed):
                whole.seek(begin)
                file.write(whole.read(end - begin))
            file.truncate(header.path.stat().st_size)
        yield path


def check_whole(header: GgufHeader) -> None:
    """Raise ModelError if the file ends before the tensors that its header lists."""
    from gguf import GGML_QUANT_SIZES

    sizes = {int(kind): found for kind, found in GGML_QUANT_SIZES.items()}
    there = header.path.stat().st_size
    for name, tensor in header.tensors.items():
        block, width = sizes.get(tensor.kind, (1, 0))
        if tensor.offset + math.prod(tensor.shape) // block * width > there:
            raise ModelError(
                f"{header.path.stem} cannot be loaded from {header.path}: it ends within or before "
                f"the tensor '{name}' (damaged, or not downloaded in full): get it again."
            )


def _parse(path: Path, data: mmap.mmap) -> GgufHeader:
    tensor_count, key_count = struct.unpack_from("<QQ", data, 8)
    position = 24
    keys: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(key_count):
        first = position
        name, position = _name(path, data, position, "the key", keys)
        (kind,) = struct.unpack_from("<I", data, position)
        keys[name], position = _value(data, position + 4, kind)
        spans[name] = first, position
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}
    first = position
    for _ in range(tensor_count):
        name, position = _name(path, data, position, "the tensor", found)
        (rank,) = struct.unpack_from("<I", data, position)
        shape = struct.unpack_from(f"<{rank}Q", data, position + 4)
        kind, offset = struct.unpack_from("<IQ", data, position + 4 + 8 * rank)
        position += 16 + 8 * rank
        found[name] = tuple(reversed(shape)), kind, offset
    alignment = keys.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise struct.error("no alignment")
    begin = -(-position // alignment) * alignment
    tensors = {n: GgufTensor(s, k, begin + o) for n, (s, k, o) in found.items()}
    return GgufHeader(path, keys, tensors, spans, (first, position))


def _name(
    path: Path, data: mmap.mmap, position: int, what: str, known: Container[str]
) -> tuple[str, int]:
    """Of a key or tensor. Raises ModelError for one that is there already, or is no UTF-8."""
    name, position = _string(data, position)
    if name in known:
        raise ModelError(f"{path} is damaged: {what} {name!r} stands in it twice.")
    if not name.isprintable():  # escaped bytes are not
        raise ModelError(f"{path} is damaged: {what} {name!r} is no text.")
    return name, position


def _value(data: mmap.mmap, position: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _string(data, position)
    if kind != _ARRAY:
        form = f"<{_FORMATS[kind]}"
        return struct.unpack_from(form, data, position)[0], position + struct.calcsize(form)
    kind, count = struct.unpack_from("<IQ", data, position)
    position += 12
    if count > len(data) or kind == _ARRAY:
        raise struct.error("an array longer than the file, or within another")
    if kind in _FORMATS:
        form = f"<{count}{_FORMATS[kind]}"
        return list(struct.unpack_from(form, data, position)), position + struct.calcsize(form)
    values = []
    for _ in range(count):
        value, position = _value(data, position, kind)
        values.append(value)
    return values, position


def _string(data: mmap.mmap, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, position)
    end = position + 8 + length
    if end > len(data):
        raise struct.error("a string longer than the file")
    # Tokens of some vocabularies are cut within a character.
    return data[position + 8 : end].decode("utf-8", errors="surrogateescape"), end
