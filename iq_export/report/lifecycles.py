"""A sink lifecycle of `plan.json` in words, for the terminal and the report alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COMMON_TOKENS = 4


def describe_lifecycle(record: Mapping[str, Any]) -> list[str]:
    """Where it lives, what became of it and why, and how it looks: one string per line.

    `record` is an entry of a manifest's `lifecycles`; parts that it lacks are left out.
    """
    lines = [_place(record), _fate(record), _insertion(record), _matching(record)]
    lines += [_peaks(record), _tokens(record)]
    return [line for line in lines if line]


def _place(record: Mapping[str, Any]) -> str:
    births = [site["block"] for site in record.get("sites") or []] or [record.get("birth", "?")]
    text = f"blocks {' and '.join(map(str, births))} to {record.get('death', '?')}"
    if "channel" in record:
        text += f", residual channel {record['channel']}"
    if "tokens" in record:
        text += f", {record['tokens']} tokens seen"
    if record.get("at_position_0") is not None:
        text += f", {record['at_position_0']:.0%} of them at position 0"
    return text


def _fate(record: Mapping[str, Any]) -> str:
    reason = str(record.get("reason") or "")
    if not record.get("replaced", True):
        return f"left as it is: {reason}".rstrip(": ")
    parts = ["replaced"]
    if "templates" in record:
        parts[0] += f" by {record['templates']} templates"
    if record.get("deviation") is not None:
        parts.append(f"mean relative deviation {record['deviation']:.2%}")
    if len(sites := record.get("sites") or []) > 1:
        where = " and ".join(f"{s['threshold']:.4g} at block {s['block']}" for s in sites)
        parts.append(f"thresholds {where}")
    elif record.get("threshold") is not None:
        parts.append(f"threshold {record['threshold']:.4g}")
    return ", ".join(parts)


def _matching(record: Mapping[str, Any]) -> str:
    """What held-out text says, and how often the paper's order of appearance would differ."""
    held = record.get("held_out")
    if not held:
        return ""
    parts = [f"on {held['tokens']} held-out tokens {held['both']} of {held['sinks']} sinks found"]
    parts[0] += ", position 0 aside" if record.get("position_0_forced") else ""
    parts.append(f"{held['detected'] - held['both']} others taken for sinks")
    if held.get("agreement") is not None:
        parts.append(f"{held['agreement']:.0%} matched to the nearest template")
    order = record.get("order_of_appearance") or {}
    windows = held.get("order_windows", 0) + order.get("windows", 0)
    if windows:
        differs = held.get("order_differs", 0) + order.get("differs", 0)
        parts.append(f"order of appearance would differ in {differs} of {windows} windows")
    return "; ".join(parts)


def _insertion(record: Mapping[str, Any]) -> str:
    how = record.get("insertion")
    return f"inserted in the {how['form']} form: {how['reason']}" if how else ""


def _peaks(record: Mapping[str, Any]) -> str:
    parts = []
    if record.get("down_proj_peak") is not None:
        text = f"down-projection input up to {record['down_proj_peak']:.4g}"
        if record.get("down_proj_median") is not None:
            text += f" (median {record['down_proj_median']:.2g})"
        parts.append(text)
    if record.get("residual_peak") is not None:
        parts.append(f"residual up to {record['residual_peak']:.5g}")
    return ", ".join(parts)


def _tokens(record: Mapping[str, Any]) -> str:
    common = record.get("common_tokens") or []
    shown = ", ".join(
        f"{spelled(entry['token'])} ({entry['first']} first, {entry['later']} later)"
        for entry in common[:_COMMON_TOKENS]
    )
    return f"most often {shown}" if shown else ""


def spelled(token: str) -> str:
    """A token's text for people: BOS and its kin decode to nothing."""
    return repr(token) if token else "a special token"
