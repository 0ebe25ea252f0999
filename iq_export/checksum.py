"""Checksums of files, which decide whether a download, a plan or a plugin may be used."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from iq_export.errors import BundleError

_CHUNK_BYTES = 1 << 20


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in 1 MiB pieces."""
    with path.open("rb") as stream:
        return sha256_stream(stream)


def sha256_stream(stream: BinaryIO) -> str:
    """Hexadecimal SHA-256 of what is left of `stream`, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def check_files(folder: Path, digests: dict[str, str]) -> None:
    """Raise BundleError unless the files in `folder`, by name, are those that this run wrote or
    checked."""
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != digest:
            raise BundleError(
                f"another program changed {path} while this run used it: nothing was written, "
                "compile again"
            )
