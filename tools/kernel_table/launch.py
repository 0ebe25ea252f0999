"""The arguments of a kernel as its thread finds them: constant bank 0 and the memory behind it.

Names and layout of the arguments are read from the plugin's sources, values go by name.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from iq_export.errors import DataError
from tools.kernel_table.machine import Memory

# Bytes of a scalar, and how struct packs it.
_SCALARS = {
    "int64_t": "<q", "uint64_t": "<Q", "size_t": "<Q", "int32_t": "<i", "int": "<i",
    "uint32_t": "<I", "unsigned": "<I", "float": "<f", "double": "<d", "int16_t": "<h",
    "uint16_t": "<H", "int8_t": "<b", "uint8_t": "<B", "bool": "<?",
}  # fmt: skip
_POINTER = "*"
_QUALIFIERS = ("const", "__restrict__", "__grid_constant__")
# Where bank 0 holds blockDim and gridDim, and where the arguments begin, by architecture.
_BLOCK, _GRID = 0x0, 0xC
_ARGUMENTS = ((100, 0x380), (90, 0x210), (70, 0x160))
_SPAN = 1 << 32  # of addresses, for each pointer


@dataclass(frozen=True)
class Argument:
    """A scalar or pointer (`kind` is "*") that lies at `offset` of the arguments."""

    name: str
    kind: str
    offset: int


def arguments(plugins: Path, kernel: str) -> list[Argument]:
    """The flattened arguments of `kernel` of src/kernels.cu. Raises DataError where one is neither
    a pointer, a scalar nor a plain struct of them."""
    sources = [plugins / "src" / "kernels.cu", *sorted((plugins / "include/iq").glob("*.*h"))]
    text = "\n".join(re.sub(r"//.*", "", path.read_text(encoding="utf-8")) for path in sources)
    found = re.search(rf"__global__[^;{{]*?\b{kernel}\s*\(([^)]*)\)\s*\{{", text)
    if found is None:
        raise DataError(f"'{plugins}' has no kernel '{kernel}'.")
    structs = dict(re.findall(r"\bstruct\s+(\w+)\s*\{([^{}()]*)\}\s*;", text))
    return _layout(found[1].split(","), structs)[0]


def _layout(declarations: list[str], structs: Mapping[str, str]) -> tuple[list[Argument], int, int]:
    """The members one after the other, and size and alignment of them all."""
    flat: list[Argument] = []
    at, widest = 0, 1
    for declaration in filter(None, map(str.strip, declarations)):
        *words, name = declaration.replace("*", " * ").split()
        kind = [word for word in words if word not in _QUALIFIERS][-1].removeprefix("iq::")
        if kind in structs:
            inner, size, alignment = _layout(structs[kind].split(";"), structs)
        elif kind == _POINTER or kind in _SCALARS:
            inner = [Argument(name, kind, 0)]
            size = alignment = 8 if kind == _POINTER else struct.calcsize(_SCALARS[kind])
        else:
            raise DataError(f"tools/kernel_table/launch.py does not know the type '{declaration}'.")
        at = -(-at // alignment) * alignment
        flat += [replace(argument, offset=at + argument.offset) for argument in inner]
        at += size
        widest = max(widest, alignment)
    return flat, -(-at // widest) * widest, widest


def launch(
    given: list[Argument],
    values: Mapping[str, float | bytes | None],
    architecture: int,
    threads: int,
) -> tuple[bytes, Memory, dict[str, int]]:
    """Constant bank 0, the memory, and where each pointer points, for one block of `threads`.

    A number is a scalar's value; bytes are what the memory behind a pointer is filled with, None is
    a null pointer. Raises DataError for an argument without a value.
    """
    begin = next(offset for least, offset in _ARGUMENTS if architecture >= least)
    bank = bytearray(begin + 4096)
    struct.pack_into("<3I", bank, _BLOCK, threads, 1, 1)
    struct.pack_into("<3I", bank, _GRID, 1, 1, 1)
    regions: dict[range, bytes] = {}
    pointers: dict[str, int] = {}
    for number, argument in enumerate(given, 1):
        if argument.name not in values:
            raise DataError(
                f"the argument '{argument.name}' has no value in tools/kernel_table/rows.py."
            )
        value, at = values[argument.name], begin + argument.offset
        if argument.kind != _POINTER:
            assert isinstance(value, int | float), argument
            struct.pack_into(_SCALARS[argument.kind], bank, at, value)
        elif value is not None:
            assert isinstance(value, bytes), argument
            address = pointers[argument.name] = number * _SPAN
            regions[range(address, address + _SPAN)] = value
            struct.pack_into("<Q", bank, at, address)
    return bytes(bank), Memory(regions), pointers
