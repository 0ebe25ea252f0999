"""Which lifecycles are replaced, and what the clamped residual gets back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from iq_export.decide.sinks import fit_sinks, refit
from iq_export.observe.rows import collect_rows
from iq_export.passes.scale_residual import scale_residual
from iq_export.progress import Progress
from tests import planted
from tests.planted import CPU, Planted

QUIET = {"providers": CPU, "progress": Progress(quiet=True)}


def test_lifecycle_above_the_limit_is_kept_as_it_is(tmp_path: Path) -> None:
    data = planted.observe(planted.Decoder(), tmp_path, limit=1e-4)
    (decision,) = data.decisions
    assert not decision.replaced
    assert "above the limit" in decision.reason
    assert "K=" in decision.reason
    assert data.sinks == []
    assert not any(node.domain == "iq" for node in data.load_inserted().graph)


def test_replaced_lifecycle_says_how_constant_it_is(spiky: Planted) -> None:
    (decision,) = spiky.decisions
    assert decision.replaced
    assert "within the limit of 10%" in decision.reason


def test_spike_that_no_norm_reads_is_left(spiky: Planted) -> None:
    (life,) = spiky.lifecycles
    stillborn = replace(life, end=life.birth, death=None)
    (decision,) = fit_sinks(
        spiky.path, spiky.sites, [stillborn], spiky.stats, spiky.windows,
        limit=0.1, seed=0, **QUIET,
    )  # fmt: skip
    assert not decision.replaced
    assert decision.templates is None
    assert "no norm reads it" in decision.reason


def test_refit_has_the_templates_of_the_other_graph(spiky: Planted) -> None:
    """With the stream over 8 the norms' rows stay, what the kv form sets follows."""
    model = spiky.load()
    scale_residual(model, spiky.sites, 3)
    scaled = spiky.save_beside(model, "scaled.onnx")
    (before,) = spiky.decisions
    (after,) = refit(scaled, spiky.sites, [before], spiky.stats, spiky.windows, **QUIET)
    assert after.replaced
    assert after.templates is not None and before.templates is not None
    old, new = before.templates, after.templates
    assert new.deviation == old.deviation
    np.testing.assert_array_equal(new.assignment, old.assignment)
    assert old.key_values is not None and new.key_values is not None
    np.testing.assert_allclose(8 * new.key_values.residual, old.key_values.residual, rtol=1e-4)
    for name, rows in old.norms.items():
        np.testing.assert_allclose(new.norms[name], rows, atol=1e-3)


def test_threshold_separates_sinks_from_other_tokens(delimited: Planted) -> None:
    (sinks,) = delimited.sinks
    life = sinks.lifecycle
    peaks = delimited.stats.down_max[life.birth]
    assert peaks[life.members].min() > sinks.threshold
    assert np.delete(peaks, life.members).max() < sinks.threshold


def test_restore_gives_back_what_the_clamp_took(delimited: Planted) -> None:
    """After the last block the sink rows' residual is that of the untouched graph."""
    (sinks,) = delimited.sinks
    residual = delimited.sites.blocks[sinks.lifecycle.end].mlp.residual
    assert sinks.restore.shape == (sinks.count, 64)
    assert np.abs(sinks.restore).max() > 1
    untouched, restored = (
        collect_rows(path, {name: 64}, delimited.stats, sinks.lifecycle.members,
                     delimited.windows, **QUIET)[name]
        for path, name in ((delimited.path, residual),
                           (delimited.inserted, f"{residual}.SinkRestore.0"))
    )  # fmt: skip
    for template in range(sinks.count):
        mine = sinks.assignment == template
        np.testing.assert_allclose(
            restored[mine].mean(0), untouched[mine].mean(0), rtol=1e-3, atol=1e-2
        )


@pytest.mark.parametrize("block", [1, 2])
def test_the_spike_is_never_written(spiky: Planted, block: int) -> None:
    residual = spiky.sites.blocks[block].mlp.residual
    members = spiky.lifecycles[0].members
    before, after = (
        np.abs(collect_rows(path, {residual: 64}, spiky.stats, members, spiky.windows, **QUIET)
               [residual][:, spiky.decoder.spikes[0].channel]).max()
        for path in (spiky.path, spiky.inserted)
    )  # fmt: skip
    assert before > 100 * after


def test_sinks_that_others_reach_are_not_replaced(spiky: Planted) -> None:
    """A threshold must tell them apart: here one member is made to look like a semantic token."""
    life = spiky.sinks[0].lifecycle
    others = np.setdiff1d(np.arange(spiky.stats.token.size), life.members)
    mixed = replace(life, members=np.append(life.members[:-1], others[0]))
    (decision,) = fit_sinks(
        spiky.path, spiky.sites, [mixed], spiky.stats, spiky.windows,
        limit=10.0, seed=0, providers=CPU, progress=Progress(quiet=True),
    )  # fmt: skip
    assert not decision.replaced
    assert "cannot be detected" in decision.reason
