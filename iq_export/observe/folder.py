"""The files of one kind below a folder of calibration or evaluation data."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from iq_export.errors import DataError


def files_below(folder: Path, endings: Collection[str], what: str) -> list[Path]:
    """The files below `folder` whose names end in one of `endings`, in the order of their paths.

    Hidden files and folders are left out, links to folders, and what is no regular file. Raises
    DataError if there is none; what: their kind, for the message.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: give a folder with a {what} in it")
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(place, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in endings and path.is_file()]
    if not found:
        raise DataError(
            f"{folder} has no {what}: give a folder with files named *{', *'.join(endings)}"
        )
    return sorted(found)
