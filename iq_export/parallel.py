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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(min(_AT_ONCE, cores or 1)) as pool:
        return list(pool.map(function, items))
