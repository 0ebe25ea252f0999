"""Calls into the test libraries (plugins/test/c_api.cpp), numpy in and out."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import ml_dtypes
import numpy as np

# Order of iq::Element in plugins/include/iq/kernels.h.
ELEMENTS = {"float32": 0, "float16": 1, "bfloat16": 2}
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Rows:
    """A test library; `workers` per row on a CPU, and tensors `shift` elements off alignment."""

    library: ctypes.CDLL
    workers: int = 32
    shift: int = 0

    def _call(self, name: str, *arguments: object) -> None:
        if hasattr(self.library, "iq_set_workers"):
            self.library.iq_set_workers(ctypes.c_int64(self.workers))
        status = getattr(self.library, name)(*map(_argument, arguments))
        assert status == 0, f"{name} gives CUDA error {status}"

    def detect(
        self,
        x: np.ndarray,
        first: np.ndarray,
        valid: np.ndarray,
        templates: np.ndarray,
        threshold: float,
    ) -> np.ndarray:
        index = np.full(len(x), -7, np.int32)
        sizes = (*x.shape, len(templates))
        self._call("iq_detect", ELEMENTS[x.dtype.name], x, first, valid, templates, threshold,
                   *map(ctypes.c_int64, (*sizes, self.shift)), index)  # fmt: skip
        return index

    def change(
        self, x: np.ndarray, index: np.ndarray, templates: np.ndarray, restore: bool
    ) -> np.ndarray:
        y = np.full_like(x, -7)
        sizes = (*x.shape, len(templates))
        self._call("iq_change", ELEMENTS[x.dtype.name], ctypes.c_bool(restore), x, index, templates,
                   *map(ctypes.c_int64, (*sizes, self.shift)), y)  # fmt: skip
        return y

    def add_norm(
        self,
        x: np.ndarray,
        branch: np.ndarray,
        weight: np.ndarray,
        bias: np.ndarray | None,
        index: np.ndarray | None,
        templates: np.ndarray | None,
        epsilon: float,
        scale: float,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """sum, codes, and (on a CPU) what is quantized."""
        total, codes = np.full_like(x, -7), np.full(x.shape, -7, np.int8)
        values = np.full(x.shape, -7, np.float32)
        sizes = (*x.shape, 0 if templates is None else len(templates))
        self._call("iq_add_norm", ELEMENTS[x.dtype.name], x, branch, weight, bias, index, templates,
                   epsilon, scale, *map(ctypes.c_int64, (*sizes, self.shift)), total, codes,
                   values)  # fmt: skip
        return total, codes, values

    def silu_mul(
        self,
        gate: np.ndarray,
        up: np.ndarray,
        index: np.ndarray | None,
        channels: np.ndarray | None,
        block: int,
        factor: float,
        scale: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """codes, and the side channels `[rows, sides]`."""
        codes = np.full(gate.shape, -7, np.int8)
        sides = 0 if channels is None else len(channels)
        side = np.full((len(gate), sides), -7, gate.dtype)
        self._call("iq_silu_mul", ELEMENTS[gate.dtype.name], gate, up, index, channels,
                   ctypes.c_int64(sides), block, factor, scale,
                   *map(ctypes.c_int64, (*gate.shape, self.shift)), codes,
                   None if channels is None else side)  # fmt: skip
        return codes, side


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def _argument(value: object) -> object:
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p() if value is None else value
