"""What an analysis means, in sentences: each finding has its numbers, and what they mean for INT8,
FP8 and half precision. Everything comes from the record of `iq_export.analyze`, or from what a
bundle keeps of it: without ranges of products and attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iq_export.report.lifecycles import spelled

HALF_MAX = 65504.0
# FP8 E4M3: 448 is its largest number, 2^-6 its smallest normal one; below it bits are lost.
_E4M3_SPAN = 448 / 2**-6
_COMMON_TOKENS = 3
PLACES = {
    "attention in": "what queries, keys and values read",
    "attention out": "what attention's output product reads",
    "mlp in": "what the MLP reads",
    "mlp out": "what the down-projection reads",
}

Record = Mapping[str, Any]


def findings(record: Record) -> list[dict[str, str]]:
    """In reading order: `text` says what was found; `int8`, `fp8` and `half` what it means there,
    empty where it means nothing."""
    found = []
    for number, life in enumerate(record["lifecycles"], start=1):
        found += [_spike(record, number, life), _constancy(record, number, life)]
        found += _mechanism(record, number)
    if not record["lifecycles"]:
        found.append(_calm(record))
    if "products" in record:
        found.append(_ranges(record))
    return [*found, _half(record)]


def _finding(kind: str, text: str, int8: str = "", fp8: str = "", half: str = "") -> dict[str, str]:
    return {"kind": kind, "text": text, "int8": int8, "fp8": fp8, "half": half}


def _spike(record: Record, number: int, life: Record) -> dict[str, str]:
    births = [site["block"] for site in life["sites"]]
    typical = max(record["per_block"]["residual_median"][births[0] : life["end"] + 1])
    ends = (
        f"block {life['death']} takes it out again" if life["death"] is not None
        else "no block takes it out"
    )  # fmt: skip
    text = (
        f"Lifecycle {number}: {life['tokens']:,} of {record['tokens']:,} tokens"
        f" ({life['at_position_0']:.0%} of them at position 0{_common(life)}) leave all others at "
        f"block {' and '.join(map(str, births))}, on residual channel {life['channel']}. The "
        f"residual stream carries up to {large(life['residual_peak'])} there, where the median "
        f"token has at most {large(typical)}; {ends}."
    )
    if "products" not in record:
        return _finding("spike", text, half=_holds(life))
    inside = [p for p in record["products"] if number in p["lifecycles"]]
    if not inside:
        return _finding("spike", text, "It stretches no product's range.", "", _holds(life))
    worst = max(inside, key=_loss)
    int8 = (
        f"It at least doubles the rounding error at {_of(_doubled(inside), len(inside))} of "
        f"products that carry it. Most is lost at {_where(worst)}: a static range with it "
        f"takes {worst['int8_error']:.1%} of a typical value, without it "
        f"{worst['int8_error_without']:.1%}."
    )
    widest = max(inside, key=_span)
    span = _span(widest)
    fits = (
        "so typical values keep their bits" if span <= _E4M3_SPAN
        else "so typical values fall among the numbers that have fewer bits"
    )  # fmt: skip
    fp8 = (
        f"The widest of these ranges, at {_where(widest)}, is {large(span)} times a typical value; "
        f"E4M3 has full precision over {_E4M3_SPAN:,.0f}, {fits}."
    )
    return _finding("spike", text, int8, fp8, _holds(life))


def _constancy(record: Record, number: int, life: Record) -> dict[str, str]:
    limit = record["options"]["max_relative_deviation"]
    if life.get("templates") is None:
        return _finding("constancy", f"Lifecycle {number} has no templates: {life['reason']}.")
    plural = "s" if life["templates"] > 1 else ""
    text = (
        f"Behind the norms, lifecycle {number} is {life['templates']} vector{plural}: held-out "
        f"tokens differ from {'them' if plural else 'it'} by {life['deviation']:.1%} on average "
        f"at the worst norm (limit {limit:.0%})."
    )
    if life["replaced"]:
        int8 = (
            f"It can be clamped away and inserted again behind the norms: a threshold of "
            f"{life['threshold']:.3g} at the down-projection of block {life['birth']} finds it."
        )
    elif life["deviation"] > limit:
        int8 = "It varies too much to be replaced by constants: compile leaves it in all ranges."
    else:
        int8 = f"It is constant, but compile leaves it in all ranges: {life['reason']}."
    return _finding("constancy", text, int8)


def _mechanism(record: Record, number: int) -> list[dict[str, str]]:
    known = record.get("attention", ())
    found = next((a for a in known if a["lifecycle"] == number), None)
    blocks = found["blocks"] if found else []
    if not blocks:
        return []
    mass, aligned, ratio = (
        np.concatenate([block[key] for block in blocks])
        for key in ("mass", "aligned", "value_ratio")
    )
    alike = [block["keys_alike"] for block in blocks if block["keys_alike"] is not None]
    keys = (
        f"their keys have a cosine of {np.median(np.concatenate(alike)):.2f} with each other, "
        if alike else ""
    )  # fmt: skip
    where = blocks_between(blocks[0]["block"], blocks[-1]["block"])
    zones = [block["zones"] for block in blocks if block.get("zones")]
    slow = (
        f" {np.median(np.concatenate(zones)[:, -1]):.0%} of what speaks for a sink comes from the "
        "slowest quarter of the rotary pairs, which a distance hardly turns."
        if zones else ""
    )  # fmt: skip
    text = (
        f"In {where} the other tokens behind a sink of lifecycle {number} give "
        f"{np.median(mass):.0%} of their attention to its sinks (median head; the most is "
        f"{mass.max():.0%}): {keys}{np.median(aligned):.0%} of the queries point their way, and "
        f"their values are {np.median(ratio):.2g} times as long as others'.{slow}"
    )
    life = record["lifecycles"][number - 1]
    share = float((mass > 0.5).mean())
    int8 = (
        f"{share:.0%} of the heads give more than half of their attention to sinks, so an error in "
        "a sink's key or value reaches every token"
        f"{': insertion gives them unrounded' if life['replaced'] else ', and they are rounded'}."
        if share else "No head gives most of its attention to sinks."
    )  # fmt: skip
    return [_finding("mechanism", text, int8)]


def _calm(record: Record) -> dict[str, str]:
    if everyone := record["everyone"]:
        where = ", ".join(map(str, everyone))
        return _finding(
            "calm",
            f"Most tokens spike at the down-projection of block {where}, so none can be told from "
            "the others: there is no lifecycle.",
            "Nothing is inserted, and static ranges there hold these spikes.",
        )
    blocks = record["per_block"]
    ratios = [
        most / max(median, 1e-30)
        for most, median in zip(blocks["residual_max"], blocks["residual_median"], strict=True)
    ]
    block = int(np.argmax(ratios))
    return _finding(
        "calm",
        f"No token spikes among {record['tokens']:,}: in no block does a group of them leave the "
        f"others. The largest residual is {ratios[block]:.1f} times that of the median token, at "
        f"block {block}.",
        "There is nothing to insert: rounding alone decides what int8 loses.",
    )


def _ranges(record: Record) -> dict[str, str]:
    products = record["products"]
    before, after = (_median(products, key) for key in ("int8_error", "int8_error_without"))
    worst = max(products, key=lambda p: p["int8_error_without"])
    count = len(products)
    spiking = sum(bool(p["lifecycles"]) for p in products)
    text = (
        f"{spiking} of {count} inputs of products have a spike. The widest range without "
        f"spikes, for its typical value, is at {_where(worst)}: {large(worst['absmax_without'])} "
        f"against {worst['typical']:.3g}."
    )
    int8 = (
        f"Rounding to a static range takes {before:.1%} of a typical value (median of all inputs)"
    )
    if spiking:
        int8 += (
            f", {after:.1%} without those that spike; at {_doubled(products)} of {count} inputs "
            "it takes twice as much for them"
        )
    most = max(map(_span, products))
    fp8 = (
        f"The widest range of all is {large(most)} times a typical value, of {_E4M3_SPAN:,.0f} that"
        " E4M3 has in full precision; its own error is 2.6 % of any value."
    )
    return _finding("ranges", text, f"{int8}.", fp8)


def _half(record: Record) -> dict[str, str]:
    blocks = record["per_block"]
    residual, down = max(blocks["residual_max"]), max(blocks["down_max"])
    scores = record.get("scores", ())
    product, score = (max((s[key] for s in scores), default=0.0) for key in ("product", "score"))
    text = (
        f"The residual stream reaches {large(residual)}, what down-projections read {large(down)}"
    )
    if scores:
        text += (
            f", and products of a query and a key at most {large(product)}, {large(score)} behind "
            "their scale"
        )
    text += "."
    beyond = [
        sentence
        for value, sentence in (
            (
                residual,
                "The residual stream is: compile takes constant spikes out of it and scales "
                "the rest.",
            ),
            (down, "A down-projection's input is: compile takes out constant spikes."),
            (
                product if score <= HALF_MAX else 0.0,
                "Products of queries and keys are, before their scale: compile applies its power "
                "of two to the query.",
            ),
            (score, "Scores of attention are: compile refuses to make half precision of them."),
        )
        if value > HALF_MAX
    ]
    if beyond:
        half = f"Beyond 65,504 plain half precision gives infinity. {' '.join(beyond)}"
    else:
        share = max(residual, down, product) / HALF_MAX
        part = f"{share:.1%}" if share >= 0.001 else "less than 0.1%"
        half = f"All stay below 65,504, the largest at {part} of it: half precision holds it."
    return _finding("half", text, half=half)


def _holds(life: Record) -> str:
    peak = max(life["residual_peak"], life["down_proj_peak"])
    if peak > HALF_MAX:
        return f"{large(peak)} is beyond half's largest number, 65,504."
    part = f"{peak / HALF_MAX:.1%}" if peak >= 0.001 * HALF_MAX else "less than 0.1%"
    return f"{large(peak)} is {part} of half's largest number."


def blocks_between(first: int, last: int) -> str:
    """The blocks from `first` to `last`, in words."""
    if first > last:
        return "no block"
    return f"block {first}" if first == last else f"blocks {first} to {last}"


def _common(life: Record) -> str:
    tokens = [spelled(entry["token"]) for entry in life["common_tokens"][:_COMMON_TOKENS]]
    return f"; most often {', '.join(tokens)}" if tokens else ""


def _where(product: Record) -> str:
    return f"{PLACES[product['place']]} in block {product['block']}"


def _span(product: Record) -> float:
    return float(product["absmax"] / max(product["typical"], 1e-30))


def _loss(product: Record) -> float:
    return float(product["int8_error"] - product["int8_error_without"])


def _of(some: int, every: int) -> str:
    if some == every:
        return "the one input" if every == 1 else f"all {every} inputs"
    return f"{some or 'none'} of the {every} inputs"


def _doubled(products: Sequence[Record]) -> int:
    return sum(p["int8_error"] >= 2 * p["int8_error_without"] for p in products)


def _median(products: Sequence[Record], key: str) -> float:
    return float(np.median([product[key] for product in products]))


def large(value: float) -> str:
    """A magnitude for people: no digits that nobody reads."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
