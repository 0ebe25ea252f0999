"""The table for people, and the lines that say what came out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

FLOAT = "fp16"
INSERTION_SHARE = 1.01  # bar: prefill with sink ops against without
_MODES = ("stream", "cuda graph")

Steps = Mapping[str, Mapping[str, Any]]


def verdict(steps: Steps) -> list[str]:
    """What failed, where int8 loses to half precision, and what the sink ops cost; the last line
    begins with VERDICT."""
    lines = [f"{name} failed: {step['reason']}" for name, step in steps.items()
             if step["status"] == "failed"]  # fmt: skip
    cost, missed = _sink_cost(steps)
    lines.append(cost)
    failed = len(lines) - 1 + missed
    skipped = sum(step["status"] == "skipped" for step in steps.values())
    summary = f"{failed} failed or over a bar, {skipped} skipped, of {len(steps)} steps"
    return [*lines, f"VERDICT: {summary}; {int8_sentence(steps)}"]


def int8_sentence(steps: Steps) -> str:
    """On which shapes int8 is slower than half precision."""
    slower, measured = [], 0
    for case, mode, ratios in _ratios(steps):
        for pair, ratio in ratios.items():
            name, _, base = pair.partition(" / ")
            if base != FLOAT or name.endswith("-bare"):
                continue
            measured += 1
            if ratio["median"] > 1:
                slower.append(f"{case} ({name}, {mode}): {ratio['median']:.2f} x")
    if not measured:
        return "INT8 against fp16: not measured"
    if slower:
        return f"INT8 is SLOWER than fp16 on {', '.join(slower)}"
    return f"INT8 is faster than fp16 in all {measured} cases"


def _sink_cost(steps: Steps) -> tuple[str, bool]:
    """What the sink ops add to a prefill, and whether the plugin's exceed the bar."""
    found, missed = [], False
    for case, mode, ratios in _ratios(steps):
        for pair, ratio in ratios.items():
            name, _, base = pair.partition(" / ")
            if case.startswith("prefill") and base == f"{name}-bare":
                found.append(f"{case} ({name}, {mode}): {ratio['median'] - 1:+.1%}")
                missed |= name.endswith("-plugin") and ratio["median"] > INSERTION_SHARE
    text = ", ".join(found) or "not measured"
    return f"sink ops cost (bar: 1 % with the plugin): {text}", missed


def _ratios(steps: Steps) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for name, step in steps.items():
        if not name.startswith("latency") or not step["result"]:
            continue
        for case, modes in step["result"]["cases"].items():
            for mode in _MODES:
                if "ratios" in modes.get(mode, {}):
                    yield case, mode, modes[mode]["ratios"]


def markdown(data: Mapping[str, Any]) -> str:
    """All steps; then kernels, engines and latencies that there are."""
    steps: Steps = data["steps"]
    device = (steps.get("device", {}) or {}).get("result") or {}
    head = (
        f"# {device.get('name', 'unknown GPU')}, sm {device.get('compute_capability', '?')}, "
        f"{device.get('tensorrt', 'no TensorRT')}, torch {device.get('torch', '?')}"
    )
    rows = [[n, s["status"], f"{s['seconds']:.0f} s", s["reason"]] for n, s in steps.items()]
    parts = [head, _table(["step", "outcome", "time", "reason"], rows)]
    parts += [part for part in (_bandwidth(steps), _engines(steps), _latency(steps)) if part]
    return "\n\n".join(parts)


def _bandwidth(steps: Steps) -> str:
    result = steps.get("bandwidth", {}).get("result")
    if not result:
        return ""
    rows = [
        [
            name, f"{k['bytes'] / 1e6:.0f} MB", f"{k['seconds']['median'] * 1e6:.1f} us",
            f"{k['bytes_per_second'] / 1e9:.0f} GB/s", f"{k['of_copy']['median']:.0%}",
        ]
        for name, k in result["kernels"].items()
    ]  # fmt: skip
    insertion = f"insertion against none: {result['insertion']['median']:.3f} x"
    return f"{_table(['kernel', 'bytes', 'time', 'bandwidth', 'of copy'], rows)}\n\n{insertion}"


def _engines(steps: Steps) -> str:
    rows = []
    for name, step in steps.items():
        result = step["result"]
        if not result or "logits" not in result:
            continue
        far = result["logits"]
        products = result.get("products", {})
        kernels = result.get("kernels", {})
        rows.append([
            name, f"{far['top1']:.1%}", f"{far['max_abs']:.3f}", f"{far['kl']:.1e}",
            f"{products.get('int8', '-')} of {products.get('of', '-')}, "
            f"{products.get('not named', '-')} not named",
            f"{kernels.get('int8_by_name', '-')} of {kernels.get('all', '-')}",
        ])  # fmt: skip
    header = ["engine", "same top token", "largest difference", "KL", "products in int8",
              "kernels int8 by name"]  # fmt: skip
    return _table(header, rows) if rows else ""


def _latency(steps: Steps) -> str:
    rows = []
    for name, step in steps.items():
        if not name.startswith("latency") or not step["result"]:
            continue
        for case, modes in step["result"]["cases"].items():
            if "skipped" in modes:
                rows.append([case, "skipped", modes["skipped"], "", ""])
            for mode in _MODES:
                rows += _latency_rows(case, mode, modes.get(mode, {}))
    return _table(["case", "mode", "engine", "median (quartiles)", "x first"], rows) if rows else ""


def _latency_rows(case: str, mode: str, found: Mapping[str, Any]) -> list[list[str]]:
    if "skipped" in found:
        return [[case, mode, f"skipped: {found['skipped']}", "", ""]]
    rows = []
    for name, time in found.get("milliseconds", {}).items():
        ratio = next((r for p, r in found["ratios"].items() if p == f"{name} / {FLOAT}"), None)
        spread = f"{time['median']:.3f} ms ({time['q1']:.3f} - {time['q3']:.3f})"
        rows.append([case, mode, name, spread, f"{ratio['median']:.3f}" if ratio else ""])
    return rows


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)
