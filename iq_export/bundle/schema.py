"""Strict reading of a bundle's JSON, and the check against `manifest.schema.json`.

plugins/runtime/src/{json,schema}.cpp do the same in C++: one corpus of bundles holds both together.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

# Deeper than anything that is written, and far from where a parser runs out of stack.
DEEPEST = 64
_SHOWN = 60
_TYPES: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "object": ("an object", dict),
    "array": ("a list", list),
    "string": ("a text", str),
    "integer": ("an integer", int),
    "number": ("a number", (int, float)),
    "boolean": ("true or false", bool),
    "null": ("null", type(None)),
}


def parse(text: str) -> Any:
    """The JSON value of `text`. ValueError, which says why, for what the C++ reader refuses too.

    That is NaN and infinity, a number that no double holds, a key twice in an object, half a
    surrogate pair, and more than `DEEPEST` levels.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except RecursionError:
        raise ValueError(f"it is more than {DEEPEST} levels deep") from None
    _check_plain(value, DEEPEST)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it has the key {_shown(twice)} twice")
    return found


def _integer(text: str) -> int:
    _finite(text)
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{_shown(text)} is not finite")
    return value


def _check_plain(value: Any, levels: int) -> None:
    if isinstance(value, str):
        value.encode()  # UnicodeEncodeError is a ValueError
    elif isinstance(value, (dict, list)):
        if levels == 0:
            raise ValueError(f"it is more than {DEEPEST} levels deep")
        for member in value:
            _check_plain(member, levels - 1)
        for member in value.values() if isinstance(value, dict) else ():
            _check_plain(member, levels - 1)


@cache
def manifest_schema() -> dict[str, Any]:
    """The content of `manifest.schema.json`."""
    text = Path(__file__).with_name("manifest.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def check(value: Any, schema: dict[str, Any], place: str = "") -> None:
    """ValueError, naming the place, if `value` does not fit `schema`, a part of the manifest's.

    Knows the keywords that the manifest's schema uses. One reading is stricter than JSON Schema's:
    an integer is written without a fraction or an exponent.
    """
    if "$ref" in schema:
        schema = manifest_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
    kinds = schema.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        raise _wrong(place, f"is not {' or '.join(_TYPES[kind][0] for kind in kinds)}")
    if "const" in schema and value != schema["const"]:
        raise _wrong(place, f"is not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        raise _wrong(place, f"is {_shown(value)}, which is not one of {', '.join(schema['enum'])}")
    if isinstance(value, str):
        _check_text(value, schema, place)
    elif isinstance(value, int) and "maximum" in schema:
        low, high = schema["minimum"], schema["maximum"]
        if not low <= value <= high:
            raise _wrong(place, f"is not an integer from {low} to {high}")
    elif isinstance(value, list) and "items" in schema:
        if "maxItems" in schema and not schema["minItems"] <= len(value) <= schema["maxItems"]:
            raise _wrong(place, f"is not a list of {schema['minItems']} to {schema['maxItems']}")
        for number, item in enumerate(value):
            check(item, schema["items"], f"{place}[{number}]")
    elif isinstance(value, dict):
        _check_members(value, schema, place)


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind][1]) and (kind == "boolean" or not isinstance(value, bool))


def _check_text(value: str, schema: dict[str, Any], place: str) -> None:
    # Shortest first: the pattern never meets a long text.
    if len(value) > schema.get("maxLength", len(value)) or (
        "pattern" in schema and not re.fullmatch(schema["pattern"], value)
    ):
        raise _wrong(place, f"{_shown(value)} is not {schema['title']}")


def _check_members(value: dict[str, Any], schema: dict[str, Any], place: str) -> None:
    for name in schema.get("required", ()):
        if name not in value:
            raise _wrong(place, f"has no {name!r}")
    known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    for name, member in value.items():
        if "propertyNames" in schema:
            check(name, schema["propertyNames"], place)
        if name not in known and others is False:
            raise _wrong(place, f"has the unknown field {_shown(name)}")
        inside = f"{place}.{_shown(name)[1:-1]}" if place else name[:_SHOWN]
        check(member, known.get(name, others), inside)


def _wrong(place: str, why: str) -> ValueError:
    return ValueError(f"{place} {why}".strip())


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]}...'"
