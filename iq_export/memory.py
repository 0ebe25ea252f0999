"""How much memory this machine has."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or none to ask
        return None


def give_back() -> None:
    """Give freed memory back to the system, where the C library keeps it otherwise: what one
    session of ONNX Runtime has freed is in too small pieces for the next one."""
    trim = _trim()
    if trim is not None:
        trim(0)


def memory_bytes() -> int | None:
    """Physical memory; None where the system does not tell (Windows)."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_and_swap_bytes() -> int | None:
    """What processes can hold at most; where the system does not tell its swap (macOS), without."""
    memory = memory_bytes()
    if memory is None:
        return None
    found = Path("/proc/meminfo")
    lines = found.read_text().splitlines() if found.is_file() else []
    swap = next((line.split()[1] for line in lines if line.startswith("SwapTotal:")), "0")
    return memory + 1024 * int(swap)
