"""inotify: what is opened, changed or made below a folder, by whatever process and library."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

_MODIFY, _OPEN, _MOVED, _CREATE, _DELETE = 0x2, 0x20, 0xC0, 0x100, 0x200
_ISDIR = 0x40000000
_HEAD = struct.Struct("iIII")


class Watch:
    """Of `root` and the folders below it. One that is only listed is no event."""

    def __init__(self, root: Path) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self._handle = library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._folders = {}
        mask = _MODIFY | _OPEN | _MOVED | _CREATE | _DELETE
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
            number = library.inotify_add_watch(self._handle, os.fsencode(folder), mask)
            if number < 0:
                raise OSError(ctypes.get_errno(), "inotify_add_watch")
            self._folders[number] = folder.relative_to(root).as_posix()

    def close(self) -> list[str]:
        """What happened, in words, each once."""
        found: dict[str, None] = {}
        while True:
            try:
                data = os.read(self._handle, 1 << 16)
            except BlockingIOError:
                break
            while data:
                number, mask, _, length = _HEAD.unpack_from(data)
                name = data[_HEAD.size : _HEAD.size + length].rstrip(b"\0").decode()
                data = data[_HEAD.size + length :]
                what = "reads" if mask & _OPEN else "writes"
                if not (mask & _ISDIR and mask & _OPEN):
                    found[f"{what} outside/{self._folders.get(number, '')}/{name}"] = None
        os.close(self._handle)
        return list(found)
