"""int8 weights, symmetric, one scale per output channel."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from iq_export.formats.base import Codes, WeightFormat, register
from iq_export.formats.gptq import Curvature, compensate
from iq_export.graph.half import HALF_SMALLEST_NORMAL, as_shipped

_LARGEST = 127
# Rows rounded at a time: temporaries are small beside a weight.
_ROWS = 256


class Int8Weights(WeightFormat):
    """Scale `[out]`, that of the largest magnitude."""

    per_channel: ClassVar[bool] = True

    def round(self, weight: np.ndarray, importance: np.ndarray | None = None) -> Codes:
        scale = self.scales(weight)
        codes = np.empty(weight.shape, np.int8)
        for start in range(0, len(weight), _ROWS):
            rows = slice(start, start + _ROWS)
            codes[rows] = np.clip(np.round(weight[rows] / scale), -_LARGEST, _LARGEST)
        return codes, scale

    def compensate(self, weight: np.ndarray, curvature: Curvature) -> Codes:
        scale = self.scales(weight)
        codes = np.empty(weight.shape, np.int8)

        def rounded(row: int, values: np.ndarray) -> np.ndarray:
            code = np.clip(np.round(values / scale), -_LARGEST, _LARGEST)
            codes[row] = code
            return code * scale

        compensate(weight.astype(np.float32), curvature.factor, rounded)
        return codes, scale

    def values(self, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        return np.asarray(codes * scales)

    def attributes(self, in_features: int) -> dict[str, int]:
        return {"axis": 1}

    def constant(
        self, source: ir.TensorProtocol, name: str, importance: np.ndarray | None
    ) -> tuple[ir.TensorProtocol, np.ndarray]:
        """Rounded when it is written: no codes in memory until then."""
        codes = ir.LazyTensor(
            lambda: ir.Tensor(self.round(source.numpy())[0], name=name),
            dtype=self.dtype,
            shape=ir.Shape(source.shape.numpy()),
            name=name,
        )
        return codes, self.scales(source.numpy())

    def scales(self, weight: np.ndarray) -> np.ndarray:
        """float32 `[out]`; a column of zeros gets scale 1 so that it stays exactly zero.

        A column of tiny weights gets half's smallest normal number: it is off by 3e-5 at most.
        """
        top = np.maximum(weight.max(axis=0), -weight.min(axis=0)).astype(np.float32)
        scale = np.maximum(top / np.float32(_LARGEST), np.float32(HALF_SMALLEST_NORMAL))
        return as_shipped(np.where(top > 0, scale, np.float32(1)))


INT8_WEIGHTS = Int8Weights("int8", ir.DataType.INT8, opset=13, compute_capability=0)
register(INT8_WEIGHTS)
