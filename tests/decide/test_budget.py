"""The search for the fewest products to leave in half precision, on losses made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from iq_export.decide.budget import MixedPlan, Site, mixed_plan, smallest_prefix

SITES = [Site(f"t{n}", (f"{n}/q", f"{n}/k", f"{n}/v") if n % 4 == 0 else (f"{n}/x",))
         for n in range(40)]  # fmt: skip
HARM = {site.name: 1e-6 for site in SITES} | {"t3": 0.01, "t17": 0.004, "t8": 0.003, "t30": 0.002}


def search(budget: float, floor: float = 1.0) -> tuple[MixedPlan, list[int]]:
    """Harms add up over a floor that no product explains; also how many sites each trial left."""
    tried: list[int] = []

    def ratio(skipped: Sequence[Site]) -> float:
        tried.append(len(skipped))
        left = {site.name for site in skipped}
        return floor + sum(harm for name, harm in HARM.items() if name not in left)

    return mixed_plan(SITES, lambda: HARM, budget, ratio), tried


@pytest.mark.parametrize(
    ("budget", "left"),
    [(1.05, []), (1.012, ["t3"]), (1.006, ["t3", "t17"]), (1.004, ["t3", "t17", "t30"])],
)
def test_fewest_products_for_a_budget(budget: float, left: list[str]) -> None:
    """A site of three products must do three times the harm to be worth leaving out."""
    found, tried = search(budget)
    assert [site.name for site in found.skipped] == left
    assert found.met and found.ratio <= budget
    assert found.ratio_without == pytest.approx(1.01904, abs=1e-5)
    assert len(tried) < 12


def test_products_of_a_site_go_together() -> None:
    found, _ = search(1.001)
    assert {"8/q", "8/k", "8/v"} <= set(found.linears)
    assert len(found.linears) == 6


def test_needless_sites_are_quantized_again() -> None:
    """Harms that overlap: once the worst is left out, the second does none."""

    def ratio(skipped: Sequence[Site]) -> float:
        left = {site.name for site in skipped}
        return 1.02 - 0.01 * ("t3" in left) - 0.009 * ("t30" in left)

    found = mixed_plan(SITES, lambda: HARM, 1.0015, ratio)
    assert {site.name for site in found.skipped} == {"t3", "t30"}


def test_a_budget_that_cannot_be_met_says_the_best() -> None:
    found, _ = search(1.005, floor=1.03)
    assert not found.met
    assert len(found.skipped) == len(SITES)
    assert found.ratio == pytest.approx(1.03)
    assert "the budget of 1.005 cannot be met" in found.unmet()
    assert "1.0300 x" in found.unmet()


def test_leaving_out_what_does_not_help_leaves_nothing_out() -> None:
    found = mixed_plan(SITES, lambda: HARM, 1.005, lambda skipped: 1.02 + 0.001 * len(skipped))
    assert (found.met, found.skipped, found.ratio) == (False, (), 1.02)
    assert "as it is" in found.unmet()


def test_one_more_is_the_next_of_the_order() -> None:
    found, _ = search(1.006)
    over = found.shipped(1.0065, 0.001)
    more = over.one_more(SITES)
    assert more is not None
    assert [site.name for site in more.skipped] == ["t3", "t17", "t30"]
    within = more.shipped(1.0059, 0.001)
    assert within.met and within.searched == found.ratio
    assert search(1.05)[0].one_more(SITES) is None  # nothing was left out, so no order is known
    assert search(1.005, floor=1.03)[0].one_more(SITES) is None  # everything is


def test_the_shipped_file_has_the_last_word() -> None:
    found, _ = search(1.006)
    assert found.shipped(1.0055, 0.001).met
    over = found.shipped(1.0065, 0.001)
    assert not over.met
    assert "measures 1.0065 x" in over.unmet() and "(standard error 0.0010)" in over.unmet()


@pytest.mark.parametrize(("size", "first"), [(0, None), (1, 1), (7, 3), (100, 64), (9, None)])
def test_smallest_prefix(size: int, first: int | None) -> None:
    tried = []

    def holds(count: int) -> bool:
        tried.append(count)
        return first is not None and count >= first

    assert smallest_prefix(size, holds) == first
    assert len(tried) <= 8


def test_harm_is_not_measured_where_nothing_has_to_be_left_out() -> None:
    def harm() -> dict[str, float]:
        raise AssertionError("minutes for nothing")

    found = mixed_plan(SITES, harm, 1.005, lambda _: 1.004)
    assert (found.met, found.skipped, found.harm) == (True, (), {})
