"""Recipes are data: those that ship, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from iq_export import recipe as recipes
from iq_export.errors import UsageError
from iq_export.formats.int4_weights import INT4_WEIGHTS
from iq_export.formats.int8_activations import INT8
from iq_export.formats.int8_cache import INT8_CACHE
from iq_export.formats.int8_weights import INT8_WEIGHTS
from iq_export.recipe import Recipe, load_recipe, recipe_names


def test_w8a8() -> None:
    assert load_recipe("w8a8") == Recipe(
        "w8a8",
        weights=INT8_WEIGHTS,
        activations=INT8,
        cache=None,
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
    largest = recipe.activations.largest if recipe.activations else None
    assert (largest, recipe.simulated) == (most, simulated)


def test_w8a8kv8_differs_in_the_cache_alone() -> None:
    assert replace(load_recipe("w8a8"), name="w8a8kv8", cache=INT8_CACHE) == load_recipe("w8a8kv8")


def test_w4a16() -> None:
    found = load_recipe("w4a16")
    assert (found.weights, found.activations) == (INT4_WEIGHTS, None)
    assert found.sinks == "for-half"


def test_fp16() -> None:
    found = load_recipe("fp16")
    assert found.formats == ()
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
        {"weights": "int3"},
        {"weights": 4},
        {"weights": ["int8"]},
        {"weights": "half"},
        {"activations": "int5"},
        {"activations": "half"},  # whose quantizer would side channels bypass?
        {"cache": "int4"},
        {"head": "int8"},
        {"head": "int3"},
        {"sinks": "sometimes"},
        {"gptq": 1},
        {"smoothing": "yes"},
        {"rotation": 48},
        {"rotation": True},
        {"side_channels": -1},
        {"side_channels": 1.5},
    ],
)
def test_values_out_of_range(change: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="Recipe 'w8a8'"):
        Recipe.from_record(load_recipe("w8a8").record() | change)


def test_file_with_other_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("weights: int8\nweight_bits: 4\n")
    monkeypatch.setattr(recipes, "recipe_folder", lambda: tmp_path)
    with pytest.raises(UsageError, match="and no other"):
        load_recipe("mine")


@pytest.mark.parametrize("name", recipe_names())
def test_record_is_json_that_tells_the_recipe_whole(name: str) -> None:
    recipe = load_recipe(name)
    assert Recipe.from_record(json.loads(json.dumps(recipe.record()))) == recipe


def test_unknown_format_is_refused_with_those_known() -> None:
    record = load_recipe("w8a8").record() | {"weights": "fp3"}
    with pytest.raises(UsageError, match="weights cannot be 'fp3': known formats are half, int4"):
        Recipe.from_record(record)
