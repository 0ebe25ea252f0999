"""The formats of a product: what multiplies what."""

from __future__ import annotations

from dataclasses import dataclass

from iq_export.formats.base import ActivationFormat, WeightFormat
from iq_export.formats.int8_activations import INT8
from iq_export.formats.int8_weights import INT8_WEIGHTS


@dataclass(frozen=True)
class Rounding:
    """None for what is not rounded."""

    weights: WeightFormat | None
    activations: ActivationFormat | None

    @property
    def simulated(self) -> bool:
        """Whether no engine multiplies with these codes: only the accuracy is what it would be."""
        if self.activations is None:
            return False
        return self.weights is None or self.weights.name not in self.activations.multiplied_with


W8A8 = Rounding(INT8_WEIGHTS, INT8)
