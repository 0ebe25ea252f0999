"""What a compile needs, from shapes: held against measured runs and against machines."""

from __future__ import annotations

from typing import Any

import pytest

from iq_export import cost
from iq_export.cost import (
    Shape,
    disk_need,
    memory_need,
    memory_note,
    minutes_need,
    require_memory,
)
from iq_export.errors import ModelError
from iq_export.recipe import load_recipe

W8A8, W4A16 = load_recipe("w8a8"), load_recipe("w4a16")
GB = 10**9


def llama(
    hidden: int, features: int, layers: int, vocabulary: int, keys: int, *, tied: bool = False
) -> Shape:
    """`keys`: how many features all keys of a token have."""
    block = hidden * (2 * hidden + 2 * keys + 3 * features)
    widths = (hidden, hidden, hidden, features)
    return Shape(hidden, layers, vocabulary, 1 if tied else 2, block, widths)


LLAMA_2_7B = llama(4096, 11008, 32, 32000, 4096)
LLAMA_3_70B = llama(8192, 28672, 80, 128256, 1024)
QWEN_1_5B = llama(1536, 8960, 28, 151936, 256, tied=True)
SMOLLM2 = llama(576, 1536, 30, 49152, 192, tied=True)


@pytest.mark.parametrize(
    ("shape", "recipe", "tokens", "peak"),
    [
        (llama(512, 1408, 4, 4096, 256), W8A8, 512, 0.85),
        (llama(512, 1408, 4, 4096, 256), W8A8, 16384, 0.87),
        (llama(512, 1408, 4, 64000, 256), W8A8, 512, 1.71),
        (llama(1024, 2816, 4, 4096, 512), W8A8, 512, 1.32),
        (llama(1024, 2816, 4, 4096, 512), W4A16, 512, 0.98),
        (llama(2048, 5504, 2, 32000, 2048), W8A8, 512, 2.47),
        (llama(4096, 11008, 2, 32000, 4096), W8A8, 512, 6.04),
    ],
)
def test_measured_peaks(shape: Shape, recipe: Any, tokens: int, peak: float) -> None:
    """Of the whole process tree, in GB, by `tools/cost.py`."""
    assert 0.7 < memory_need(shape, recipe, tokens=tokens) / (peak * GB) < 1.5


def test_minutes_of_measured_runs() -> None:
    """SmolLM2 at 16 windows of 512 tokens: 210 s, Qwen2.5-Coder-1.5B 1,180 s; a wide one of 16
    blocks, 4 windows of 128: 149 s."""
    assert 3 <= minutes_need(SMOLLM2, W8A8, tokens=8192) <= 6
    assert 14 <= minutes_need(QWEN_1_5B, W8A8, tokens=8192) <= 40
    wide = llama(1024, 2816, 16, 4096, 512)
    assert 2 <= minutes_need(wide, W8A8, tokens=512) <= 4
    assert minutes_need(SMOLLM2, W8A8, tokens=8192, calibrates=False) <= 2


@pytest.mark.parametrize(
    ("shape", "recipe", "machine", "fits"),
    [
        (LLAMA_2_7B, W8A8, 12, True),
        (LLAMA_2_7B, W4A16, 12, True),
        (QWEN_1_5B, W8A8, 6, True),
        (SMOLLM2, W8A8, 2, True),
        (LLAMA_3_70B, W8A8, 8, False),
        (LLAMA_3_70B, W4A16, 8, False),
        (LLAMA_2_7B, W8A8, 3, False),
    ],
)
def test_which_machine_is_let_through(
    monkeypatch: pytest.MonkeyPatch, shape: Shape, recipe: Any, machine: int, fits: bool
) -> None:
    monkeypatch.setattr(cost, "memory_and_swap_bytes", lambda: machine * GB)
    need = memory_need(shape, recipe, tokens=8192)
    if fits:
        require_memory(need, "m")
        return
    with pytest.raises(ModelError) as error:
        require_memory(need, "m")
    assert str(error.value) == (
        f"m needs about {cost.gigabytes(need)} of memory to be compiled, and this machine has "
        f"{machine}.0 GB with its swap: compile on a larger one (the bundle can be moved), or add "
        "swap."
    )


def test_between_both_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "memory_and_swap_bytes", lambda: 6 * GB)
    require_memory(8 * GB, "m")
    assert "6.0 GB of memory with its swap, and about 8.0 GB" in str(memory_note(8 * GB))
    assert memory_note(6 * GB) is None
    monkeypatch.setattr(cost, "memory_and_swap_bytes", lambda: None)
    require_memory(10**30, "m")
    assert memory_note(10**30) is None


def test_depth_takes_little_memory() -> None:
    """But a number of layers that no list holds takes more than there is."""
    twice = llama(4096, 11008, 64, 32000, 4096)
    once = memory_need(LLAMA_2_7B, W8A8, tokens=512)
    assert once < memory_need(twice, W8A8, tokens=512) < 1.1 * once
    assert memory_need(llama(64, 128, 10**12, 50, 64), W8A8, calibrates=False) > 10**18


@pytest.mark.parametrize("recipe", [W8A8, W4A16])
def test_disk_beside_safetensors_is_within_one_and_a_half_copies_in_half(recipe: Any) -> None:
    half = 2 * LLAMA_2_7B.weights
    need = disk_need(LLAMA_2_7B, recipe, "fp16")
    assert half / 2 < need < 1.5 * half
    assert disk_need(LLAMA_2_7B, recipe, "fp16", copied=True) == need + 2 * half
    assert disk_need(LLAMA_2_7B, recipe, "fp16", engines=3) > need


def test_a_model_that_is_loaded_whole_needs_all_its_weights() -> None:
    whole = Shape(**{**vars(LLAMA_2_7B), "whole": True})
    assert memory_need(whole, W8A8) > 4 * whole.weights


def test_shape_of_the_matrices_of_a_file() -> None:
    block = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128), (64,)]
    found = Shape.of_matrices([(512, 64), *block, *block], 2)
    assert found == llama(64, 128, 2, 512, 32, tied=True)
    assert Shape.of_matrices([(512, 64), (64, 512), *block], 1) == llama(64, 128, 1, 512, 32)
    assert Shape.of_matrices([(64,)], 2) is None
    assert Shape.of_matrices(block, 0) is None


def test_sizes_beyond_floats_are_whole_numbers() -> None:
    absurd = llama(10**400, 10**400, 10**400, 10**400, 1)
    with pytest.raises(ModelError, match=r"needs about 1,000,000,000,000 GB of memory"):
        require_memory(memory_need(absurd, W8A8, tokens=512), "m")
    assert minutes_need(absurd, W8A8, tokens=512) > 10**9
    assert disk_need(absurd, W8A8, "fp16") > 10**9
