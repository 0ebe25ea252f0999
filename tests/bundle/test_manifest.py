"""manifest.json: round trip, refusals, checksums."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from iq_export.bundle.manifest import (
    CHECKSUM_NAME,
    FORMAT_VERSION,
    FileRecord,
    GraphInfo,
    Manifest,
    TensorInfo,
    checksum_line,
    listable,
    reading_records,
    record_files,
)
from iq_export.errors import BundleError, GraphError
from tests.tiny_bundle import engine_record, records

RECORDS = {name: asdict(record) for name, record in records().items()}
RECORD = {"bytes": 1, "sha256": "0" * 64}
GRAPH = {"name": "model", "inputs": [], "outputs": [], "engines": {}}
OF_A_GRAPH = ("inputs", "outputs", "profile", "engines", "engine_failures", "lifecycles")


def sample() -> Manifest:
    return Manifest(
        name="tiny",
        recipe="w8a8",
        dtype="float16",
        opset=23,
        graphs=[GraphInfo(inputs=[TensorInfo("input_ids", "int64", ["batch", "seq"])])],
        files=records(),
    )


def test_round_trip() -> None:
    assert Manifest.from_json(sample().to_json()) == sample()


def test_numbers_json_cannot_hold_become_null() -> None:
    manifest = Manifest("m", "w8a8", "float16", 23, accuracy={"perplexity": float("inf")})
    assert json.loads(manifest.to_json())["accuracy"] == {"perplexity": None}


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "{}",
        json.dumps({"format_version": FORMAT_VERSION + 1}),
        json.dumps({"format_version": FORMAT_VERSION}),
        json.dumps({**json.loads(sample().to_json()), "files": {"a": {"bytes": 1}}}),
    ],
)
def test_damaged_manifests_are_refused(text: str) -> None:
    with pytest.raises(BundleError, match="somewhere"):
        Manifest.from_json(text, "somewhere")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", None), ("name", ["x"]), ("opset", "23"), ("opset", True), ("opset", 1.5),
        ("targets", "rtx-ampere"), ("targets", [1]), ("engines", []), ("engines", {"a": None}),
        ("lifecycles", {}), ("lifecycles", [3]), ("timings", {"trace": "long"}), ("notes", [None]),
        ("accuracy", []), ("source", 3), ("inputs", {}), ("inputs", [3]), ("peak_rss_bytes", "1"),
        ("inputs", [{"name": "x", "dtype": "float", "shape": ["batch", None]}]),
        ("inputs", [{"name": 1, "dtype": "float", "shape": []}]),
        ("files", []), ("files", {}), *[("files", {**RECORDS, "a": wrong}) for wrong in (
            None, {"bytes": 1}, {**RECORD, "bytes": "1"}, {**RECORD, "sha256": "ab"},
            {**RECORD, "bytes": True}, {**RECORD, "bytes": 1.0}, {**RECORD, "bytes": -1},
            {**RECORD, "bytes": 2**63}, {**RECORD, "sha256": "A" * 64}, {**RECORD, "more": 1},
        )],
        *[("files", {**RECORDS, name: RECORD}) for name in (
            "../a", "/etc/passwd", "a/../b", "./a", "a//b", "a/", "", ".", "..", "a\\b", "a\nb",
            "a\0", "\x1b[31m", "ä", "\u202e", "x" * 256, "x/" * 600 + "x", "manifest.json",
            "manifest.json.sha256", "manifest.json.sig", "a/..", "../manifest.json",
        )],
        ("engines", {"a": engine_record(form="other")}),
        ("engines", {"a": engine_record(tensorrt_version="new")}),
        ("engines", {"a": engine_record(tensorrt_version="1\n")}),
        ("engines", {"a": engine_record(compute_capabilities=[0])}),
        ("engines", {"a": engine_record(plugin_embedded=0)}),
        ("engines", {"a": engine_record(profile={})}),
        ("engines", {"a": engine_record(profile={
            axis: {"min": 3, "opt": 2, "max": 4} for axis in ("batch", "seq", "past")})}),
    ],
)  # fmt: skip
def test_fields_of_another_type_are_refused(field: str, value: object) -> None:
    whole = json.loads(sample().to_json())
    (whole["graphs"][0] if field in whole["graphs"][0] and field != "name" else whole)[field] = (
        value
    )
    with pytest.raises(BundleError, match=f"somewhere is damaged.*{field}"):
        Manifest.from_json(json.dumps(whole), "somewhere")


@pytest.mark.parametrize(
    ("graphs", "says"),
    [
        ([], "graphs is not a list of 1 to 64"), ([GRAPH] * 65, "is not a list of 1 to 64"),
        ([GRAPH] * 2, "graphs has the name 'model' twice"), ({"model": GRAPH}, "is not a list"),
        (None, "is not a list"), ([None], r"graphs\[0\] is not an object"),
        ([{**GRAPH, "name": "other"}], "files has no 'other.onnx'"),
        ([GRAPH, {**GRAPH, "name": "half"}], "files has no 'half.onnx.data'"),
        ([{**GRAPH, "name": "../model"}], r"graphs\[0\]\.name '\.\./model' is not a graph's name"),
        ([{**GRAPH, "name": "model\n"}], "is not a graph's name"),
        ([{**GRAPH, "name": "x" * 65}], "is not a graph's name"),
        ([GRAPH, {**GRAPH, "name": 1}], r"graphs\[1\]\.name is not a text"),
        ([{"name": "model"}], r"graphs\[0\] has no 'inputs'"),
        ([{**GRAPH, "inputs": [{"name": "x", "dtype": "int64", "shape": [2**31]}]}],
         r"graphs\[0\]\.inputs\[0\]\.shape\[0\] is not an integer from 0"),
    ],
)  # fmt: skip
def test_graphs_of_another_shape_are_refused(graphs: object, says: str) -> None:
    files = {**RECORDS, "half.onnx": RECORD}
    text = json.dumps({**json.loads(sample().to_json()), "graphs": graphs, "files": files})
    with pytest.raises(BundleError, match=f"somewhere is damaged.*{says}"):
        Manifest.from_json(text, "somewhere")


def test_a_second_graph() -> None:
    vision = GraphInfo("vision", inputs=[TensorInfo("pixel_values", "float16", ["batch", 3, 8])])
    files = records(
        **{vision.file: FileRecord(1, "0" * 64), vision.weights: FileRecord(2, "1" * 64)}
    )
    manifest = replace(sample(), graphs=[*sample().graphs, vision], files=files)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert sample().graph.file == "model.onnx"
    with pytest.raises(GraphError, match=r"tiny has several graphs \(model, vision\)"):
        _ = manifest.graph


def test_format_1_is_read_as_format_2() -> None:
    """`format_1.json` is what a version wrote that knew no other."""
    text = (Path(__file__).parent / "format_1.json").read_text(encoding="utf-8")
    older = json.loads(text)
    read = Manifest.from_json(text)
    assert older["format_version"] == 1 and read.format_version == 2 and len(older["engines"]) == 2
    assert json.loads(read.to_json()) == {
        **{key: value for key, value in older.items() if key not in OF_A_GRAPH},
        "format_version": 2,
        "graphs": [{"name": "model", **{key: older[key] for key in OF_A_GRAPH}}],
    }
    assert Manifest.from_json(read.to_json()) == read


@pytest.mark.parametrize("version", [0, 3, -1, 2**70, 1.0, 2.0, True, "2", None, [1]])
def test_other_formats_are_refused(version: object) -> None:
    text = json.dumps({**json.loads(sample().to_json()), "format_version": version})
    with pytest.raises(BundleError, match=r"somewhere has format .*this iq-export reads format 2"):
        Manifest.from_json(text, "somewhere")


def test_unknown_fields_of_the_top_level_are_ignored() -> None:
    text = json.dumps({**json.loads(sample().to_json()), "surprise": {"a": [1]}})
    assert Manifest.from_json(text) == sample()


@pytest.mark.parametrize(
    "name", ["a", "a b", "engines/rtx-ampere.plan", "..a", ".a", "a..", "x" * 255, "[~]", "a/b/c",
             "manifest.jsonx", "engines/manifest.json"],
)  # fmt: skip
def test_names_of_files(name: str) -> None:
    manifest = replace(sample(), files={**records(), name: records()["model.onnx"]})
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("name", "expected"),
    [("LICENSE", "LICENSE"), ("LICENSE é.txt", "LICENSE _xe9.txt"), ("NOTICE\\a\n", "NOTICE_a_"),
     ("LICENSE-漢", "LICENSE-_u6f22"), ("LICENSE" + "漢" * 80, None), ("L\udce9", "L_udce9")],
)  # fmt: skip
def test_a_licence_of_any_name_can_be_listed(name: str, expected: str | None) -> None:
    found = listable(name)
    assert expected in (None, found)
    manifest = replace(sample(), files={**records(), found: records()["model.onnx"]})
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "-" + "9" * 4000, "9" * 5000,
     '"\\ud800"', '"\\udc00\\ud800"', '{"a": 1, "a": 1}', '{"b": [{"a": 1, "\\u0061": 2}]}',
     "[" * 64 + "]" * 64, '{"a":' * 2000 + "1" + "}" * 2000, "01", "+1", "'a'", '"\t"'],
)  # fmt: skip
def test_what_a_json_parser_may_refuse_is_refused(value: str) -> None:
    text = sample().to_json().replace('"options": {}', f'"options": {{"x": {value}}}')
    with pytest.raises(BundleError, match="somewhere is not JSON"):
        Manifest.from_json(text, "somewhere")


@pytest.mark.parametrize(
    "value", ["9" * 300, "-1e-999", '"\\ud83d\\ude00"', "[" * 62 + "]" * 62, '"\\u0000"']
)
def test_what_is_json_is_read(value: str) -> None:
    text = sample().to_json().replace('"options": {}', f'"options": {{"x": {value}}}')
    assert Manifest.from_json(text).options == {"x": json.loads(value)}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000])
def test_json_without_end_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match="somewhere is not"):
        Manifest.from_json(text, "somewhere")


def test_names_that_are_not_utf8_are_written_out(tmp_path: Path) -> None:
    """JSON has no other way: the C++ reader refuses half a surrogate pair, as parsers do."""
    manifest = replace(sample(), options={"model": "caf\udce9 漢"})
    text = manifest.write(tmp_path).read_text(encoding="utf-8")
    assert Manifest.from_json(text).options == {"model": r"caf\udce9 漢"} and "漢" in text


@pytest.mark.parametrize("record", [{"a": 1}, {}, {"a": {"b": []}}, None, "x", {"a": "x"}])
def test_records_that_are_no_longer_understood(record: object, tmp_path: Path) -> None:
    says = "has records that this version did not write"
    with pytest.raises(BundleError, match=says), reading_records(tmp_path):
        f"{record['a']['b']:.2f}"  # type: ignore[index]


def test_record_files_hashes_everything_but_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "a.plan").write_bytes(b"plan")
    (tmp_path / "model.onnx").write_bytes(b"")
    sample().write(tmp_path)
    files = record_files(tmp_path)
    assert list(files) == ["engines/a.plan", "model.onnx"]
    assert files["engines/a.plan"] == FileRecord(4, hashlib.sha256(b"plan").hexdigest())


def test_the_checksum_beside_it_is_sha256sums(tmp_path: Path) -> None:
    path = sample().write(tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tmp_path / CHECKSUM_NAME).read_text() == f"{digest}  manifest.json\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", CHECKSUM_NAME]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("renamed", [True, False])
def test_manifest_and_checksum_never_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], renamed: bool
) -> None:
    """Whether a failure comes just before or just after the manifest is in its place."""
    sample().write(tmp_path)
    rename = Path.replace

    def failing(self: Path, target: Path) -> Path:
        is_manifest = Path(target).name == "manifest.json"
        if renamed or not is_manifest:
            rename(self, target)
        if is_manifest:
            raise error
        return Path(target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(error):
        replace(sample(), name="other").write(tmp_path)
    content = (tmp_path / "manifest.json").read_bytes()
    assert Manifest.from_json(content.decode()).name == ("other" if renamed else "tiny")
    assert (tmp_path / CHECKSUM_NAME).read_text() == checksum_line(content)
    assert len(list(tmp_path.iterdir())) == 2
