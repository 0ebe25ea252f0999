"""Maps of coloured cells as an inline SVG string: no scripts, no external files.

Colours are CSS classes `h0` (low) to `h9`, so that a page chooses them for the screen, for the dark
and for print.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from html import escape

from iq_export.report.findings import large

LEVELS = 10
_CELL = 12
_LEFT, _TOP, _RIGHT = 44, 8, 10
_TICKS = 16  # labels of the vertical axis, at most
_BAR_CELL, _BAR = 26, 52
_SMALLEST = 1e-6


def heatmap(
    rows: Sequence[Sequence[float]],
    columns: Sequence[str],
    title: str,
    axes: tuple[str, str],
    *,
    marked: Collection[int] = (),
    limits: tuple[float, float] | None = None,
    first: int = 0,
) -> str:
    """An SVG of `rows`, the first at the top, numbered from `first`; `columns` are their labels,
    those in `marked` stand out. The colours are logarithmic, from the smallest value to the
    largest, or even between `limits`. `axes`: what columns and rows are."""
    count, width = len(rows), len(columns)
    scale = _Scale.of(rows, limits)
    label = max((len(text) for text in columns), default=1) * 6 + 12
    high = _TOP + count * _CELL + label + _BAR
    wide = max(_LEFT + width * _CELL + _RIGHT, 340)
    cells: list[list[str]] = [[] for _ in range(LEVELS)]
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            at = f"M{_LEFT + x * _CELL} {_TOP + y * _CELL}"
            cells[scale.level(value)].append(f"{at}h{_CELL}v{_CELL}h-{_CELL}z")
    parts = [
        f'<svg class="map" viewBox="0 0 {wide} {high}" style="max-width:{wide * 1.4:.0f}px" '
        f'role="img" aria-label="{escape(title)}">',
        *(f'<path class="h{level}" d="{"".join(paths)}"/>'
          for level, paths in enumerate(cells) if paths),
    ]  # fmt: skip
    for y in range(0, count, max(1, math.ceil(count / _TICKS))):
        parts.append(
            f'<text class="tick" x="{_LEFT - 5}" y="{_TOP + (y + 0.8) * _CELL:.1f}" '
            f'text-anchor="end">{first + y}</text>'
        )
    bottom = _TOP + count * _CELL
    for x, text in enumerate(columns):
        place = f"{_LEFT + (x + 0.8) * _CELL:.1f} {bottom + 6}"
        kind = "tick marked" if x in marked else "tick"
        parts.append(
            f'<text class="{kind}" transform="translate({place}) rotate(-90)" '
            f'text-anchor="end">{escape(text)}</text>'
        )
    middle = _TOP + count * _CELL / 2
    parts.append(
        f'<text class="tick" x="11" y="{middle:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 11 {middle:.0f})">{escape(axes[1])}</text>'
    )
    parts += _bar(scale, high - _BAR + 8, f"{title}; columns: {axes[0]}")
    return "\n".join([*parts, "</svg>"])


def _bar(scale: _Scale, top: int, title: str) -> list[str]:
    """What the colours mean."""
    parts = [
        f'<text class="tick" x="{_LEFT}" y="{top + 4}">{escape(title)}</text>',
    ]
    for level in range(LEVELS):
        x = _LEFT + level * _BAR_CELL
        parts.append(f'<path class="h{level}" d="M{x} {top + 10}h{_BAR_CELL}v10h-{_BAR_CELL}z"/>')
    for share in (0.0, 0.5, 1.0):
        place = _LEFT + share * LEVELS * _BAR_CELL
        anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
        parts.append(
            f'<text class="tick" x="{place:.0f}" y="{top + 33}" text-anchor="{anchor}">'
            f"{large(scale.value(share))}</text>"
        )
    return parts


class _Scale:
    """Values to colours, and back to the values where a share of the colours lies below."""

    def __init__(self, low: float, high: float, *, even: bool) -> None:
        self._even = even
        self._low, self._high = (low, high) if even else (math.log(low), math.log(high))

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]], limits: tuple[float, float] | None) -> _Scale:
        if limits is not None:
            return cls(*limits, even=True)
        found = [v for row in rows for v in row if math.isfinite(v) and v > _SMALLEST]
        low, high = min(found, default=1.0), max(found, default=1.0)
        return cls(low, max(high, low * 1.001), even=False)

    def level(self, value: float) -> int:
        place = value if self._even else math.log(max(value, _SMALLEST))
        share = (place - self._low) / (self._high - self._low)
        return min(max(int(share * LEVELS), 0), LEVELS - 1)

    def value(self, share: float) -> float:
        place = self._low + share * (self._high - self._low)
        return place if self._even else math.exp(place)
