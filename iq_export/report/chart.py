"""A line chart on a logarithmic axis as an inline SVG string: no scripts, no external files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 720, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 14, 40
_X_LABELS = 16
# Values at or below this are drawn on the lower edge: a logarithm has no zero.
_SMALLEST = 1e-6


@dataclass(frozen=True)
class Series:
    """One line: `values[i]` is the value at block i; the CSS class gives its colour."""

    label: str
    values: Sequence[float]
    css: str


def line_chart(series: Sequence[Series], y_title: str, x_title: str) -> str:
    """An SVG of `series` over their index, the value axis in powers of ten; "" with no values."""
    values = [v for s in series for v in s.values if math.isfinite(v) and v > _SMALLEST]
    if not values:
        return ""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    count = max(len(s.values) for s in series)
    frame = _Frame(low, high, count)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y_title)}">',
        *frame.grid(),
        *(frame.line(s) for s in series),
        *frame.titles(x_title, y_title),
        "</svg>",
        _legend(series),
    ]
    return "\n".join(parts)


@dataclass(frozen=True)
class _Frame:
    """The mapping of (index, value) to SVG coordinates."""

    low: int
    high: int
    count: int

    def x(self, index: int) -> float:
        span = _WIDTH - _LEFT - _RIGHT
        return _LEFT + span * (index / max(self.count - 1, 1))

    def y(self, value: float) -> float:
        exponent = math.log10(max(value, _SMALLEST))
        share = min(max((exponent - self.low) / (self.high - self.low), 0.0), 1.0)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def grid(self) -> list[str]:
        lines = []
        for exponent in range(self.low, self.high + 1):
            y = self.y(10.0**exponent)
            lines.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" '
                         f'y1="{y:.1f}" y2="{y:.1f}"/>')  # fmt: skip
            lines.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" '
                         f'text-anchor="end">{_power(exponent)}</text>')  # fmt: skip
        for index in range(0, self.count, max(1, math.ceil(self.count / _X_LABELS))):
            lines.append(f'<text class="tick" x="{self.x(index):.1f}" y="{_HEIGHT - _BOTTOM + 16}" '
                         f'text-anchor="middle">{index}</text>')  # fmt: skip
        return lines

    def line(self, series: Series) -> str:
        finite = [(i, v) for i, v in enumerate(series.values) if math.isfinite(v)]
        points = " ".join(f"{self.x(i):.1f},{self.y(v):.1f}" for i, v in finite)
        dots = "".join(
            f'<circle class="{series.css}" cx="{self.x(i):.1f}" cy="{self.y(v):.1f}" r="2.5">'
            f"<title>{escape(series.label)}, {i}: {v:.4g}</title></circle>"
            for i, v in finite
        )
        return f'<polyline class="{series.css}" points="{points}"/>{dots}'

    def titles(self, x_title: str, y_title: str) -> list[str]:
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        return [
            f'<text class="tick" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" '
            f'text-anchor="middle">{escape(x_title)}</text>',
            f'<text class="tick" x="14" y="{middle}" text-anchor="middle" '
            f'transform="rotate(-90 14 {middle})">{escape(y_title)}</text>',
        ]


def _power(exponent: int) -> str:
    return f"{10**exponent:g}" if -3 <= exponent <= 5 else f"1e{exponent}"


def _legend(series: Sequence[Series]) -> str:
    items = (f'<span class="key {s.css}"></span>{escape(s.label)}' for s in series)
    return f'<p class="legend">{" &nbsp; ".join(items)}</p>'
