"""The limits of half precision."""

from __future__ import annotations

import numpy as np

HALF_MAX = float(np.finfo(np.float16).max)  # 65504
# Below it half loses digits: 6.1e-5.
HALF_SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)


def as_shipped(scale: np.ndarray) -> np.ndarray:
    """Scales ship in half: round the weights by the very scale that will multiply them.

    float32, of the same shape; what half cannot hold is kept, and refused when the graph is halved.
    """
    normal = (scale >= HALF_SMALLEST_NORMAL) & (scale <= HALF_MAX)
    with np.errstate(over="ignore"):
        return np.where(normal, scale.astype(np.float16), scale).astype(np.float32)
