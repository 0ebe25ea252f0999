"""Ranges of what convolutions read, in front of the first block and behind the last one."""

from __future__ import annotations

import numpy as np

from iq_export.decide.job import Job
from iq_export.decide.search import CLIPS
from iq_export.decisions import Decisions
from iq_export.errors import GraphError
from iq_export.formats.base import ActivationFormat
from iq_export.observe.walk import Observer, Values, observe
from iq_export.passes.order import ROUNDED

_SAMPLED = 1 << 15  # values of each tensor, of all windows together


class ConvolutionObserver(Observer):
    """Of each tensor: the largest magnitude, and evenly spaced values of the first `count` windows
    of a walk."""

    def __init__(self, names: list[str], count: int) -> None:
        self.names, self.of = names, range(count)
        self.absmax = dict.fromkeys(names, 0.0)
        self.sampled: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def add(self, number: int, values: Values) -> None:
        for name, value in values.items():
            flat = value.ravel()
            step = max(1, flat.size * len(self.of) // _SAMPLED)
            self.absmax[name] = max(self.absmax[name], float(np.abs(flat).max()))
            self.sampled[name].append(flat[number % step :: step])


def convolution_scales(job: Job, chosen: Decisions) -> Decisions:
    """`chosen` with a scale for what every convolution reads, as the rounded graph has it.

    Raises GraphError for a tensor that is zero throughout.
    """
    format_ = chosen.recipe.activations
    if format_ is None or not chosen.recipe.rounds_convolutions or not job.sites.convolutions:
        return chosen
    inputs = {str(value.name): value for value in job.traced.graph.inputs}
    names = list(dict.fromkeys(each.input for each in job.sites.convolutions))
    inside = [name for name in names if name not in inputs]
    seen = ConvolutionObserver(inside, len(job.data.windows))
    observe(job.at(ROUNDED, chosen), [seen], job.data.windows, **job.options)
    given = ConvolutionObserver([n for n in names if n in inputs], len(job.data.windows))
    for number, window in enumerate(job.data.windows):
        given.add(number, {name: np.asarray(window.values) for name in given.names})
    scales = {
        name: _scale(name, each.absmax[name], np.concatenate(each.sampled[name]), format_)
        for each in (given, seen)
        for name in each.names
    }
    return chosen.with_activations(scales)


def _scale(name: str, absmax: float, values: np.ndarray, format_: ActivationFormat) -> float:
    """That of least squared error of the tensor itself."""
    if absmax <= 0:
        raise GraphError(
            f"Tensor {name!r} is zero in all calibration windows, so it has no range; calibrate on "
            "what resembles the model's use."
        )
    scales = [format_.scale(absmax * clip) for clip in CLIPS]
    errors = [float(((format_.rounded(values, s) - values) ** 2).sum()) for s in scales]
    return scales[int(np.argmin(errors))]
