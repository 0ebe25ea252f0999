"""Child processes: they find programs, modules and libraries where this process does, and never in
the folder that somebody happens to stand in.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# Nobody but the system's owner puts files here; Python 3.10 knows no PYTHONSAFEPATH.
CLEAN_FOLDER = os.path.abspath(os.sep)

_SEARCHED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")
# pip's options that name files, several with spaces between.
_NAMED = ("PIP_FIND_LINKS", "PIP_CONFIG_FILE", "PIP_CERT", "PIP_CLIENT_CERT", "PIP_CACHE_DIR",
          "PIP_CONSTRAINT")  # fmt: skip


def environment(*, package: bool = False) -> dict[str, str]:
    """This process's environment for a child that runs in CLEAN_FOLDER.

    An empty entry of a search path means the current folder, and is left out; relative names are
    made absolute. With `package` the child finds the sources of this package first.
    """
    found = {**os.environ, "PYTHONSAFEPATH": "1"}
    for name in _SEARCHED:
        if name in found:
            entries = filter(None, found[name].split(os.pathsep))
            found[name] = os.pathsep.join(map(os.path.abspath, entries))
    for name in _NAMED:
        if name in found:
            found[name] = " ".join(map(_absolute, found[name].split()))
    if package:
        sources = str(Path(__file__).resolve().parents[1])
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [sources, found.get("PYTHONPATH")]))
    return {name: value for name, value in found.items() if value or name not in _SEARCHED}


def find_program(name: str) -> Path | None:
    """An executable as a child of ours finds it, absolute; `name` may be a path."""
    found = shutil.which(name, path=environment().get("PATH", os.defpath))
    return Path(os.path.abspath(found)) if found else None


def _absolute(name: str) -> str:
    return os.path.abspath(name) if os.path.exists(name) else name
