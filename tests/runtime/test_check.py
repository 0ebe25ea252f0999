"""`iq_run --check` takes a whole bundle and refuses every other, with a reason and without a crash.

The library is compiled with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iq_export.bundle.manifest import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    SIGNATURE_NAME,
    checksum_line,
)
from iq_export.bundle.package import PLUGIN_VERSION
from iq_export.sinks import ops
from tests.runtime.conftest import ORIN, RTX, Done, engine, execute, write_bundle

FUZZED = 400
FILES = ("model.onnx", "model.onnx.data", "tokenizer.json", "config.json", "plan.json",
         "generation_config.json", "plugins/libiq_plugins.so", "engines/orin.plan",
         "engines/rtx-ampere.plan")  # fmt: skip
HERE = ("--for-tensorrt", "10.15.1", "--for-sm", "87")


@pytest.fixture
def check(built: Path, bundle: Path) -> Callable[..., Done]:
    """`check("--for-sm", "87")` on the small bundle."""
    return lambda *arguments: execute([built / "iq_run", bundle, "--check", *arguments])


Check = Callable[..., Done]


def rewrite(folder: Path, change: Callable[[Any], Any], *, seal: bool = True) -> None:
    """Change the manifest as JSON, and its checksum with it."""
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text())
    text = json.dumps(change(content) or content, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    if seal:
        (folder / CHECKSUM_NAME).write_text(checksum_line(text.encode()))


def test_a_whole_bundle_is_taken(check: Check) -> None:
    done = check()
    assert (done.code, done.error) == (0, "")
    assert "9 files" in done.out
    assert re.search(r"orin +TensorRT 10\.15\.1\.29, sm_87, plugin version 1 beside", done.out)
    # Two heads of four half values, key and value, and an int32 sink index.
    assert re.search(r"KV cache +3 tensors, 36 bytes a token, 300 tokens at most", done.out)
    assert "not compared" in done.out


@pytest.mark.parametrize(
    ("there", "what"),
    [
        (HERE, "sm_87: fits"),
        (("--for-tensorrt", "rtx-1.9", "--for-sm", "86"), "TensorRT for RTX 1.9.0: fits"),
    ],
)
def test_the_engine_that_fits_is_found(check: Check, there: tuple[str, ...], what: str) -> None:
    done = check(*there)
    assert done.code == 0 and what in done.out


@pytest.mark.parametrize(
    ("there", "what"),
    [
        (
            ("--for-tensorrt", "11.1.0"),
            "orin: TensorRT version +TensorRT 10.15.1.29 +TensorRT 11.1",
        ),
        (("--for-tensorrt", "10.16.0"), "orin: TensorRT version"),
        (("--for-sm", "90"), "orin: compute capability +sm_87 +sm_90"),
        (("--for-tensorrt", "rtx-1.7"), "orin: TensorRT flavour"),
        (("--engine", "thor"), "engine +thor +orin, rtx-ampere"),
    ],
)
def test_an_engine_for_another_machine_is_refused(
    check: Check, there: tuple[str, ...], what: str
) -> None:
    wanted = () if "--engine" in there else ("--engine", "orin")
    done = check(*wanted, *there)
    assert done.code == 6 and re.search(what, done.error)


def test_all_differences_come_in_one_table(check: Check, bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    (bundle / "model.onnx").write_bytes(b"grapH")
    done = check("--engine", "orin", "--for-tensorrt", "11.0", "--for-sm", "110")
    assert done.code == 7
    for row in ("tokenizer.json", "model.onnx", "TensorRT version", "compute capability"):
        assert re.search(rf"^  .*{row}", done.error, re.M), done.error


def test_version_compatible_plans_need_the_major_version_only(built: Path, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", engine("orin", version_compatible=True))
    command = [built / "iq_run", folder, "--check", "--for-tensorrt"]
    assert execute([*command, "10.16.0"]).code == 0
    done = execute([*command, "11.0.0"])
    assert done.code == 6 and "TensorRT major version" in done.error


@pytest.mark.parametrize("version", ["2", ""])
def test_another_plugin_version_is_refused(built: Path, tmp_path: Path, version: str) -> None:
    folder = write_bundle(tmp_path / "b", engine("orin", plugin_version=version))
    done = execute([built / "iq_run", folder, "--check"])
    assert done.code == 7
    assert re.search(rf"orin: plugin version +1 +{version or 'none'}$", done.error, re.M)


def test_the_compiler_writes_the_version_of_its_nodes() -> None:
    from iq_export.engine import worker

    assert str(ops.VERSION) == worker._PLUGIN_VERSION == ORIN.plugin_version == PLUGIN_VERSION


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncated", "empty", "longer", "one byte", "swapped", "missing"])
def test_a_damaged_file_is_refused(check: Check, bundle: Path, name: str, how: str) -> None:
    path = bundle / name
    content = path.read_bytes()
    other = bundle / FILES[FILES.index(name) - 1]
    changed = {
        "truncated": content[:-1],
        "empty": b"",
        "longer": content + b"\0",
        "one byte": bytes([content[0] ^ 1]) + content[1:],
        "swapped": other.read_bytes(),
    }
    path.unlink()
    if how != "missing":
        path.write_bytes(changed[how])
    done = check()
    assert done.code == 7 and re.search(rf"^  {re.escape(name)} ", done.error, re.M)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "engines/orin.plan", MANIFEST_NAME, CHECKSUM_NAME]
)
@pytest.mark.parametrize("how", ["folder", "link", "dangling", "loop", "pipe", "socket"])
def test_what_is_no_file_is_refused(
    check: Check, bundle: Path, name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle / name
    shutil.copy(path, bundle.parent / "same")  # a link to the very content is no file either
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "socket":
        monkeypatch.chdir(path.parent)  # the names of sockets are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    else:
        path.symlink_to({"link": bundle.parent / "same", "loop": path}.get(how, "nowhere"))
    done = check()
    assert done.code == 7 and name in done.error


def test_a_linked_folder_is_refused(check: Check, bundle: Path) -> None:
    (bundle / "engines").rename(bundle.parent / "engines")
    (bundle / "engines").symlink_to(bundle.parent / "engines")
    done = check()
    assert done.code == 7 and "symbolic link on the way" in done.error


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_cannot_be_read_is_refused(check: Check, bundle: Path) -> None:
    (bundle / "tokenizer.json").chmod(0)
    done = check()
    assert done.code == 7 and "Permission denied" in done.error


def test_a_changed_manifest_is_refused(check: Check, bundle: Path) -> None:
    path, seal = bundle / MANIFEST_NAME, bundle / CHECKSUM_NAME
    content, line = path.read_bytes(), seal.read_bytes()
    for changed in (content[:-1], content.replace(b"tiny", b"tinY"), b"", content + b" "):
        path.write_bytes(changed)
        done = check()
        assert done.code == 7 and "changed or damaged" in done.error
    path.write_bytes(content)
    for changed in (
        line[:-1],
        b"",
        (b"1" if line.startswith(b"0") else b"0") + line[1:],
        line * 2,
        line.upper(),
        b"a" * 5000,
        b"\0\xff",
    ):
        seal.write_bytes(changed)
        assert check().code == 7
    seal.write_bytes(line)
    assert check().code == 0


def test_a_bundle_without_the_checksum_is_refused(check: Check, bundle: Path) -> None:
    (bundle / CHECKSUM_NAME).unlink()
    done = check()
    assert done.code == 7 and re.search(rf"{CHECKSUM_NAME} +a file +missing", done.error)


def test_what_is_no_bundle_is_refused(built: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none", "/dev/null", ""):
        done = execute([built / "iq_run", folder, "--check"])
        assert done.code in (2, 7) and "error: " in done.error


def _set(*path: Any) -> Callable[[Any], None]:
    """Puts the last of `path` at the place that the others name."""

    def change(content: Any) -> None:
        *keys, last, value = path
        for key in keys:
            content = content[key]
        content[last] = value

    return change


def _name(name: str) -> Callable[[Any], None]:
    return lambda content: content["files"].update({name: content["files"]["model.onnx"]})


def _graph(*path: Any) -> Callable[[Any], None]:
    return _set("graphs", 0, *path)


def _engine(*path: Any) -> Callable[[Any], None]:
    return _graph("engines", "orin", *path)


MALFORMED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "list": (lambda _: [1], "not an object"),
    "format": (_set("format_version", 3), "format version"),
    "no graphs": (_set("graphs", []), "graphs is not a list of 1 to 64"),
    "graphs as object": (_set("graphs", {}), "graphs is not a list"),
    "many graphs": (_set("graphs", [{}] * 65), "graphs is not a list of 1 to 64"),
    "no graph": (_set("graphs", 0, None), "graphs[0] is not an object"),
    "a name twice": (lambda c: c["graphs"].append(c["graphs"][0]), "has the name 'model' twice"),
    "graph above": (_graph("name", "../x"), "is not a graph's name"),
    "graph not listed": (_graph("name", "x"), "files has no 'x.onnx'"),
    "no inputs": (lambda c: c["graphs"][0].pop("inputs") and None, "graphs[0] has no 'inputs'"),
    "format as text": (_set("format_version", "1"), "format_version is not an integer"),
    "no format": (lambda c: c.pop("format_version") and None, "no 'format_version'"),
    "unknown field": (_set("files", "plan.json", "surprise", 1), "unknown field 'surprise'"),
    "no files": (_set("files", {}), "files has no 'model.onnx'"),
    "no model": (lambda c: c["files"].pop("model.onnx") and None, "files has no 'model.onnx'"),
    "files as list": (_set("files", []), "files is not an object"),
    "no weights": (lambda c: c["files"].pop("model.onnx.data") and None, "model.onnx.data"),
    "no plan": (lambda c: c["files"].pop("engines/orin.plan") and None, "plan of engine orin"),
    "no plugin": (lambda c: c["files"].pop("plugins/libiq_plugins.so") and None, "libiq_plugins"),
    "bytes huge": (_set("files", "plan.json", "bytes", 2**70), "not an integer"),
    "bytes negative": (_set("files", "plan.json", "bytes", -1), "not an integer"),
    "bytes true": (_set("files", "plan.json", "bytes", True), "not an integer"),
    "bytes float": (_set("files", "plan.json", "bytes", 2.0), "not an integer"),
    "sha short": (_set("files", "plan.json", "sha256", "ab"), "not a SHA-256"),
    "sha upper": (_set("files", "plan.json", "sha256", "AB" * 32), "not a SHA-256"),
    "sha null": (_set("files", "plan.json", "sha256", None), "not a text"),
    "absolute": (_name("/etc/passwd"), "does not stay inside"),
    "above": (_name("../x"), "does not stay inside"),
    "above within": (_name("engines/../../x"), "does not stay inside"),
    "dot": (_name("./x"), "does not stay inside"),
    "empty name": (_name(""), "does not stay inside"),
    "slash": (_name("engines//x"), "does not stay inside"),
    "NUL": (_name("x\0y"), "NUL"),
    "itself": (_name(MANIFEST_NAME), "one of the manifest's own"),
    "signature": (_name(SIGNATURE_NAME), "one of the manifest's own"),
    "notes": (_set("notes", [3]), "notes[0] is not a text"),
    "check": (_set("check", []), "check is not an object or null"),
    "long name": (_name("x" * 5000), "too long"),
    "engine list": (_graph("engines", []), "engines is not an object"),
    "plan above": (_engine("plan", "../orin.plan"), "plan of engine orin"),
    "plan checksum": (_engine("sha256", "0" * 64), "same size and checksum"),
    "flavour": (_engine("flavour", "onnx"), "not known"),
    "version": (_engine("tensorrt_version", "new"), "not a version"),
    "version huge": (_engine("tensorrt_version", "9" * 40), "not a version"),
    "sm huge": (_engine("compute_capabilities", [10**9]), "not an integer"),
    "form": (_engine("form", "other"), "not known"),
    "embedded": (_engine("plugin_embedded", 1), "not true or false"),
    "profile": (_engine("profile", {}), "no 'batch'"),
    "profile order": (_engine("profile", "seq", "max", 1), "not an integer from 4"),
    "decode only": (_engine("profile", "past", "min", 1), "prefill and decode"),
    "no cache": (_graph("inputs", []), "not a causal LM"),
    "axis": (_graph("inputs", 3, "shape", 1, 0), "no usable size"),
    "axis huge": (_graph("inputs", 3, "shape", 3, 2**31 - 1), "no usable size"),
    "cache type": (_graph("inputs", 3, "dtype", "int64"), "no output"),
    "odd rows": (_graph("inputs", 3, "shape", 3, 3), "rows of a type or size"),
    "ids": (_graph("inputs", 0, "dtype", "int32"), "not int64"),
    "unknown input": (_graph("inputs", 0, "name", "input"), "not a causal LM"),
    "other input": (_graph("inputs", 1, "name", "token_type_ids"), "how to fill"),
    "present": (_graph("outputs", 1, "name", "x"), "no output 'present.0.key'"),
    "control": (_engine("form", "\x1b[31m\n"), "is '?[31m?'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_manifest_is_refused(check: Check, bundle: Path, case: str) -> None:
    change, reason = MALFORMED[case]
    rewrite(bundle, change)
    done = check()
    assert done.code in (5, 6, 7) and reason in done.error


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"null", b"[" * 100_000, b'{"a":' * 50_000, b'{"name": "\xff"}',
        b"\xef\xbb\xbf{}",
        b'{"format_version": 1e999}', b'{"format_version": 1, "format_version": 1}',
        b'{"format_version": 99999999999999999999}', b"\0", b'{"format_version": 1}x',
        b'{"\\ud800": 1}', b" " * 100_000,
    ],
)  # fmt: skip
def test_what_is_not_json_is_refused(check: Check, bundle: Path, text: bytes) -> None:
    (bundle / MANIFEST_NAME).write_bytes(text)
    (bundle / CHECKSUM_NAME).write_text(checksum_line(text))
    done = check()
    assert done.code == 7 and re.search(r"not JSON|not an object|integer|twice|has no", done.error)


def test_unknown_fields_of_the_top_level_are_ignored(check: Check, bundle: Path) -> None:
    rewrite(bundle, _set("surprise", {"a": [1]}))
    assert check().code == 0


def with_vision(bundle: Path) -> None:
    """A second graph, which is no causal LM and has an engine of its own."""
    for end in ("onnx", "onnx.data"):
        shutil.copy(bundle / f"model.{end}", bundle / f"vision.{end}")

    def change(content: Any) -> None:
        for end in ("onnx", "onnx.data"):
            content["files"][f"vision.{end}"] = content["files"][f"model.{end}"]
        pixels = {"name": "pixel_values", "dtype": "float16", "shape": ["batch", 3, 8, 8]}
        engines = {"rtx-ada": content["graphs"][0]["engines"]["rtx-ampere"]}
        content["graphs"].append(
            {"name": "vision", "inputs": [pixels], "outputs": [], "engines": engines}
        )

    rewrite(bundle, change)


def test_one_graph_of_several_is_opened_by_its_name(check: Check, bundle: Path) -> None:
    with_vision(bundle)
    for arguments in ((), HERE):
        done = check(*arguments)
        assert done.code == 5 and re.search(r"graph +the name of one +model, vision$", done.error)
    done = check("--graph", "text", *HERE)
    assert done.code == 5 and re.search(r"graph +text +model, vision$", done.error)
    done = check("--graph", "model", *HERE)
    assert done.code == 0 and "engine orin" in done.out and "rtx-ada" not in done.out
    done = check("--graph", "vision", "--engine", "orin")
    assert done.code == 6 and re.search(r"engine +orin +rtx-ada$", done.error)
    done = check("--graph", "vision")
    assert done.code == 5 and "not a causal LM" in done.error
    (bundle / "vision.onnx").write_bytes(b"other")
    assert check("--graph", "model").code == 7


def test_format_1_is_read_as_format_2(check: Check, bundle: Path) -> None:
    """`format_1.json` is what a version wrote that knew no other; its files are the same."""
    now = check()
    text = (Path(__file__).parents[1] / "bundle" / "format_1.json").read_bytes()
    (bundle / MANIFEST_NAME).write_bytes(text)
    (bundle / CHECKSUM_NAME).write_text(checksum_line(text))
    then = check()
    assert (then.code, then.out) == (0, now.out)
    assert check("--graph", "model", *HERE).code == 0
    rewrite(bundle, _set("engines", "orin", "form", "other"))
    assert check().code == 7 and "not known" in check().error


def switched(bundle: Path) -> dict[str, bytes]:
    """The bundle as a build that was killed right behind its switch leaves it; what is ahead."""
    ahead = bundle / ".iq-export" / "update"
    (ahead / "engines").mkdir(parents=True)
    (ahead / "engines" / "orin.plan").write_bytes(b"a newer plan")

    def newer(content: Any) -> None:
        engine = content["graphs"][0]["engines"]["orin"]
        for record in (content["files"]["engines/orin.plan"], engine):
            record["bytes"] = len(b"a newer plan")
            record["sha256"] = hashlib.sha256(b"a newer plan").hexdigest()

    old = {name: (bundle / name).read_bytes() for name in (MANIFEST_NAME, CHECKSUM_NAME)}
    rewrite(bundle, newer)
    for name, text in old.items():
        (bundle / name).replace(ahead / name)
        (bundle / name).write_bytes(text)
    return {p.relative_to(ahead).as_posix(): p.read_bytes() for p in ahead.rglob("*.*")}


def test_an_update_is_seen_whole_from_its_switch_on(check: Check, bundle: Path) -> None:
    """However many of its files are in their places, the manifest last."""
    names = switched(bundle)
    order = sorted(names, key=lambda name: (name == MANIFEST_NAME, name == CHECKSUM_NAME))
    for name in ("", *order):
        if name:
            (bundle / ".iq-export" / "update" / name).replace(bundle / name)
        done = check(*HERE)
        assert done.code == 0, done.err
    assert (bundle / "engines" / "orin.plan").read_bytes() == b"a newer plan"


def test_a_damaged_update_is_refused(check: Check, bundle: Path) -> None:
    switched(bundle)
    (bundle / ".iq-export" / "update" / "engines" / "orin.plan").write_bytes(b"a wrong plan")
    assert check(*HERE).code == 7


def test_control_characters_are_never_printed_raw(check: Check, bundle: Path) -> None:
    evil = "\x1b[31m\x07\x7f\x9b2J\r\n\u0085é"

    def change(content: Any) -> None:
        content.update(name=evil, recipe=evil)
        engines = content["graphs"][0]["engines"]
        for name in list(engines):
            engines[evil + name] = engines.pop(name)

    rewrite(bundle, change)
    for arguments in ((), HERE, ("--engine", "none"), ("--engine", evil), (evil,)):
        done = check(*arguments)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.out + done.error)
    assert "?[31m???2J???é" in check().out


def test_fuzzed_manifests(built: Path, bundle: Path, tmp_path: Path) -> None:
    """Random edits of the bytes, with the checksum made anew, so that the parser is hit.

    One that is accepted must be harmless: JSON that names the same files.
    """
    original = (bundle / MANIFEST_NAME).read_bytes()
    folders, texts = [], []
    for seed in range(FUZZED):
        folder = tmp_path / f"fuzz{seed}"
        shutil.copytree(bundle, folder, copy_function=os.link)
        for name in (MANIFEST_NAME, CHECKSUM_NAME):
            (folder / name).unlink()
        text = _mutated(original, random.Random(seed))
        (folder / MANIFEST_NAME).write_bytes(text)
        (folder / CHECKSUM_NAME).write_text(checksum_line(text))
        folders.append(folder)
        texts.append(text)
    done = execute([built / "iq_check_all", *folders])
    lines = done.out.splitlines()
    assert len(lines) == FUZZED
    wanted = json.loads(original)
    accepted = 0
    for seed, (text, line) in enumerate(zip(texts, lines, strict=True)):
        code, reason = line.split("\t", 1)
        if code == "0":
            accepted += 1
            found = json.loads(text)
            for field in ("format_version", "files"):
                assert found[field] == wanted[field], seed
        else:
            assert code == "7" and len(reason) > 20, (seed, line)
    assert 0 < accepted < FUZZED / 2  # names and notes may change, most else may not


def _mutated(text: bytes, rng: random.Random) -> bytes:
    """One to four random edits: a byte, a piece left out or doubled, a token of JSON put in."""
    tokens = [b"null", b"-1", b"1e309", b"9" * 30, b'""', b"[]", b"{", b"}", b'"\\u0000"', b"\xff",
              b"../", b"true", b",", b"0.5"]  # fmt: skip
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(text))
        end = min(len(text), at + rng.choice((1, 2, 8, 40)))
        kind = rng.randrange(4)
        if kind == 0:
            text = text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
        elif kind == 1:
            text = text[:at] + text[end:]
        elif kind == 2:
            text = text[:end] + text[at:end] + text[end:]
        else:
            text = text[:at] + rng.choice(tokens) + text[end:]
    return text


def test_damage_is_also_found_by_python(bundle: Path) -> None:
    """The two readers agree on what the checksum of a manifest is."""
    from iq_export.bundle.package import Bundle
    from iq_export.errors import BundleError

    assert Bundle.open(bundle).manifest.graph.engines["rtx-ampere"]["form"] == RTX.form
    line = (bundle / CHECKSUM_NAME).read_text()
    digest = hashlib.sha256((bundle / MANIFEST_NAME).read_bytes()).hexdigest()
    assert line == f"{digest}  {MANIFEST_NAME}\n"
    rewrite(bundle, _set("name", "other"), seal=False)
    with pytest.raises(BundleError, match="is not the one"):
        Bundle.open(bundle, verify=False)


@pytest.mark.parametrize(
    "arguments",
    [
        (), ("--check", "--ids", "1"), ("--ids",), ("--ids", "1,x"), ("--ids", ""), ("--what", "1"),
        ("--check", "more"), ("--ids", "1", "--max-new", "0"), ("--ids", "1", "--for-sm", "86"),
        ("--check", "--for-tensorrt", "1.2.3.4.5"), ("--ids", "9" * 30), ("--ids", "-1"),
    ],
)  # fmt: skip
def test_wrong_usage(built: Path, bundle: Path, arguments: tuple[str, ...]) -> None:
    done = execute([built / "iq_run", bundle, *arguments])
    assert done.code == 2 and "iq_run: error: " in done.error


def test_without_cuda_a_session_says_so(built: Path, bundle: Path) -> None:
    done = execute([built / "iq_run", bundle, "--ids", "1,2"])
    assert done.code == 6 and "built without CUDA" in done.error
