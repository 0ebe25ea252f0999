"""The shapes an engine accepts: minimum, optimum and maximum of batch, sequence and past."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from iq_export.errors import EngineError, UsageError
from iq_export.graph.interface import BATCH, PAST, SEQ, TOTAL

# The axes that a profile gives sizes; that of TOTAL follows.
AXES = (BATCH, SEQ, PAST)
# Sizes are 32-bit in TensorRT.
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Range:
    """Sizes of one axis, in rows or tokens: `min <= opt <= max`."""

    min: int
    opt: int
    max: int

    def __add__(self, other: Range) -> Range:
        return Range(self.min + other.min, self.opt + other.opt, self.max + other.max)


@dataclass(frozen=True)
class Profile:
    """One optimization profile. Prefill needs `past.min == 0`, decoding needs `seq.min == 1`.

    Raises UsageError if a range is not `min <= opt <= max` or is below what the axis can be.
    """

    batch: Range = Range(1, 1, 4)
    seq: Range = Range(1, 128, 512)
    past: Range = Range(0, 512, 1024)

    def __post_init__(self) -> None:
        for axis in AXES:
            lowest = 0 if axis == PAST else 1
            _check_range(axis, getattr(self, axis), lowest)

    @classmethod
    def parse(cls, minimum: str = "", optimum: str = "", maximum: str = "") -> Profile:
        """Read trtexec-like texts `batch:1,seq:128,past:0`.

        An axis left out of a text keeps its default, moved to the nearest value that the texts'
        own sizes allow. UsageError for an unknown axis, a size that is no number, or min > max.
        """
        sizes = [_parse_sizes(text) for text in (minimum, optimum, maximum)]
        return cls(**{axis: _complete(axis, *(s.get(axis) for s in sizes)) for axis in AXES})

    @classmethod
    def from_json(cls, data: Mapping[str, Mapping[str, int]]) -> Profile:
        """The profile that `to_json` wrote; KeyError or TypeError if it did not."""
        return cls(**{axis: Range(**data[axis]) for axis in AXES})

    def to_json(self) -> dict[str, dict[str, int]]:
        """A JSON object: axis -> {min, opt, max}."""
        return asdict(self)

    def axis(self, name: str) -> Range:
        """The range of the dynamic axis `name`; KeyError for an axis this profile does not know."""
        if name == TOTAL:
            return self.past + self.seq
        if name not in AXES:
            raise KeyError(name)
        range_: Range = getattr(self, name)
        return range_

    def shapes(
        self, tensor: str, dims: list[int | str]
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The min, opt and max shape of an input with `dims`: sizes, or names of dynamic axes.

        EngineError if an axis is not one of batch, seq, past or total.
        """
        ranges = []
        for dim in dims:
            if isinstance(dim, int):
                ranges.append(Range(dim, dim, dim))
                continue
            try:
                ranges.append(self.axis(dim))
            except KeyError:
                raise EngineError(
                    f"input '{tensor}' has the dynamic axis '{dim}', for which there is no shape: "
                    f"only {', '.join(AXES)} and {TOTAL} are known."
                ) from None
        return (
            tuple(r.min for r in ranges),
            tuple(r.opt for r in ranges),
            tuple(r.max for r in ranges),
        )


def _check_range(axis: str, sizes: Range, lowest: int) -> None:
    if not sizes.min <= sizes.opt <= sizes.max:
        raise UsageError(
            f"shape of '{axis}' must satisfy min <= opt <= max, "
            f"but is min {sizes.min}, opt {sizes.opt}, max {sizes.max}."
        )
    if sizes.min < lowest:
        raise UsageError(f"shape of '{axis}' must be at least {lowest}, but min is {sizes.min}.")
    if sizes.max > _LARGEST:
        raise UsageError(f"shape of '{axis}' must be at most {_LARGEST}, but max is {sizes.max}.")


def _parse_sizes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = item.partition(":")
        if name not in AXES:
            raise UsageError(
                f"unknown axis '{name}' in shapes '{text}': the axes are {', '.join(AXES)}, "
                f"written like batch:1,seq:128,past:0."
            )
        if not size.isascii() or not size.isdigit() or len(size) > len(str(_LARGEST)):
            raise UsageError(f"'{item}' in shapes '{text}' is not axis:size, like seq:128.")
        sizes[name] = int(size)
    return sizes


def _complete(axis: str, low: int | None, mid: int | None, high: int | None) -> Range:
    default: Range = getattr(Profile, axis)
    top = high if high is not None else max(default.max, mid or 0, low or 0)
    bottom = low if low is not None else min(default.min, top, mid if mid is not None else top)
    middle = mid if mid is not None else min(max(default.opt, bottom), top)
    return Range(bottom, middle, top)
