"""Rounded weights of a whole model, in a folder: none of them stays in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

Rounded = tuple[np.ndarray, np.ndarray]


class CodeStore(Mapping[str, Rounded]):
    """Weight name -> codes `[in, out]`, int8 or int4, and float32 scales: read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, tuple[Path, bool]] = {}
        self._scales: dict[str, np.ndarray] = {}

    def add(self, name: str, codes: np.ndarray, scales: np.ndarray) -> None:
        """Write the codes of a weight. Raises OSError if the disk is full."""
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{len(self._files)}.npy"
        np.save(path, codes.astype(np.int8))
        self._files[name] = path, codes.dtype == ml_dtypes.int4
        self._scales[name] = scales

    def __getitem__(self, name: str) -> Rounded:
        path, is_int4 = self._files[name]
        codes = np.load(path)  # not mapped: what is read of a file then stays resident
        return codes.view(ml_dtypes.int4) if is_int4 else codes, self._scales[name]

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
