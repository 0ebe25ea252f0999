"""A format that no recipe of this project names: int8 weights whose scales are powers of two.

It shows what a new one takes: this file, a recipe and a test.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from iq_export.formats.base import register
from iq_export.formats.int8_weights import Int8Weights


class PowerOfTwoWeights(Int8Weights):
    """Scales are rounded up, so that nothing is clipped."""

    def scales(self, weight: np.ndarray) -> np.ndarray:
        return np.exp2(np.ceil(np.log2(super().scales(weight)))).astype(np.float32)


POWER_OF_TWO = PowerOfTwoWeights("int8-2^n", ir.DataType.INT8, opset=13, compute_capability=0)
register(POWER_OF_TWO)
