"""Templates: the smallest K that explains held-out sinks, or a lifecycle that is not constant."""

from __future__ import annotations

import numpy as np
import pytest

from iq_export.observe.rows import collect_rows
from iq_export.observe.samples import Window
from iq_export.progress import Progress
from iq_export.sinks.fit import MAX_TEMPLATES, fit, means
from iq_export.sinks.lifecycle import Lifecycle
from iq_export.sinks.templates import SinkTemplates, norm_outputs
from tests.planted import CPU, Planted

WIDTH = 16


def lifecycle(members: int) -> Lifecycle:
    return Lifecycle(
        birth=1, death=3, end=3, channel=0, threshold=10.0, force_first=True, clamp_blocks=(1, 3),
        members=np.arange(members), down_peak=100.0, down_median=1.0, residual_peak=1000.0,
        first_rate=1.0,
    )  # fmt: skip


def fitted(kinds: int, *, tokens: int = 64, spread: float = 0.01, seed: int = 0) -> SinkTemplates:
    """Fit to `tokens` rows of `kinds` different unit vectors, each row off by `spread`."""
    rng = np.random.default_rng(1)
    labels = np.arange(tokens) % kinds
    rng.shuffle(labels)

    def rows() -> np.ndarray:
        centres = np.eye(WIDTH)[:kinds] * 5
        noise = rng.normal(size=(tokens, WIDTH)) / np.sqrt(WIDTH)
        return (centres[labels] + 5 * spread * noise).astype(np.float32)

    return fit(
        lifecycle(tokens), rows(), {"a": rows(), "b": 3 * rows()}, 10.0, limit=0.1, seed=seed
    )


@pytest.mark.parametrize("kinds", [1, 2, 3, 4])
def test_smallest_k_that_explains_the_sinks(kinds: int) -> None:
    found = fitted(kinds)
    assert found.count == kinds
    assert found.is_constant(0.1)
    assert found.mean_deviation == pytest.approx(0.01, rel=0.3)
    assert found.detection.shape == (kinds, WIDTH)
    assert {name: rows.shape for name, rows in found.norms.items()} == {
        "a": (kinds, WIDTH),
        "b": (kinds, WIDTH),
    }
    assert all(rows.dtype == np.float32 for rows in (found.detection, *found.norms.values()))
    assert len(found.template_spread) == kinds
    assert max(found.template_spread) < 0.02


def test_templates_of_one_index_belong_together() -> None:
    """Template k of every site and of the detection describes the same tokens."""
    found = fitted(3)
    order = found.detection.argmax(1)
    for rows in found.norms.values():
        np.testing.assert_array_equal(rows.argmax(1), order)
    np.testing.assert_array_equal(np.bincount(found.assignment) > 0, [True] * 3)


def test_tokens_that_are_not_constant() -> None:
    found = fitted(1, spread=0.5)
    assert not found.is_constant(0.1)
    assert found.is_constant(0.9)
    assert found.mean_deviation > 0.3


def test_deviation_is_measured_on_held_out_tokens() -> None:
    """Few tokens, many templates: each would explain its own tokens, but not the next ones."""
    found = fitted(8, tokens=32, spread=0.01)
    assert found.count <= MAX_TEMPLATES
    assert not found.is_constant(0.1)


def test_few_tokens_get_one_template() -> None:
    found = fitted(2, tokens=8)
    assert found.count == 1
    assert not found.is_constant(0.1)


def test_one_token_is_its_own_template() -> None:
    found = fitted(1, tokens=1, spread=0)
    assert found.count == 1
    assert found.mean_deviation == pytest.approx(0, abs=1e-6)


def test_the_worst_site_decides() -> None:
    found = fitted(1)
    found.deviation["b"] = 0.3
    assert found.mean_deviation == 0.3
    assert not found.is_constant(0.1)


def test_same_seed_same_templates() -> None:
    first, again = fitted(3, seed=4), fitted(3, seed=4)
    np.testing.assert_array_equal(first.detection, again.detection)
    np.testing.assert_array_equal(first.assignment, again.assignment)


def test_means_in_double_precision() -> None:
    rows = np.full((1 << 12, 1), 1e8, np.float32)
    rows[::2] += 8
    np.testing.assert_array_equal(means(rows, np.arange(1 << 12) % 2, 2), [[1e8 + 8], [1e8]])


def test_norms_of_the_persistence_phase(spiky: Planted) -> None:
    (life,) = spiky.lifecycles
    assert norm_outputs(spiky.sites, life) == [
        f"layers.{i}/{norm}/out"
        for i in (2, 3)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]


def test_collect_rows_are_those_of_the_members(delimited: Planted) -> None:
    """Of every window, in the order of the members; windows without a member are skipped."""
    stats = delimited.stats
    members = np.flatnonzero((stats.window % 3 == 1) & np.isin(stats.position, (0, 9)))
    name = delimited.sites.blocks[2].attention.input
    rows = collect_rows(
        delimited.path, {name: 64}, stats, members, delimited.windows,
        providers=CPU, progress=Progress(quiet=True),
    )[name]  # fmt: skip
    again = collect_rows(
        delimited.path, {name: 64}, stats, members,
        [Window(window.ids[:10], False) for window in delimited.windows],
        providers=CPU, progress=Progress(quiet=True),
    )[name]  # fmt: skip
    assert rows.shape == (members.size, 64)
    assert np.abs(rows).sum(1).all()
    np.testing.assert_allclose(rows, again, rtol=1e-4, atol=1e-5)


def test_planted_sinks_are_constant(spiky: Planted, delimited: Planted) -> None:
    for data, count in ((spiky, 1), (delimited, 2)):
        (decision,) = data.decisions
        assert decision.replaced
        assert decision.templates.count == count
        assert decision.templates.mean_deviation < 0.02


def test_clusters_follow_the_graphs_match() -> None:
    """Two kinds after the norms, but the detection site tells other groups apart: what the graph
    cannot match shows in the deviation."""
    rng = np.random.default_rng(0)
    kinds, seen = np.arange(64) % 2, np.arange(64) // 32
    centres = np.eye(WIDTH)
    detection = (5 * centres[seen] + 0.01 * rng.normal(size=(64, WIDTH))).astype(np.float32)
    norm = (5 * centres[kinds] + 0.01 * rng.normal(size=(64, WIDTH))).astype(np.float32)
    found = fit(lifecycle(64), detection, {"a": norm}, 10.0, limit=0.1, seed=0)
    assert not found.is_constant(0.1)  # the norms alone would have said 0.2 %


def test_a_few_strays_join_the_cluster_that_the_graph_gives_them() -> None:
    rng = np.random.default_rng(0)
    kinds = np.arange(64) % 2
    centres = np.eye(WIDTH)
    norm = (5 * centres[kinds] + 0.01 * rng.normal(size=(64, WIDTH))).astype(np.float32)
    norm[10] = 5 * centres[0] * 0.45 + 5 * centres[1] * 0.55  # between both, nearer to kind 1
    detection = (5 * centres[kinds] + 0.01 * rng.normal(size=(64, WIDTH))).astype(np.float32)
    found = fit(lifecycle(64), detection, {"a": norm}, 10.0, limit=0.1, seed=0)
    assert found.count == 2
    mine = found.assignment[10]
    assert (found.assignment[kinds == 0] == mine).all()
    np.testing.assert_allclose(
        found.detection[mine], detection[found.assignment == mine].mean(0), atol=1e-5
    )
