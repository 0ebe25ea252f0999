"""The report: complete input, missing parts, nothing that is not escaped, no external resource."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from iq_export.bundle.manifest import Manifest, record_files
from iq_export.bundle.package import Bundle
from iq_export.errors import BundleError
from iq_export.report.chart import Series, line_chart
from iq_export.report.html import check_report, render, update_with_report, write_report
from tests.tiny_bundle import fill, manifest

_VOID = {"meta", "link", "line", "circle", "polyline", "br"}


class Balance(HTMLParser):
    """Fails if tags do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag


def sample() -> Manifest:
    row = {"graph": "bundle (w8a8)", "bos": True, "perplexity": 18.5, "ratio": 1.03, "tokens": 8,
           "top1_agreement": 0.9, "kl": 0.01, "seconds": 1.0, "error": None}  # fmt: skip
    broken = {**row, "graph": "rtn <w8a8>", "perplexity": None, "error": "NaN in window 0"}
    return manifest(
        name="<tiny>",
        recipe="w8a8",
        dtype="float16",
        opset=23,
        accuracy={"rows": [row, broken], "windows": 2, "length": 5, "text": "a & b"},
        engines={"rtx-ampere": {"bytes": 3_000_000, "form": "body", "plugin_layers": 0}},
        lifecycles=[{"birth": 2, "death": 9, "deviation": 0.0123}],
        timings={"trace": 2.0},
        peak_rss_bytes=1_500_000_000,
        notes=["a <note>"],
    )


PLAN = {
    "observations": {
        "residual_max_per_block": {"before": [1.0, 2e4, 3.0], "after": [1.0, 2.0, 3.0]},
        "down_proj_max_per_block": [0.1, 3000.0, 0.0],
    },
    "quantizers": [
        {"name": f"q{n}", "absmax_before": 100.0 + n, "absmax_after": 1.0, "p999_before": 0.5,
         "p999_after": 0.5, "scale": 0.01}
        for n in range(20)
    ],
}  # fmt: skip


def test_complete_report(tmp_path: Path) -> None:
    page = write_report(sample(), PLAN, tmp_path / "report.html").read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert "&lt;tiny&gt;" in page and "<tiny>" not in page and "<note>" not in page
    assert page.count("<svg") == 2
    assert "8 more" in page
    assert '<tr class="ours"><td>bundle (w8a8)</td>' in page
    assert "NaN in window 0" in page
    assert not re.search(r'(src|href)="(?!data:,")|https?://|<script', page)


def test_only_what_broke_is_said_to_have_broken() -> None:
    calm = render(Manifest("m", "w8a8", "float16", 23), PLAN)
    assert "Largest values by block" in calm and "broke" not in calm
    assert "Why the model broke" in render(sample(), PLAN)


def test_report_of_an_empty_plan() -> None:
    page = render(Manifest("m", "w8a8", "float16", 23), {})
    assert "iq-export eval" in page
    assert "<svg" not in page


def test_a_plan_that_no_report_can_be_made_of_is_refused_early(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "plan.json").write_text('{"quantizers": 3}')
    files = record_files(fill(tmp_path))
    Manifest("m", "w8a8", "float16", 23, files=files).write(tmp_path)
    bundle = Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="records that this version did not write"):
        check_report(bundle)
    with pytest.raises(BundleError, match="records that this version did not write"):
        update_with_report(bundle, notes=["x"])
    assert (tmp_path / "report.html").read_text() == "old"
    assert Bundle.open(tmp_path).manifest.notes == []


def test_chart_is_logarithmic_and_clamps_zero() -> None:
    chart = line_chart([Series("a", [1.0, 100.0, 0.0], "before")], "y", "x")
    heights = [float(y) for y in re.findall(r'cy="([0-9.]+)"', chart)]
    assert heights[1] < heights[0] == heights[2]
    assert line_chart([Series("a", [0.0], "before")], "y", "x") == ""
