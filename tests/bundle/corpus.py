"""One small bundle, and many that are damaged or forged from it, always the same ones."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from iq_export.bundle.manifest import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    SIGNATURE_NAME,
    checksum_line,
    record_files,
)

SEED = 12
RANDOM, RANDOM_OF_FORMAT_1 = 400, 40
_MARK = "\ue000"  # around JSON that json.dumps cannot write

WHOLE = "whole"  # the names of those that must be accepted begin with it


def raw(text: str) -> str:
    """A value that stands in the manifest as `text`, whether that is JSON or not."""
    return f"{_MARK}{text}{_MARK}"


def seal(folder: Path, text: str | bytes) -> None:
    """Write a manifest and the checksum that fits it."""
    content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    for name in (MANIFEST_NAME, CHECKSUM_NAME):
        (folder / name).unlink(missing_ok=True)  # it is a link to the original's
    (folder / MANIFEST_NAME).write_bytes(content)
    (folder / CHECKSUM_NAME).write_text(checksum_line(content))


def dump(manifest: Any) -> str:
    """Its text, with what `raw` marked as it is."""
    parts = json.dumps(manifest, ensure_ascii=False).split(_MARK)
    for number in range(1, len(parts), 2):
        parts[number - 1] = parts[number - 1][:-1]
        parts[number] = json.loads(f'"{parts[number]}"')
        parts[number + 1] = parts[number + 1][1:]
    return "".join(parts)


def make(original: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """Folders below `root`, each a copy of the bundle `original` with one change, and its name."""
    manifest = json.loads((original / MANIFEST_NAME).read_text(encoding="utf-8"))
    changes: dict[str, Callable[[Path], object]] = {**_FILES, **_texts(manifest)}
    older, two = of_format_1(manifest), _with_another(manifest)
    for base, forgeries in ((manifest, _FORGERIES), (older, _OF_FORMAT_1), (two, _OF_TWO_GRAPHS)):
        for name, forge in forgeries.items():
            changes[name] = lambda folder, base=base, forge=forge: seal(
                folder, _forged(base, forge)
            )
    for number in range(RANDOM + RANDOM_OF_FORMAT_1):
        base = manifest if number < RANDOM else older
        rng = random.Random(SEED * 10_000 + number)
        changes[f"random {number}"] = lambda folder, base=base, rng=rng: _at_random(
            folder, base, rng
        )
    for number, (name, change) in enumerate(changes.items()):
        folder = root / str(number)
        shutil.copytree(original, folder, copy_function=os.link)
        if name in _OF_TWO_GRAPHS:
            for end in ("onnx", "onnx.data"):
                (folder / f"other.{end}").hardlink_to(folder / f"model.{end}")
        change(folder)
        yield name, folder


def of_format_1(manifest: Any) -> Any:
    """A manifest of one graph as versions wrote it that knew no other."""
    (graph,) = manifest["graphs"]
    older = {key: value for key, value in manifest.items() if key != "graphs"}
    return {
        **older, "format_version": 1,
        "inputs": graph["inputs"], "outputs": graph["outputs"], "profile": graph["profile"],
        "engines": graph["engines"], "engine_failures": graph["engine_failures"],
        "lifecycles": graph["lifecycles"],
    }  # fmt: skip


def _with_another(manifest: Any) -> Any:
    """A manifest with a second graph `other`, whose files are those of `model`."""
    files = {name.replace("model.", "other."): r for name, r in manifest["files"].items()}
    graphs = [*manifest["graphs"], {**manifest["graphs"][0], "name": "other"}]
    return copy.deepcopy({**manifest, "graphs": graphs, "files": {**manifest["files"], **files}})


def _forged(manifest: Any, forge: Callable[[Any], Any]) -> str:
    content = copy.deepcopy(manifest)
    return dump(forge(content) or content)


def _put(*path: Any) -> Callable[[Any], None]:
    """Puts the last of `path` at the place that the others name."""

    def change(content: Any) -> None:
        *keys, last, value = path
        for key in keys:
            content = content[key]
        content[last] = value

    return change


def _drop(*path: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        *keys, last = path
        for key in keys:
            content = content[key]
        del content[last]

    return change


def _list_as(name: str) -> Callable[[Any], None]:
    """A file of the bundle under another name."""
    return lambda content: content["files"].update({name: content["files"]["plan.json"]})


VALUES = [
    None, True, False, 0, -1, 1, 2, 1.0, 0.5, 1e308, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64,
    -(2**63), -(2**63) - 1, 10**30, 10**308, 10**309, -(10**400), float("nan"), float("inf"), "",
    "x", "1", "\x1b[31m", "\n", "\0", "\x9b", "é", "漢", "\u202e", "../x", "/etc/passwd", "0" * 64,
    "x" * 5000, [], {}, [[]], [None], [1], ["x"], {"": 0}, {"x": None}, {"min": 1},
    raw("-0"), raw("1E2"), raw("1e-999"), raw("1e999"), raw("01"), raw("+1"), raw(".5"), raw("0x1"),
    raw("'x'"), raw('"\\ud83d\\ude00"'), raw('"\\ud800"'), raw('"\\udc00\\ud800"'), raw('"\t"'),
    raw('"\\x"'), raw('{"a":1,"a":1}'), raw('{"":1,"":1}'), raw('{"a":1,"\\u0061":1}'), raw("[1,]"),
    raw("/*x*/1"), raw("9" * 5000), raw("[" * 50 + "]" * 50), raw("[" * 70 + "]" * 70),
    raw('{"a":' * 3000 + "1" + "}" * 3000), raw("[" * 20_000 + "]" * 20_000),
]  # fmt: skip

_NAMES = [
    "", ".", "..", "/", "/etc/passwd", "../x", "a/../../x", "./plan.json", "plan.json/", "a//b",
    "engines/../plan.json", "a\\b", "a\nb", "a\n", "x\0y", "\x1b[31m", "ä", "\u202e", "x" * 255,
    "x" * 256, "x" * 5000, "x/" * 511 + "x", "x/" * 600 + "x", "plan.json ", " ", "..a", "a..", "~",
    MANIFEST_NAME, CHECKSUM_NAME, SIGNATURE_NAME, "engines/manifest.json", "C:x", "model.onnx/x",
    "engines",
]  # fmt: skip

# What a graph must have, and what it may have.
_NEEDED = ("inputs", "outputs", "engines")
_SPARED = ("profile", "engine_failures", "lifecycles")

_FORGERIES: dict[str, Callable[[Any], Any]] = {
    "whole: as it is": lambda content: None,
    "whole: unknown field": _put("surprise", {"a": [1]}),
    "whole: another notes": _put("notes", ["\x1b[31m"]),
    "whole: no notes": _drop("notes"),
    "whole: huge in options": _put("options", {"x": 10**300}),
    "whole: 62 levels": _put("options", {"x": raw("[" * 62 + "]" * 62)}),
    "63 levels": _put("options", {"x": raw("[" * 63 + "]" * 63)}),
    "no files": _put("files", {}),
    "weights not listed": _drop("files", "model.onnx.data"),
    "plan not listed": _drop("files", "engines/orin.plan"),
    "plugin not listed": _drop("files", "plugins/libiq_plugins.so"),
    "another plugin version": _put("graphs", 0, "engines", "orin", "plugin_version", "2"),
    "no plugin version": _drop("graphs", 0, "engines", "orin", "plugin_version"),
    "whole: embedded plugin": _put("graphs", 0, "engines", "orin", "plugin_embedded", True),
    "plan above": _put("graphs", 0, "engines", "orin", "plan", "../engines/orin.plan"),
    "plan of another": _put("graphs", 0, "engines", "orin", "plan", "rtx-ampere.plan"),
    "format true": _put("format_version", True),
    "format 1.0": _put("format_version", 1.0),
    **{f"format {number}": _put("format_version", number) for number in (1, 3, 0, -1, 4, 2**31)},
    "no graphs": _drop("graphs"),
    "graphs empty": _put("graphs", []),
    "one name twice": lambda content: content["graphs"].append(content["graphs"][0]),
    "65 graphs": lambda content: content.update(graphs=content["graphs"] * 65),
    "many graphs": _put("graphs", [{}] * 100_000),
    "whole: unknown field of a graph": _put("graphs", 0, "surprise", {"a": [1]}),
    **{f"graphs {number}": _put("graphs", value) for number, value in enumerate(VALUES[::3])},
    **{f"a graph {number}": _put("graphs", 0, value) for number, value in enumerate(VALUES[::4])},
    **{f"graph's name {number}": _put("graphs", 0, "name", value)
       for number, value in enumerate([*_NAMES[:20], *VALUES[::3], "x" * 64, "Model", "model\n",
                                       "1model", "model.onnx"])},
    **{f"graph without {key}": _drop("graphs", 0, key) for key in ("name", *_NEEDED)},
    **{f"whole: graph without {key}": _drop("graphs", 0, key) for key in _SPARED},
    **{f"graph's {key} {number}": _put("graphs", 0, key, value)
       for key in (*_NEEDED, *_SPARED) for number, value in enumerate(VALUES[::9])},
    "a list": lambda content: [content],
    **{f"at the top {number}": lambda _, value=value: value
       for number, value in enumerate(VALUES) if value not in (None, False, 0, "", [], {})},
    **{f"file {name[:20]!a} {len(name)}": _list_as(name) for name in _NAMES},
    **{f"files.bytes {number}": _put("files", "plan.json", "bytes", value)
       for number, value in enumerate(VALUES)},
    **{f"options.x {number}": _put("options", "x", value) for number, value in enumerate(VALUES)},
    **{f"surprise {number}": _put("surprise", value) for number, value in enumerate(VALUES)},
    **{f"version {text!a}": _put("graphs", 0, "engines", "orin", "tensorrt_version", text)
       for text in ("", "1", "1.", "1.2.3.4", "1.2.3.4.5", "123456789", "10.15.1rc1", "1.2+x", "v1",
                    "1 ", "1\n", "\u0661", "1.2.3.4.post1", "1" * 70)},
    **{f"profile {sizes}": _put("graphs", 0, "engines", "orin", "profile", "past",
                                dict(zip(("min", "opt", "max"), sizes, strict=False)))
       for sizes in ((0, 0, 0), (2, 1, 3), (1, 3, 2), (-1, 0, 1), (0, 1), (0, 1, 2**31))},
}  # fmt: skip


_OF_FORMAT_1: dict[str, Callable[[Any], Any]] = {
    "whole: of format 1": lambda content: None,
    "whole: of format 1, unknown field": _put("surprise", {"a": [1]}),
    "whole: of format 1, graphs of its own": _put("graphs", 3),
    "of format 1, called true": _put("format_version", True),
    "of format 1, called 1.0": _put("format_version", 1.0),
    "of format 1, called 2": _put("format_version", 2),
    "of format 1, weights not listed": _drop("files", "model.onnx.data"),
    "of format 1, plan not listed": _drop("files", "engines/orin.plan"),
    "of format 1, plan of another": _put("engines", "orin", "plan", "rtx-ampere.plan"),
    "of format 1, min above opt": _put("engines", "orin", "profile", "past", "min", 65),
    **{f"of format 1 without {key}": _drop(key) for key in _NEEDED},
    **{f"whole: of format 1 without {key}": _drop(key) for key in _SPARED},
    **{f"of format 1, {key} {number}": _put(key, value)
       for key in (*_NEEDED, *_SPARED) for number, value in enumerate(VALUES[::11])},
}  # fmt: skip

_OF_TWO_GRAPHS: dict[str, Callable[[Any], Any]] = {
    "whole: two graphs": lambda content: None,
    "two graphs of one name": _put("graphs", 1, "name", "model"),
    "two graphs, a file not listed": _drop("files", "other.onnx"),
    "two graphs, weights not listed": _drop("files", "other.onnx.data"),
    "two graphs, plan not listed": _put("graphs", 1, "engines", "orin", "plan", "other.plan"),
    "two graphs, plugin version": _put("graphs", 1, "engines", "orin", "plugin_version", "2"),
    "two graphs, checksum of a plan": _put("graphs", 1, "engines", "orin", "sha256", "0" * 64),
    "two graphs, one without inputs": _drop("graphs", 1, "inputs"),
}


def _texts(manifest: Any) -> dict[str, Callable[[Path], object]]:
    """Manifests that are edited as bytes, and sealed."""
    text = json.dumps(manifest, ensure_ascii=False).encode()
    texts = {
        "whole: spaces": b" \t\r\n" + text + b"\n\n",
        "empty": b"", "null": b"null", "no JSON": b"{", "NUL behind": text + b"\0",
        "NUL and more behind": text + b"\0}", "more behind": text + b"x", "twice": text * 2,
        "byte order mark": b"\xef\xbb\xbf" + text, "UTF-16": text.decode().encode("utf-16"),
        "form feed": b"\f" + text, "no-break space": b"\xc2\xa0" + text,
        "not UTF-8": text.replace(b'"tiny"', b'"\xff"'),
        "surrogate in UTF-8": text.replace(b'"tiny"', b'"\xed\xa0\x80"'),
        "overlong": text.replace(b'"tiny"', b'"\xc0\xaf"'),
        "a key twice": text[:-1] + b', "name": "tiny"}',
        "an inner key twice": text.replace(b'"min": 1', b'"min": 1, "min": 1', 1),
        "huge": text + b" " * (16 << 20),
    }  # fmt: skip
    return {name: lambda folder, t=t: seal(folder, t) for name, t in texts.items()}


def _replace(name: str, put: Callable[[Path, Path], object]) -> Callable[[Path], object]:
    """`put(path, kept)` in the place of the file `name`, which is kept beside the bundle."""

    def change(folder: Path) -> None:
        kept = folder.parent / f"{folder.name}.kept"
        (folder / name).rename(kept)
        put(folder / name, kept)

    return change


_KINDS: dict[str, Callable[[Path, Path], object]] = {
    "missing": lambda path, kept: None,
    "link": lambda path, kept: path.symlink_to(kept),
    "dangling": lambda path, kept: path.symlink_to("nowhere"),
    "loop": lambda path, kept: path.symlink_to(path),
    "folder": lambda path, kept: path.mkdir(),
    "pipe": lambda path, kept: os.mkfifo(path),
    "longer": lambda path, kept: path.write_bytes(kept.read_bytes() + b"\0"),
    "shorter": lambda path, kept: path.write_bytes(kept.read_bytes()[:-1]),
    "changed": lambda path, kept: path.write_bytes(kept.read_bytes()[:-1] + b"!"),
    "whole: copied": lambda path, kept: path.write_bytes(kept.read_bytes()),
    "whole: hard link": lambda path, kept: path.hardlink_to(kept),
}


def _link_folder(folder: Path) -> None:
    _replace("engines", lambda path, kept: path.symlink_to(kept))(folder)


_FILES: dict[str, Callable[[Path], object]] = {
    "whole: untouched": lambda folder: None,
    "whole: a file more": lambda folder: (folder / "more").write_text("x"),
    "whole: a signature": lambda folder: (folder / SIGNATURE_NAME).write_text("x"),
    "linked folder": _link_folder,
    **{f"{kind}: {name}": _replace(name, put) for kind, put in _KINDS.items()
       for name in ("model.onnx", "model.onnx.data", "engines/orin.plan", MANIFEST_NAME,
                    CHECKSUM_NAME)},
}  # fmt: skip


def _at_random(folder: Path, manifest: Any, rng: random.Random) -> None:
    """A manifest with one to three edits as JSON or as bytes, sealed; or a file changed."""
    kind = rng.randrange(10)
    if kind == 0:
        name = rng.choice(sorted(record_files(folder)))
        content = bytearray((folder / name).read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (folder / name).unlink()
        (folder / name).write_bytes(content)
        return
    content = copy.deepcopy(manifest)
    for _ in range(rng.choice((1, 1, 2, 3))):
        _edit(content, rng)
    text = dump(content).encode("utf-8", "surrogatepass")
    if kind == 1:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(_TOKENS) + text[at + rng.choice((0, 1, 8)) :]
    seal(folder, text)


_TOKENS = [b"null", b"-1", b"1e309", b"9" * 30, b'""', b"[]", b"{", b"}", b"\\u0000", b"\xff",
           b"../", b"true", b",", b"0.5", b"\0", b"\x7f", b"\xc2\x9b", b"NaN"]  # fmt: skip


def _edit(content: Any, rng: random.Random) -> None:
    """One change somewhere in a JSON value."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, member in list(pairs):
            places.append((value, key))
            if isinstance(member, (dict, list)):
                walk(member)

    walk(content)
    holder, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(_NAMES)] = holder.pop(key)
    elif kind == 2:
        other, its_key = rng.choice(places)
        if isinstance(other, dict) and its_key in other:
            holder[key] = copy.deepcopy(other[its_key])
    elif kind == 3 and isinstance(holder, dict):
        holder["more"] = copy.deepcopy(rng.choice(VALUES))
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
