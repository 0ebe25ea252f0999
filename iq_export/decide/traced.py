"""Look at the traced graph, once: all that a later step asks of it."""

from __future__ import annotations

from dataclasses import dataclass

from iq_export.decide.job import FORM_WINDOWS, Calibration, Run
from iq_export.graph.half import HALF_MAX
from iq_export.observe.peaks import PeakObserver
from iq_export.observe.ranges import MagnitudeObserver, TensorStats
from iq_export.observe.samples import Window
from iq_export.observe.tail import Tail
from iq_export.observe.text_check import SurpriseObserver
from iq_export.observe.token_stats import TokenObserver, TokenStats
from iq_export.observe.walk import Observer, Values, observe
from iq_export.passes.order import Lowered


@dataclass(frozen=True)
class Seen:
    """What one walk over the traced graph tells: `stats` of the calibration's tokens and of those
    that were `heldout` (None: there are none), magnitudes of the products' inputs `before`
    anything is changed, a warning about the text, the largest q.k by `Attention` node (none unless
    half precision must hold them), and rows of the graph's `tail` on the first windows."""

    stats: TokenStats
    heldout: TokenStats | None
    before: dict[str, TensorStats]
    surprise: str | None
    peaks: dict[str, float]
    tail: list[Values]


def observed(base: Lowered, data: Calibration, dtype: str, options: Run) -> Seen:
    """Walk the traced graph over all windows. Raises GraphError as `walk` does."""
    first = min(FORM_WINDOWS, len(data.windows))
    tokens = TokenObserver(base.sites, data.all)
    widths = {linear.input: linear.in_features for linear in base.sites.linears}
    magnitudes = MagnitudeObserver(widths, len(data.windows))
    text = [window for window in data.windows if isinstance(window, Window)]
    surprise = SurpriseObserver(text) if text else None
    tail = Tail(base.model, [{} for _ in range(first)], options["providers"])
    observers: list[Observer] = [tokens, magnitudes, tail]
    observers += [] if surprise is None else [surprise]
    heldout = TokenObserver(base.sites, data.heldout, len(data.all)) if data.heldout else None
    observers += [] if heldout is None else [heldout]
    peaks = PeakObserver(base.model, first if dtype == "fp16" else 0, HALF_MAX / 2)
    observers.append(peaks)
    observe(base.model, observers, [*data.all, *data.heldout], **options)
    return Seen(
        tokens.stats,
        heldout.stats if heldout is not None else None,
        magnitudes.stats,
        None if surprise is None else surprise.warning(),
        peaks.peaks,
        tail.rows,
    )
