"""Three numbers per block and token, in the order of the windows."""

from __future__ import annotations

import numpy as np
import pytest

from iq_export.observe.samples import Window
from iq_export.observe.segments import segments
from iq_export.observe.token_stats import TokenStats, observe_tokens
from iq_export.observe.walk import walk
from iq_export.progress import Progress
from tests.planted import CPU, Planted


def observe(data: Planted, windows: list[Window]) -> TokenStats:
    return observe_tokens(
        data.path, data.sites, windows, providers=CPU, progress=Progress(quiet=True)
    )


@pytest.fixture(scope="module")
def windows(spiky: Planted) -> list[Window]:
    return [Window(w.ids[:n], False) for w, n in zip(spiky.windows, (12, 3, 40), strict=False)]


def test_columns_tell_where_they_come_from(spiky: Planted, windows: list[Window]) -> None:
    stats = observe(spiky, windows)
    assert stats.window.tolist() == [0] * 12 + [1] * 3 + [2] * 40
    assert stats.position.tolist() == [*range(12), *range(3), *range(40)]
    assert stats.token.tolist() == [token for window in windows for token in window.ids]


def test_numbers_are_those_of_the_values(spiky: Planted, windows: list[Window]) -> None:
    stats = observe(spiky, windows)
    assert stats.down_max.shape == stats.residual_max.shape == (4, 55)
    for block in spiky.sites.blocks:
        down, residual = block.mlp.output.input, block.mlp.residual
        runs = walk(spiky.path, [down, residual], windows, progress=Progress(quiet=True))
        for number, values in runs:
            mine = stats.window == number
            magnitude = np.abs(values[residual])
            np.testing.assert_allclose(
                stats.down_max[block.index, mine], np.abs(values[down]).max(1), rtol=1e-4
            )
            np.testing.assert_allclose(
                stats.residual_max[block.index, mine], magnitude.max(1), rtol=1e-4
            )
            channel = stats.residual_channel[block.index, mine]
            np.testing.assert_allclose(
                magnitude[np.arange(len(magnitude)), channel], magnitude.max(1), rtol=1e-4
            )


def test_small_pieces_change_nothing(
    spiky: Planted, windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every window passes one small piece of the graph after the other."""
    expected = observe(spiky, windows)
    monkeypatch.setitem(segments.__kwdefaults__, "budget", 1)
    found = observe(spiky, windows)
    for name in ("down_max", "residual_max", "residual_channel"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4)


def test_spikes_are_seen(spiky: Planted) -> None:
    first = spiky.stats.position == 0
    assert spiky.stats.down_max[1, first].min() > 50 * spiky.stats.down_max[1, ~first].max()
    assert (spiky.stats.residual_channel[1, first] == spiky.decoder.spikes[0].channel).all()
