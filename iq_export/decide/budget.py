"""A mixed plan: the fewest products to leave in half precision for a loss within a budget.

The search is pure; the caller measures. A *site* is one quantized activation with the products that
read it: they are left in half together, since the pair of Q and DQ is theirs in common.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

# The search keeps a tenth of the budget for what it does not see: half precision, other text.
_USED = 0.9


@dataclass(frozen=True)
class Site:
    """One quantized activation: its value name and the products (node names) that read it."""

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class MixedPlan:
    """What is left in half precision, and what that costs.

    `skipped`: sites, the most harmful first; `ratio`: the measured perplexity over the reference's
    with them left out; `ratio_without`: with everything quantized; `met`: ratio within `budget`.
    Both are measured in full precision with every weight rounded, until `shipped` is known; then
    `error` is the standard error of `ratio` over the calibration windows and `searched` what the
    search had measured.
    `harm`: site name -> measured KL to the reference, nats per token, if only it is quantized;
    empty if nothing had to be left out.
    """

    budget: float
    met: bool
    skipped: tuple[Site, ...]
    ratio: float
    ratio_without: float
    harm: Mapping[str, float]
    error: float = 0.0
    searched: float | None = None

    def shipped(self, ratio: float, error: float) -> MixedPlan:
        """The same plan with the ratio of the file that ships."""
        searched = self.ratio if self.searched is None else self.searched
        return replace(self, ratio=ratio, error=error, met=ratio <= self.budget, searched=searched)

    def one_more(self, sites: Sequence[Site]) -> MixedPlan | None:
        """With the next site of the search's order left out too, still to be measured; None if
        nothing was left out, or all is."""
        rest = [site for site in sites if site not in self.skipped] if self.skipped else []
        if not rest:
            return None
        return replace(self, skipped=(*self.skipped, _by_harm(rest, self.harm)[0]))

    def unmet(self) -> str:
        """The sentence for a budget that is not met."""
        left = (
            f"with {len(self.linears)} products in half precision" if self.skipped else "as it is"
        )
        if self.searched is not None and self.searched <= self.budget:
            return (
                f"the file that ships measures {self.ratio:.4f} x the untouched graph's perplexity "
                f"(standard error {self.error:.4f}), {left}: over the budget of {self.budget:g}, "
                f"which the search kept with {self.searched:.4f} x; ask for a smaller budget"
            )
        return (
            f"the budget of {self.budget:g} cannot be met by leaving products in half precision: "
            f"the best measured is {self.ratio:.4f} x the untouched graph's perplexity, {left}"
        )

    @property
    def linears(self) -> list[str]:
        """Node names of all products left in half precision."""
        return [node for site in self.skipped for node in site.linears]


def mixed_plan(
    sites: Sequence[Site],
    measure_harm: Callable[[], Mapping[str, float]],
    budget: float,
    ratio: Callable[[Sequence[Site]], float],
) -> MixedPlan:
    """Leave out the most harmful sites, per product, until the loss is within `budget`.

    `ratio(skipped)` measures the graph with these sites in half precision; `measure_harm()`, which
    takes longest, is asked only if the graph with nothing left out is over the budget. The number
    of sites is found by bisection, then sites that turn out to be needless are quantized again. If
    even nothing quantized is over the budget, the plan says so and leaves out what is better of all
    and nothing.
    """
    target = 1 + _USED * (budget - 1)
    without = ratio(())
    if without <= target:
        return MixedPlan(budget, True, (), without, without, {})
    harm = measure_harm()
    ordered = _by_harm(sites, harm)
    measured: dict[int, float] = {}

    def within(count: int) -> bool:
        measured[count] = ratio(ordered[:count])
        return measured[count] <= target

    count = smallest_prefix(len(ordered), within)
    if count is None:
        reached = measured[len(ordered)]
        if reached > budget and without <= reached:
            return MixedPlan(budget, False, (), without, without, harm)
        return MixedPlan(budget, reached <= budget, tuple(ordered), reached, without, harm)
    skipped, reached = list(ordered[:count]), measured[count]
    for site in sorted(skipped[:-1], key=lambda site: (harm[site.name], -len(site.linears))):
        fewer = [other for other in skipped if other is not site]
        if (found := ratio(fewer)) > target:
            break  # the next ones do more harm
        skipped, reached = fewer, found
    return MixedPlan(budget, True, tuple(skipped), reached, without, harm)


def _by_harm(sites: Sequence[Site], harm: Mapping[str, float]) -> list[Site]:
    """The most harmful per product first."""
    return sorted(sites, key=lambda site: -harm[site.name] / len(site.linears))


def smallest_prefix(size: int, holds: Callable[[int], bool]) -> int | None:
    """The smallest count in 1..size for which `holds(count)`, by bisection; None if not for size.

    Where `holds` is not monotone, a count for which it holds and does not for the one tried below.
    """
    if size < 1 or not holds(size):
        return None
    low, high = 0, size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
