"""inspect prints the manifest for people and for programs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from iq_export.bundle.manifest import GraphInfo, Manifest, TensorInfo
from iq_export.bundle.package import Bundle, update_manifest
from iq_export.cli import main
from iq_export.cli.inspect import describe
from tests.tiny_bundle import engine_record


def test_sections_for_people(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle)]) == 0
    text = capsys.readouterr().out
    for expected in (
        "tiny: w8a8, float16, opset 23",
        "1. blocks 11 to 29",
        "not measured yet: iq-export eval",
        "rtx-ampere  2.5 MB  tensorrt_rtx 1.7.1.116  86",
        "rtx-ampere: no plugin: nvcc was not found.",
        "past_key_values.0.key",
        "(2 cache tensors in all)",
        "peak memory 3.2 GB",
        "one note",
    ):
        assert expected in text
    assert "past_key_values.1.key" not in text


def test_several_graphs_are_shown_each(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    vision = GraphInfo("vision", inputs=[TensorInfo("pixel_values", "float16", ["batch", 3, 8])])
    text = describe(replace(manifest, graphs=[manifest.graph, vision]))
    for expected in (
        "sink lifecycles of model:\n  1. blocks 11 to 29",
        "sink lifecycles of vision:\n  none found",
        "engines of model:\n  target",
        "engines of vision:\n  none",
        "inputs and outputs of vision:\n  in  pixel_values  float16  [batch, 3, 8]",
    ):
        assert expected in text


def test_json(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "w8a8"


def test_bare_manifest_and_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no spikes" in describe(Manifest("m", "w8a8", "float16", 23))
    assert main(["inspect", str(tmp_path)]) == 7
    assert "not a bundle" in capsys.readouterr().err


def test_mixed_plan() -> None:
    record = {
        "budget": 1.005, "met": True, "ratio": 1.0043, "ratio_standard_error": 0.0019,
        "ratio_all_quantized": 1.0121,
        "products": 210, "share_in_half": 2 / 210,
        "in_half": [{"tensor": "t", "products": ["layers.3/down", "layers.3/up"], "harm": 0.0031}],
    }  # fmt: skip
    text = describe(Manifest("m", "w8a8", "fp16", 23, mixed=record))
    assert (
        "budget 1.005 x fp32 on the calibration text, met: 1.0043 x +- 0.0019 (1.0121 x with"
        in text
    )
    assert "2 of 210 products in half precision (1.0%):" in text
    assert "layers.3/down, layers.3/up  KL 0.0031 nats" in text
    assert "NOT met" in describe(Manifest("m", "w8a8", "fp16", 23, mixed={**record, "met": False}))
    assert "mixed plan" not in describe(Manifest("m", "w8a8", "fp16", 23))


def test_what_a_manifest_says_is_shown_and_not_obeyed(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of whatever field, and no value looks like a line of ours."""
    evil = "\x1b]0;owned\x07\x9b2J\u202e\r\nengines:\tfine"
    written = r"\x1b]0;owned\x07\x9b2J\u202e\x0d\x0aengines:\x09fine"
    manifest = Bundle.open(bundle).manifest
    update_manifest(
        Bundle.open(bundle), name=evil, recipe=evil, dtype=evil, notes=[evil], targets=[evil],
        source={evil: evil}, timings={evil: 1.0},
        accuracy={"text": evil, "windows": 1, "length": 1, "rows": []},
        graphs=[GraphInfo(
            engine_failures={evil: evil},
            lifecycles=[{"birth": 1, "death": 2, "tokens": [evil]}],
            engines={evil: engine_record(form_reason=evil, plan="none.plan")},
            inputs=[TensorInfo(evil, "int64", [evil])],
        )],
    )  # fmt: skip
    assert main(["inspect", str(bundle)]) == 0
    text = capsys.readouterr().out
    assert text.count(written) >= 12 and text.count("\nengines:\n") == 1
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert main(["inspect", str(bundle), "--json"]) == 0
    text = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert json.loads(text)["name"] == evil != manifest.name
