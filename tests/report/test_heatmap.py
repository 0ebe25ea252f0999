"""A map's colours: logarithmic from the smallest value to the largest, or even between limits."""

from __future__ import annotations

import re

from iq_export.report.heatmap import LEVELS, heatmap


def levels(picture: str, columns: int, count: int) -> list[list[int]]:
    """Of every cell, the number of its colour."""
    found: dict[tuple[int, int], int] = {}
    for level, path in re.findall(r'<path class="h(\d)" d="([^"]*)"', picture):
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)", path):
            if width == "12":
                found[int(y), int(x)] = int(level)
    cells = [found[place] for place in sorted(found)]
    assert len(cells) == columns * count
    return [cells[row * columns : (row + 1) * columns] for row in range(count)]


def test_colours_are_logarithmic() -> None:
    picture = heatmap([[1, 10, 1e5], [1e10, 0, 2]], ["a", "b", "c"], "t", ("x", "y"))
    assert levels(picture, 3, 2) == [[0, 1, 5], [LEVELS - 1, 0, 0]]
    assert ">100,000<" in picture and ">10,000,000,000<" in picture


def test_or_even_between_limits() -> None:
    picture = heatmap([[0.0, 0.45, 1.0, 2.0]], list("abcd"), "t", ("x", "y"), limits=(0, 1))
    assert levels(picture, 4, 1) == [[0, 4, LEVELS - 1, LEVELS - 1]]


def test_labels_are_escaped_marked_and_numbered() -> None:
    picture = heatmap([[1.0, 2.0]] * 40, ["<s>", "b"], "a & b", ("x", "y"), marked={0}, first=12)
    assert '<text class="tick marked"' in picture and "&lt;s&gt;" in picture
    assert "a &amp; b" in picture and "<s>" not in picture
    rows = [int(row) for row in re.findall(r'x="39" y="[\d.]+" text-anchor="end">(\d+)<', picture)]
    assert rows == list(range(12, 52, 3))


def test_nothing_to_tell_apart() -> None:
    assert levels(heatmap([[0.0, 0.0]], ["a", "b"], "t", ("x", "y")), 2, 1) == [[0, 0]]
    assert levels(heatmap([[3.0, 3.0]], ["a", "b"], "t", ("x", "y")), 2, 1) == [[0, 0]]
