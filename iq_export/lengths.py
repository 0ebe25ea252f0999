"""Lengths that are asked for against the positions a model has: refused, shortened or remarked on.

What is asked for beyond a hard limit (`model.limits`) is refused; a default is shortened, with a
note; what lies beyond the length that a model was made for is done, with a note.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from iq_export.engine.profile import Profile, Range
from iq_export.errors import DataError, UsageError
from iq_export.graph.vocabulary import position_rows
from iq_export.model.limits import PositionLimit, position_limit, table_limit
from iq_export.run.assets import read_object

DEFAULT_LENGTH = 512


def bundle_limit(folder: Path, graph: Path) -> PositionLimit | None:
    """The limit that the config.json in `folder` states, or the table of positions in `graph`, if
    that is lower or the only hard one; None without either.

    Raises ModelError if that is damaged.
    """
    stated = position_limit(read_object(folder / "config.json"))
    rows = position_rows(graph)
    if rows is None or (stated is not None and stated.hard and stated.positions <= rows):
        return stated
    return table_limit(rows)


def window_length(asked: int | None, limit: PositionLimit | None) -> tuple[int, list[str]]:
    """Tokens of a window, and notes: what was asked for, else 512 or the model's positions.

    Raises UsageError for a length beyond a hard limit.
    """
    length = asked or DEFAULT_LENGTH
    if limit is None or length <= limit.positions:
        return length, []
    if not asked:
        return limit.positions, [
            f"windows of {limit.positions} tokens, not {length}: the model has {_positions(limit)}"
        ]
    if limit.hard:
        raise UsageError(
            f"windows of {length} tokens are too long: the model has {_positions(limit)}. Give "
            f"--length {limit.positions} or less."
        )
    return length, [f"windows of {length} tokens are longer than the model's {_positions(limit)}"]


def engine_profile(profile: Profile, limit: PositionLimit | None) -> tuple[Profile, list[str]]:
    """The shapes of an engine, and notes: `seq` and `past` together stay within the positions.

    An axis that has its default is shortened. Raises UsageError for shapes that were asked for and
    lie beyond a hard limit.
    """
    if limit is None or profile.seq.max + profile.past.max <= limit.positions:
        return profile, []
    most = limit.positions
    fitted = profile
    if profile.seq == Profile.seq:
        both = profile.past == Profile.past
        room = max(most // 2, 1) if both else most - profile.past.max
        fitted = replace(fitted, seq=_shortened(profile.seq, room))
    if profile.past == Profile.past:
        fitted = replace(fitted, past=_shortened(profile.past, most - fitted.seq.max))
    shapes = f"seq:{fitted.seq.max},past:{fitted.past.max}"
    if fitted.seq.max + fitted.past.max <= most:
        return fitted, [f"the engine takes at most {shapes}: the model has {_positions(limit)}"]
    asked = f"seq:{profile.seq.max},past:{profile.past.max}"
    if limit.hard:
        raise UsageError(
            f"an engine for {asked} would go beyond the model: it has {_positions(limit)}. Let "
            f"seq and past of --maxShapes together be at most {most}."
        )
    return profile, [f"the engine takes {asked}, more than the model's {_positions(limit)}"]


def generated(prompt: int, wanted: int, limit: PositionLimit | None) -> tuple[int, list[str]]:
    """How many tokens may follow a prompt of so many tokens, and notes.

    Raises DataError if the prompt alone goes beyond a hard limit.
    """
    # The last token that is generated is never fed back.
    if limit is None or prompt + wanted - 1 <= limit.positions:
        return wanted, []
    if not limit.hard:
        return wanted, [
            f"{prompt} tokens and {wanted} new ones are more than the model's {_positions(limit)}"
        ]
    if prompt > limit.positions:
        raise DataError(
            f"The prompt has {prompt} tokens, and the model has {_positions(limit)}: shorten it."
        )
    room = limit.positions - prompt + 1
    return room, [f"at most {room} new tokens: the model has {_positions(limit)}"]


def _positions(limit: PositionLimit) -> str:
    return f"{limit.positions} positions ({limit.reason})"


def _shortened(sizes: Range, most: int) -> Range:
    """`sizes` with none above `most`, where that leaves its minimum; else as they are."""
    if most < sizes.min:
        return sizes
    return Range(sizes.min, min(sizes.opt, most), min(sizes.max, most))
