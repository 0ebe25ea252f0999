"""What the finished steps of a job gave, for the run after one that was killed or failed.

    FOLDER/journal.json     the job's key, and the records in the order in which they were made
    FOLDER/N.npz            a record: a value, packed
    FOLDER/...              files that a record names

A record counts from when the journal names it, with the checksums of its files. What is damaged,
and all that came after it, is not used; neither is what another job left.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_type_hints

import numpy as np

from iq_export.bundle.manifest import write_atomically
from iq_export.checksum import sha256_stream
from iq_export.errors import BundleError
from iq_export.files import open_inside, sync
from iq_export.packed import pack, unpack

P = ParamSpec("P")
T = TypeVar("T")
_JOURNAL = "journal.json"
_RECORD = re.compile(r"([0-9]+)\.npz")
Say = Callable[[str], None]


class Checkpoint:
    """Results of a job in `folder`, which is made; None: nothing is kept.

    `key` stands for all that the results depend on. `given` are objects of this run that are part
    of results, by name: in a record stands the name.
    """

    def __init__(
        self, folder: Path | None = None, key: str = "", say: Say = lambda _: None
    ) -> None:
        self.folder, self._key, self._say = folder, key, say
        self.given: dict[str, object] = {}
        self._records: dict[str, dict[str, str]] = {}  # name -> file -> SHA-256
        if folder is not None:
            if folder.is_symlink():  # what it leads to is not ours to clear
                folder.unlink()
            folder.mkdir(exist_ok=True)
            self._records = self._found()
            self._write()
            self._clear()

    def step(self, name: str, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `make` returns: as an earlier run kept it, or made now, and kept.

        It is of the type that `make` is annotated to return.
        """
        if name in self._records:
            self.say_taken(name)
            found: T = self.get(name, get_type_hints(make)["return"])
            return found
        value = make(*args, **kwargs)
        self.put({name: value})
        return value

    def say_taken(self, what: str) -> None:
        """Tell people that `what` is not made again."""
        self._say(f"taken from the run that was interrupted: {what}")

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def get(self, name: str, kind: Any) -> Any:
        """The value of a record that is there, of type `kind`, a hint."""
        assert self.folder is not None
        file = next(iter(self._records[name]))
        with (
            open_inside(self.folder, file) as stream,
            np.load(stream, allow_pickle=False) as record,
        ):
            tree = json.loads(bytes(record["tree"]))
            arrays = [record[str(number)] for number in range(len(record.files) - 1)]
        return unpack(kind, tree, arrays, self.given)

    def put(
        self, values: Mapping[str, object], *, files: Iterable[Path] = (), drop: str | None = None
    ) -> None:
        """Keep `values` by name, all or none of them, and forget the record `drop`.

        `files`, which lie in the folder, belong to the last of them. Raises OSError if the disk is
        full.
        """
        if self.folder is None:
            return
        number = 1 + max(
            (int(_RECORD.sub(r"\1", next(iter(f)))) for f in self._records.values()), default=-1
        )
        for name, value in values.items():
            path = self.folder / f"{number}.npz"
            number += 1
            tree, arrays = pack(value, self.given)
            with path.open("wb") as stream:
                named: dict[str, Any] = {str(n): array for n, array in enumerate(arrays)}
                text = np.frombuffer(json.dumps(tree).encode(), np.uint8)
                np.savez(stream, tree=text, **named)
                stream.flush()
                os.fsync(stream.fileno())
            self._records[name] = {path.name: self._digest(path.name)}
        for path in files:
            sync(path)
            local = path.relative_to(self.folder).as_posix()
            self._records[name][local] = self._digest(local)
        gone = self._records.pop(drop, {}) if drop is not None else {}
        self._write()
        for local in gone:
            (self.folder / local).unlink(missing_ok=True)

    def _digest(self, local: str) -> str:
        assert self.folder is not None
        with open_inside(self.folder, local) as stream:
            return sha256_stream(stream)

    def _write(self) -> None:
        assert self.folder is not None
        journal = {"key": self._key, "records": list(self._records.items())}
        write_atomically(self.folder / _JOURNAL, json.dumps(journal, indent=1) + "\n")
        sync(self.folder)

    def _found(self) -> dict[str, dict[str, str]]:
        """The records that an earlier run of the same job left, up to the first damaged one."""
        assert self.folder is not None
        try:
            with open_inside(self.folder, _JOURNAL) as stream:
                journal = json.load(stream)
            key, records = journal["key"], [(str(name), dict(f)) for name, f in journal["records"]]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError, BundleError):
            self._say(f"{self.folder} is damaged: nothing is taken from there")
            return {}
        if key != self._key:
            self._say(
                f"{self.folder} is of a run with another model, text, option or version: it is "
                "removed"
            )
            return {}
        whole: dict[str, dict[str, str]] = {}
        for name, files in records:
            try:
                if not files or any(
                    self._digest(local) != digest for local, digest in files.items()
                ):
                    raise ValueError
            except (OSError, ValueError, BundleError):
                self._say(f"{self.folder} is damaged: what is whole is taken from there")
                break
            whole[name] = files
        return whole

    def _clear(self) -> None:
        """Remove what no record names."""
        assert self.folder is not None
        known = {_JOURNAL, *(local for files in self._records.values() for local in files)}
        for path in sorted(self.folder.rglob("*"), reverse=True):  # a folder after what is in it
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.folder).as_posix() not in known:
                path.unlink()


def job_key(*parts: object) -> str:
    """A checksum of `parts`, values that `packed.pack` takes, and of the code that uses them."""
    tree, arrays = pack(list(parts), {})
    digest = hashlib.sha256(json.dumps(tree).encode())
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
