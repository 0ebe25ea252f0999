"""Rounded weights of a whole model, in a folder: none of them stays in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from iq_export.formats.base import StoredCodes


@dataclass(frozen=True)
class CodeFile:
    """Where the codes of a weight are, a name in the folder, and their float32 scales."""

    name: str
    is_int4: bool
    scales: np.ndarray


class CodeStore(Mapping[str, StoredCodes]):
    """By weight name: codes int8 or int4, scales float32."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, CodeFile] = {}

    def add(self, name: str, codes: np.ndarray, scales: np.ndarray) -> None:
        """Write the codes of a weight. Raises OSError if the disk is full."""
        self.folder.mkdir(exist_ok=True)
        file = f"{len(self._files)}.npy"
        np.save(self.folder / file, codes.astype(np.int8))
        self._files[name] = CodeFile(file, codes.dtype == ml_dtypes.int4, scales)

    def files(self, names: Iterable[str]) -> dict[str, CodeFile]:
        """Of these weights."""
        return {name: self._files[name] for name in names}

    def take(self, files: Mapping[str, CodeFile]) -> None:
        """Go on with what another store wrote to the same folder."""
        self._files |= files

    def __getitem__(self, name: str) -> StoredCodes:
        file = self._files[name]

        def read() -> np.ndarray:
            # Not mapped: what is read of a file then stays resident.
            codes = np.load(self.folder / file.name)
            return codes.view(ml_dtypes.int4) if file.is_int4 else codes

        return StoredCodes(read, file.scales)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
