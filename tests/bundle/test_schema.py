"""manifest.schema.json: what our own check knows of it, and what no reader falls over."""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from iq_export.bundle import schema
from iq_export.bundle.manifest import MANIFEST_NAME, GraphInfo, Manifest, reading_records
from iq_export.bundle.package import Bundle
from iq_export.bundle.triton import write_repository
from iq_export.cli import inspect
from iq_export.errors import IqError
from iq_export.report.html import check_report
from tests.bundle import corpus
from tests.runtime.conftest import ORIN, RTX, write_bundle

ROOT = Path(__file__).parents[2]
ROW = {"graph": "bundle", "bos": True, "perplexity": 18.5, "ratio": 1.03, "tokens": 8,
       "top1_agreement": 0.9, "kl": 0.01, "seconds": 1.0, "error": None}  # fmt: skip
# What `inspect` and a report read of a manifest and a plan, inside what the schema leaves open.
MEASURED: dict[str, Any] = {
    "accuracy": {"rows": [ROW, {**ROW, "error": "NaN"}], "windows": 2, "length": 5, "text": "a"},
    "speed": {"graph": "g", "reference": "fp32", "length": 5, "seconds": {"g": 1.0}, "ratio": 1.0,
              "providers": ["CPU"]},
    "mixed": {
        "budget": 1.005, "met": True, "ratio": 1.0043, "ratio_standard_error": 0.0019,
        "ratio_all_quantized": 1.0121, "products": 210, "share_in_half": 0.01,
        "in_half": [{"tensor": "t", "products": ["layers.3/down"], "harm": 0.0031}],
    },
    "check": {"tokens": 5, "top1": 0.9, "kl": 0.01},
    "lifecycles": [{"birth": 2, "death": 9, "deviation": 0.0123, "replaced": True}],
}  # fmt: skip
PLAN = {
    "lifecycles": MEASURED["lifecycles"],
    "observations": {"residual_max_per_block": {"before": [1.0, 2e4], "after": [1.0, 2.0]},
                     "down_proj_max_per_block": [0.1, 3000.0, 0.0]},
    "quantizers": [{"name": "q", "absmax_before": 100.0, "absmax_after": 1.0, "p999_before": 0.5,
                    "p999_after": 0.5, "scale": 0.01}],
}  # fmt: skip

KNOWN = {
    "$ref", "type", "const", "enum", "maxLength", "pattern", "minimum", "maximum", "items",
    "minItems", "maxItems",
    "required", "properties", "additionalProperties", "propertyNames",
}  # fmt: skip
COMMENTS = {"$schema", "$defs", "title", "description"}


