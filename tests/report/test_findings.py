"""What the numbers of an analysis mean: each limit is said on the right side of it."""

from __future__ import annotations

from typing import Any

import pytest

from iq_export.report.findings import blocks_between, findings

LIFE: dict[str, Any] = {
    "birth": 1, "death": 3, "end": 3, "channel": 7, "replaced": True, "reason": "within",
    "tokens": 20, "at_position_0": 0.5, "common_tokens": [{"token": "", "first": 9, "later": 1}],
    "down_proj_peak": 500.0, "down_proj_median": 0.1, "residual_peak": 1000.0, "threshold": 40.0,
    "sites": [{"block": 1}], "templates": 1, "deviation": 0.02,
}  # fmt: skip
PRODUCT: dict[str, Any] = {
    "block": 2, "place": "mlp out", "lifecycles": [1], "absmax": 500.0, "absmax_without": 5.0,
    "typical": 0.5, "int8_error": 1.0, "int8_error_without": 0.02,
}  # fmt: skip


def said(
    life: dict[str, Any] | None = None,
    product: dict[str, Any] | None = None,
    residual: float = 1000.0,
    score: float = 10.0,
    lives: int = 1,
    everyone: tuple[int, ...] = (),
) -> dict[str, dict[str, str]]:
    """The findings of a model with one lifecycle, by kind."""
    mechanism = {"block": 2, "mass": [0.1, 0.9], "aligned": [1.0, 0.5], "value_ratio": [0.1],
                 "keys_alike": [0.98]}  # fmt: skip
    record = {
        "tokens": 2000, "everyone": everyone, "options": {"max_relative_deviation": 0.1},
        "lifecycles": [{**LIFE, **(life or {})}] * lives,
        "products": [{**PRODUCT, **(product or {})}],
        "per_block": {"residual_max": [5.0, residual], "residual_median": [2.0, 4.0],
                      "down_max": [1.0, 500.0]},
        "attention": [{"lifecycle": 1, "blocks": [mechanism]}] * lives,
        "scores": [{"product": 8 * score, "score": score}],
    }  # fmt: skip
    return {finding["kind"]: finding for finding in findings(record)}


def test_a_spike_that_can_be_replaced() -> None:
    found = said()
    assert list(found) == ["spike", "constancy", "mechanism", "ranges", "half"]
    spike = found["spike"]
    assert (
        "20 of 2,000 tokens (50% of them at position 0; most often a special token)"
        in (spike["text"])
    )
    assert "1,000 there, where the median token has at most 4" in spike["text"]
    assert "at the one input of products" in spike["int8"] and "100.0%" in spike["int8"]
    assert "is 1,000 times a typical value" in spike["fp8"] and "keep their bits" in spike["fp8"]
    assert spike["half"] == "1,000 is 1.5% of half's largest number."
    assert "differ from it by 2.0%" in found["constancy"]["text"]
    assert "a threshold of 40 at the down-projection of block 1" in found["constancy"]["int8"]
    assert "give 50% of their attention" in found["mechanism"]["text"]
    assert "50% of the heads give more than half" in found["mechanism"]["int8"]
    assert "insertion gives them unrounded" in found["mechanism"]["int8"]


@pytest.mark.parametrize(
    ("life", "says"),
    [
        ({"replaced": False, "deviation": 0.2}, "varies too much"),
        ({"replaced": False, "reason": "no threshold finds it"}, "ranges: no threshold finds it."),
    ],
)
def test_one_that_stays(life: dict[str, Any], says: str) -> None:
    found = said(life)
    assert says in found["constancy"]["int8"]
    assert "leaves it in all ranges" in found["constancy"]["int8"]
    assert "and they are rounded" in found["mechanism"]["int8"]


def test_one_that_nobody_takes_out_and_no_norm_reads() -> None:
    found = said({"death": None, "templates": None, "reason": "no norm reads it"})
    assert "no block takes it out" in found["spike"]["text"]
    assert found["constancy"]["text"] == "Lifecycle 1 has no templates: no norm reads it."


@pytest.mark.parametrize(("typical", "says"), [(0.0175, "keep their bits"), (0.0174, "fewer bits")])
def test_the_span_of_e4m3(typical: float, says: str) -> None:
    """448 / 2^-6 is 28,672."""
    assert says in said(product={"typical": typical})["spike"]["fp8"]


@pytest.mark.parametrize(
    ("residual", "score", "says"),
    [
        (65504.0, 10.0, "half precision holds it"),
        (65600.0, 10.0, "gives infinity. The residual stream is"),
        (10.0, 70000.0, "gives infinity. Scores of attention are"),
    ],
)
def test_what_half_holds(residual: float, score: float, says: str) -> None:
    assert says in said(residual=residual, score=score)["half"]["half"]


def test_no_spike() -> None:
    found = said(product={"lifecycles": []}, lives=0, residual=8.0)
    assert list(found) == ["calm", "ranges", "half"]
    assert (
        "The largest residual is 2.5 times that of the median token, at block 0"
        in (found["calm"]["text"])
    )
    assert "without" not in found["ranges"]["int8"]


def test_products_that_only_their_scale_brings_into_half() -> None:
    half = said(score=10_000)["half"]["half"]
    assert half.startswith("Beyond 65,504") and "its power of two to the query" in half
    assert "the largest at 97.7% of it" in said(score=8_000)["half"]["half"]


def test_blocks_in_words() -> None:
    assert [blocks_between(*ends) for ends in ((2, 1), (2, 2), (2, 5))] == [
        "no block", "block 2", "blocks 2 to 5",
    ]  # fmt: skip


def test_where_most_tokens_spike_it_is_not_called_calm() -> None:
    found = said(lives=0, everyone=(2, 4))["calm"]
    assert found["text"].startswith("Most tokens spike at the down-projection of block 2, 4, so")
    assert "Nothing is inserted" in found["int8"]
