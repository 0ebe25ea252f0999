"""Checksums of files, which decide whether a download, a plan or a plugin may be used."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

_CHUNK_BYTES = 1 << 20


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in 1 MiB pieces."""
    with path.open("rb") as stream:
        return sha256_stream(stream)


def sha256_stream(stream: BinaryIO) -> str:
    """As `sha256_file`, of a file that is open, from where it stands."""
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
