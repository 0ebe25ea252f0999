"""A folder as one tar cut into files of a given size, for where transfers are limited.

On the other side `sha256sum -c SHA256SUMS && cat gpu_check.tar.* | tar -x` puts it together.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

from iq_export.bundle.manifest import write_atomically

PREFIX, SUMS = "gpu_check.tar", "SHA256SUMS"


class _Cutter(io.RawIOBase):
    """A stream that starts a new file whenever one is full."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size, self._left = folder, size, 0
        self._file: io.BufferedWriter | None = None
        self._digest = hashlib.sha256()
        self.sums: list[tuple[str, str]] = []

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        view = memoryview(data)
        while view:
            if self._left == 0:
                self._finish()
                name = f"{PREFIX}.{len(self.sums):03d}"
                self._file, self._left = (self._folder / name).open("wb"), self._size
                self._digest = hashlib.sha256()
            assert self._file is not None
            piece, view = view[: self._left], view[self._left :]
            self._file.write(piece)
            self._digest.update(piece)
            self._left -= len(piece)
        return len(data)

    def _finish(self) -> None:
        if self._file is not None:
            self.sums.append((self._digest.hexdigest(), Path(self._file.name).name))
            self._file.close()
            self._file = None

    def close(self) -> None:
        self._finish()
        super().close()


def split(folder: Path, out: Path, part_bytes: int) -> list[Path]:
    """Write `folder` into `out` as parts of `part_bytes`, and their checksums; returns the parts.

    The tar's one root is the folder's name. Numbers have three digits: `cat` sorts them.
    """
    out.mkdir(parents=True)
    with (
        _Cutter(out, part_bytes) as cutter,
        tarfile.open(fileobj=cutter, mode="w|") as tar,
    ):
        tar.add(folder, arcname=folder.name)
    write_atomically(out / SUMS, "".join(f"{digest}  {name}\n" for digest, name in cutter.sums))
    return [out / name for _, name in cutter.sums]
