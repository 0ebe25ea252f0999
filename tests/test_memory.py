"""What the machine can hold is at least its memory."""

from __future__ import annotations

from iq_export.memory import memory_and_swap_bytes, memory_bytes


def test_swap_comes_on_top() -> None:
    memory, both = memory_bytes(), memory_and_swap_bytes()
    assert (memory is None) == (both is None)
    assert (both or 0) >= (memory or 0) >= 0
