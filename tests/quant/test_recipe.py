"""Recipes are data: those that ship, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from iq_export.errors import UsageError
from iq_export.quant import recipe as recipes
from iq_export.quant.recipe import Recipe, load_recipe


def test_w8a8() -> None:
    assert load_recipe("w8a8") == Recipe(
        "w8a8",
        weight_bits=8,
        activation_bits=8,
        kv_bits=16,
        smoothing=True,
        rotation=64,
        sinks="always",
        folded_rotation=True,
        side_channels=4,
        gptq=True,
    )


def test_w8a8_norot_has_no_rotation_inside_a_block() -> None:
    changed = replace(load_recipe("w8a8"), name="w8a8-norot", rotation=None, side_channels=128)
    assert changed == load_recipe("w8a8-norot")
    changed = replace(load_recipe("w8a8"), name="w8a8-h512", rotation=512)
    assert changed == load_recipe("w8a8-h512")


@pytest.mark.parametrize(
    ("name", "most", "simulated"),
    [
        ("w8a8", 127, False),
        ("w4a8", 127, True),
        ("w4a16", None, False),
        ("w8a6", 31, True),
        ("w4a4", 7, True),
    ],
)
def test_codes_of_activations(name: str, most: int, simulated: bool) -> None:
    recipe = load_recipe(name)
    assert (recipe.activation_max, recipe.simulated) == (most, simulated)


def test_w8a8kv8_differs_in_the_cache_alone() -> None:
    assert replace(load_recipe("w8a8"), name="w8a8kv8", kv_bits=8) == load_recipe("w8a8kv8")


def test_w4a16() -> None:
    found = load_recipe("w4a16")
    assert (found.weight_bits, found.activation_bits) == (4, 16)
    assert found.sinks == "for-half"


def test_fp16() -> None:
    found = load_recipe("fp16")
    assert (found.weight_bits, found.activation_bits) == (16, 16)
    assert found.sinks == "for-half" and not found.smoothing and found.rotation is None


@pytest.mark.parametrize(("name", "near"), [("w8a", "w8a8"), ("W4A16", "w4a16")])
def test_unknown_name_suggests_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{near}'"):
        load_recipe(name)


def test_unknown_name_lists_all() -> None:
    with pytest.raises(UsageError, match=r"known recipes: .*w4a16, .*w8a8"):
        load_recipe("fp8-dynamic-xyz")


@pytest.mark.parametrize(
    "change",
    [
        {"weight_bits": 3},
        {"weight_bits": 16},
        {"activation_bits": 5},
        {"kv_bits": 4},
        {"sinks": "sometimes"},
    ],
)
def test_values_out_of_range(change: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="Recipe 'w8a8'"):
        replace(load_recipe("w8a8"), **change)


def test_file_with_other_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("weight_bits: 8\nweights: 4\n")
    monkeypatch.setattr(recipes, "recipe_folder", lambda: tmp_path)
    with pytest.raises(UsageError, match="and no other"):
        load_recipe("mine")
