"""Static int8 activations, symmetric, one scale per tensor; and those that use fewer codes.

6 and 4 bits are for study: int8 codes behind a Clip, so that what a type of fewer bits would lose
is lost, and nothing runs faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from iq_export.formats import qdq
from iq_export.formats.base import ActivationFormat, register
from iq_export.graph.edit import constant, insert_behind

_TYPE = np.iinfo(np.int8)


@dataclass(frozen=True)
class IntegerActivations(ActivationFormat):
    """Codes from `-largest - 1` to `largest`, stored as int8."""

    def rounded(self, rows: np.ndarray, scale: float) -> np.ndarray:
        codes = rows * np.float32(1 / scale)
        np.clip(np.round(codes, out=codes), -self.largest - 1, self.largest, out=codes)
        codes *= np.float32(scale)
        return codes

    def write(self, graph: ir.Graph, value: ir.Value, scale: float) -> ir.Value:
        name = str(value.name)
        if self.largest < _TYPE.max:
            value = self._clipped(graph, value, scale)
        return qdq.activation_pair(graph, value, scale, self.dtype, name=name)

    def _clipped(self, graph: ir.Graph, value: ir.Value, scale: float) -> ir.Value:
        """`value` bounded so that its codes are."""
        low = constant(
            graph, f"{value.name}.low", np.array(-(self.largest + 1) * scale, np.float32)
        )
        high = constant(graph, f"{value.name}.high", np.array(self.largest * scale, np.float32))
        clip = ir.node("Clip", [value, low, high], name=f"{value.name}/clip")
        clip.outputs[0].name = f"{value.name}.clipped"
        clip.outputs[0].shape = value.shape
        clip.outputs[0].dtype = value.dtype or ir.DataType.FLOAT
        insert_behind(graph, value, clip)
        return clip.outputs[0]


def _activations(bits: int, multiplied_with: frozenset[str], mlp_clip: float) -> IntegerActivations:
    return IntegerActivations(
        f"int{bits}", ir.DataType.INT8, opset=13, compute_capability=0,
        largest=2 ** (bits - 1) - 1, multiplied_with=multiplied_with, mlp_clip=mlp_clip,
    )  # fmt: skip


INT8 = _activations(8, frozenset({"int8"}), 0.25)
register(INT8, _activations(6, frozenset(), 0.75), _activations(4, frozenset(), 1.0))
