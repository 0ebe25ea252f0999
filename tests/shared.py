"""What is made once per session, also where the session is several worker processes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` has filled; the first process that asks does, and others wait for it.

    Tests must not write in it. What `make` raises (also a skip) is raised; the next one to ask
    tries again, in another folder.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each worker has a folder of its own in that of the session
    finished = root / f"{name}.finished"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            folder = root / f"{name}.{os.environ.get('PYTEST_XDIST_WORKER', 'one')}"
            while folder.exists():
                folder = folder.with_name(f"{folder.name}-again")
            folder.mkdir()
            make(folder)
            finished.write_text(str(folder), encoding="utf-8")
        return Path(finished.read_text(encoding="utf-8"))