def parts(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every schema in a schema."""
    yield part
    inner = [*part.get("properties", {}).values(), *part.get("$defs", {}).values()]
    inner += [part[k] for k in ("items", "additionalProperties", "propertyNames") if k in part]
    for one in inner:
        if isinstance(one, dict):
            yield from parts(one)


def test_both_readers_know_every_keyword() -> None:
    """And what they take for granted: references name $defs, patterns are whole, bounds are two."""
    whole = schema.manifest_schema()
    for part in parts(whole):
        assert part.keys() <= KNOWN | COMMENTS
        if "$ref" in part:
            assert part.keys() <= {"$ref"}
            assert part["$ref"].removeprefix("#/$defs/") in whole["$defs"]
        if "pattern" in part:
            assert part["pattern"].startswith("^") and part["pattern"].endswith(r"$(?!\n)")
            assert part["maxLength"] <= 1024 and part["title"] and part in whole["$defs"].values()
        if "integer" in part.get("type", ()) and "const" not in part:
            assert -(2**63) <= part["minimum"] <= part["maximum"] < 2**63
        assert ("minimum" in part) == ("maximum" in part)
        assert ("minItems" in part) == ("maxItems" in part)
        assert part.get("additionalProperties") is not True


def test_it_names_every_field_of_a_manifest() -> None:
    whole = schema.manifest_schema()
    assert {f.name for f in fields(Manifest)} == whole["properties"].keys()
    assert {f.name for f in fields(GraphInfo)} == whole["$defs"]["graph"]["properties"].keys()


def test_it_is_what_a_validator_of_json_schema_says(tmp_path: Path) -> None:
    """Our own check of the same file is one for light installs, no second specification."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    whole = schema.manifest_schema()
    jsonschema.Draft202012Validator.check_schema(whole)
    validator = jsonschema.Draft202012Validator(whole)
    original = write_bundle(tmp_path / "bundle", ORIN, RTX)
    compared = refused = 0
    forged = corpus.make(original, tmp_path / "forged")
    for name, folder in itertools.islice(forged, 0, None, 2):
        path = folder / MANIFEST_NAME
        try:
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
            value = schema.parse(text)
        except ValueError:
            continue
        for holder, key in places([value]):
            if isinstance(holder[key], float):
                holder[key] = 0.5  # JSON Schema calls 1.0 an integer
        try:
            schema.check(value, whole)
            fits = True
        except ValueError:
            fits = False
        assert fits == validator.is_valid(value), name
        compared, refused = compared + 1, refused + (not fits)
    assert compared > 150 and refused > 50


def test_no_reader_falls_over_a_forged_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each forged bundle is a sentence or a result, and no control character is printed raw."""
    original = write_bundle(tmp_path / "bundle", ORIN, RTX, **MEASURED)
    forged = itertools.islice(corpus.make(original, tmp_path / "forged"), 0, None, 3)
    for number, (name, folder) in enumerate(forged):
        inspected(folder, capsys)
        try:
            bundle = Bundle.open(folder)
        except IqError as error:
            assert str(folder) in str(error), name
            continue
        if number % 8 == 0:
            with contextlib.suppress(IqError):
                write_repository(bundle, tmp_path / "repo" / str(number))


def test_what_the_schema_leaves_open_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every value inside the records of measurements, replaced by others."""
    folder = write_bundle(tmp_path / "bundle", **MEASURED)
    manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    assert "18.5" in inspected(folder, capsys)
    (graph,) = manifest["graphs"]
    assert MEASURED.keys() <= {*manifest, *graph}
    found = {name: manifest.get(name, graph.get(name)) for name in MEASURED}
    for holder, key in places(found):
        kept = holder[key]
        for value in corpus.VALUES[::8]:
            holder[key] = value
            corpus.seal(folder, corpus.dump(manifest))
            inspected(folder, capsys)
        holder[key] = kept


def inspected(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `inspect` prints; a refusal names the folder."""
    for as_json in (True, False):
        try:
            inspect.run(argparse.Namespace(bundle=folder, json=as_json))
        except IqError as error:
            assert str(folder) in str(error)
    said = capsys.readouterr().out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said)
    return said


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value, as what holds it and its key."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, member in list(pairs):
        yield value, key
        if isinstance(member, (dict, list)):
            yield from places(member)


PLANS = [
    "", "x", "3", "null", "[" * 100_000,
    '{"a":' * 70 + "1" + "}" * 70, '{"a": NaN}', '{"a": 1e999}',
    '{"a": %s}' % ("9" * 5000), '{"a": 1, "a": 1}', '{"a": "\\ud800"}', "\ufeff{}", "{}\0", "[]",
]  # fmt: skip


@pytest.mark.parametrize("text", PLANS, ids=range(len(PLANS)))
def test_a_plan_is_read_as_strictly(tmp_path: Path, text: str) -> None:
    folder = write_bundle(tmp_path / "bundle")
    (folder / "plan.json").write_text(text, encoding="utf-8")
    with pytest.raises(IqError, match=r"plan\.json is no"):
        Bundle.open(folder, verify=False).plan()


def test_forged_plans_are_a_report_or_a_sentence(tmp_path: Path) -> None:
    """Every field that a report reads, with values of every kind."""
    folder = write_bundle(tmp_path / "bundle")
    bundle = Bundle.open(folder)
    plan = copy.deepcopy(PLAN)
    for holder, key in places(plan):
        kept = holder[key]
        for value in corpus.VALUES[::8]:
            holder[key] = value
            (folder / "plan.json").write_text(corpus.dump(plan), "utf-8", "surrogatepass")
            try:
                check_report(bundle)
            except IqError as error:
                assert str(folder) in str(error)
        holder[key] = kept
    (folder / "plan.json").write_text(json.dumps(plan))
    check_report(bundle)


def test_records_that_overflow(tmp_path: Path) -> None:
    with pytest.raises(IqError), reading_records(tmp_path):
        float(10**400)


def test_tensors_have_the_names_of_onnx_types() -> None:
    """The compiler writes them from the graph (`compile._interface`), the runtime knows some."""
    tensor = schema.manifest_schema()["$defs"]["tensors"]["items"]["properties"]["dtype"]
    written = {kind.name.lower() for kind in ir.DataType if kind is not ir.DataType.UNDEFINED}
    assert written <= set(tensor["enum"])
    source = (ROOT / "plugins/runtime/src/graph_io.cpp").read_text()
    held = re.findall(r'\{"(\w+)", TensorType::k\w+\}', source)
    assert len(held) == 6 and set(held) <= written
