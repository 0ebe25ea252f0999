"""Values of this package as JSON and arrays, and back to the bit: data classes, containers, arrays
and numbers, by the type hints of whoever reads them.

Nothing that was written chooses a type: what is read is of the classes that the hints name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

_CONTAINERS: dict[str, Any] = {"tuple": tuple, "list": list, "frozenset": frozenset}


def pack(value: object, given: Mapping[str, object]) -> tuple[Any, list[np.ndarray]]:
    """JSON values, and the arrays that they number; an array that occurs twice is kept once.

    What is one of `given` stands there by its name. Raises TypeError for what cannot be read again.
    """
    arrays: list[np.ndarray] = []
    numbers: dict[int, int] = {}
    names = {id(one): name for name, one in given.items() if one is not None}

    def numbered(array: np.ndarray) -> int:
        if id(array) not in numbers:
            numbers[id(array)] = len(arrays)
            arrays.append(array)
        return numbers[id(array)]

    def packed(one: Any) -> Any:
        if id(one) in names:
            return {"given": names[id(one)]}
        if one is None or type(one) in (bool, int, float, str):
            return one
        if isinstance(one, np.ndarray) and not one.dtype.hasobject:
            return {"array": numbered(one)}
        if isinstance(one, np.generic):  # its type decides what it is computed with
            arrays.append(np.asarray(one))
            return {"number": len(arrays) - 1}
        if is_dataclass(one) and not isinstance(one, type):
            return {"fields": {f.name: packed(getattr(one, f.name)) for f in fields(one)}}
        if type(one) is dict:
            return {"dict": [[packed(key), packed(item)] for key, item in one.items()]}
        for name, kind in _CONTAINERS.items():
            if type(one) is kind:
                return {name: [packed(item) for item in one]}
        raise TypeError(f"{type(one).__name__} cannot be written to be read again")

    return packed(value), arrays


def unpack(kind: Any, tree: Any, arrays: list[np.ndarray], given: Mapping[str, object]) -> Any:
    """The value of type `kind`, a hint, of which `pack` made `tree` and `arrays`."""
    if not isinstance(tree, dict):
        return tree
    ((form, inner),) = tree.items()
    if form == "given":
        return given[inner]
    if form in ("array", "number"):
        return arrays[inner] if form == "array" else arrays[inner][()]
    if form == "fields":
        made: Any = next(option for option in _options(kind) if is_dataclass(option))
        hints = get_type_hints(made)
        return made(
            **{name: unpack(hints[name], item, arrays, given) for name, item in inner.items()}
        )
    inside = next((get_args(option) for option in _options(kind) if get_args(option)), ())
    if form == "dict":
        first, second = inside or (Any, Any)
        return {
            unpack(first, key, arrays, given): unpack(second, item, arrays, given)
            for key, item in inner
        }
    # All of one kind, or a tuple of several.
    several = form == "tuple" and Ellipsis not in inside
    hints_of = list(inside) if several and inside else [(inside or (Any,))[0]] * len(inner)
    found = (unpack(hint, item, arrays, given) for hint, item in zip(hints_of, inner, strict=True))
    return _CONTAINERS[form](found)


def _options(kind: Any) -> Iterator[Any]:
    """What a hint allows but None."""
    union = get_origin(kind) in (Union, UnionType)
    yield from (each for each in (get_args(kind) if union else (kind,)) if each is not type(None))
