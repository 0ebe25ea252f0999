"""Make `libtensorrt_rtx.so` loadable by name inside a running process.

On the first plugin node the TensorRT RTX parser calls `dlopen("libtensorrt_rtx.so")`, while its
wheel ships only `libtensorrt_rtx.so.1`; the process then aborts. The loader matches by SONAME, so
an empty shared library whose SONAME is the missing name, and which needs the real library, settles
it once it is loaded. It is written here byte by byte: no compiler, no change to site-packages and
no environment variable that would have to be set before the process starts.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import tempfile
from pathlib import Path

# ELF e_machine values (ELF specification, and the AArch64 supplement).
_MACHINES = {"x86_64": 62, "aarch64": 183}

_EHDR_SIZE, _PHDR_SIZE, _DYN_SIZE, _SYM_SIZE = 64, 56, 16, 24
_PAGE = 0x10000  # the largest page size of the two machines
_PT_LOAD, _PT_DYNAMIC, _READ_WRITE = 1, 2, 6
_DT_NULL, _DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB = 0, 1, 4, 5, 6
_DT_STRSZ, _DT_SYMENT, _DT_SONAME = 10, 11, 14


def provide_alias(alias: str, library: str) -> None:
    """Let `dlopen(alias)` find the already loaded `library`, both given as SONAMEs.

    Raises OSError where the alias cannot be loaded, and on machines other than x86-64 and aarch64.
    """
    with tempfile.TemporaryDirectory(prefix="iq-alias-") as folder:
        path = Path(folder) / alias
        path.write_bytes(alias_library(alias, library, platform.machine()))
        # RTLD_GLOBAL is not needed: only the name is. The mapping outlives the file.
        ctypes.CDLL(os.fspath(path))


def alias_library(soname: str, needed: str, machine: str) -> bytes:
    """The bytes of an ELF shared library that defines nothing and needs `needed`."""
    if machine not in _MACHINES:
        raise OSError(f"no ELF alias for machine '{machine}'")
    strings = b"\0" + soname.encode() + b"\0" + needed.encode() + b"\0"
    soname_at, needed_at = 1, 2 + len(soname)
    headers_end = _EHDR_SIZE + 2 * _PHDR_SIZE
    symbols_at = headers_end  # one all-zero symbol, as the format demands
    hash_at = symbols_at + _SYM_SIZE
    hash_table = struct.pack("<4I", 1, 1, 0, 0)  # one empty bucket, one chain entry
    dynamic_at = hash_at + len(hash_table)
    tags = 8
    strings_at = dynamic_at + tags * _DYN_SIZE
    size = strings_at + len(strings)
    dynamic = b"".join(
        struct.pack("<QQ", tag, value)
        for tag, value in (
            (_DT_NEEDED, needed_at),
            (_DT_SONAME, soname_at),
            (_DT_HASH, hash_at),
            (_DT_STRTAB, strings_at),
            (_DT_SYMTAB, symbols_at),
            (_DT_STRSZ, len(strings)),
            (_DT_SYMENT, _SYM_SIZE),
            (_DT_NULL, 0),
        )
    )
    ident = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)  # 64 bit, little endian, version 1
    header = ident + struct.pack(
        "<HHIQQQIHHHHHH", 3, _MACHINES[machine], 1, 0, _EHDR_SIZE, 0, 0,
        _EHDR_SIZE, _PHDR_SIZE, 2, 64, 0, 0,
    )  # fmt: skip
    # Read-write: the loader relocates the addresses of the dynamic section in place.
    load = _program_header(_PT_LOAD, _READ_WRITE, 0, size, _PAGE)
    table = _program_header(_PT_DYNAMIC, _READ_WRITE, dynamic_at, tags * _DYN_SIZE, 8)
    return header + load + table + bytes(_SYM_SIZE) + hash_table + dynamic + strings


def _program_header(kind: int, flags: int, at: int, size: int, align: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, flags, at, at, at, size, size, align)
