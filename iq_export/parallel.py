"""Work on large arrays, several at a time: NumPy and torch let go of the interpreter in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Each holds temporaries as large as its array.
_AT_ONCE = 4


def each(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`function` of every item, in order; raises what the first that fails does."""
    with ThreadPoolExecutor(min(_AT_ONCE, cores())) as pool:
        return list(pool.map(function, items))


def cores() -> int:
    """How many this process may use: it may be bound to some (taskset, a container)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
