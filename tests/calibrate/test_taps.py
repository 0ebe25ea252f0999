"""Taps give the graph's own values, window by window, within a byte budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from iq_export.calibrate import taps
from iq_export.calibrate.data import Window
from iq_export.calibrate.taps import group_by_bytes, tapped_runs
from iq_export.errors import EngineError, GraphError
from iq_export.graph import io
from iq_export.passes.to_half import to_half
from iq_export.progress import Progress
from iq_export.run.ort import CausalLM
from tests import planted
from tests.planted import Planted

RESIDUAL, DOWN = "layers.2/Add_2/out", "layers.2/mlp/Mul/out"


def run(path: Path, groups: Sequence[Sequence[str]], windows: list[Window], **options: Any) -> Any:
    options.setdefault("progress", Progress(quiet=True))
    return list(tapped_runs(path, groups, windows, **options))


def test_values_are_those_of_the_graph(spiky: Planted) -> None:
    """The tapped graph is cut behind the taps; the values are as in a full run."""
    windows = spiky.windows[:3]
    model = spiky.load()
    model.graph.outputs.extend(
        value for node in model.graph for value in node.outputs if value.name in (RESIDUAL, DOWN)
    )
    whole = CausalLM(spiky.save_beside(model, "whole.onnx"), extra_outputs=[RESIDUAL, DOWN])
    found = run(spiky.path, [[RESIDUAL, DOWN]], windows)
    assert [number for number, _ in found] == [0, 1, 2]
    for number, values in found:
        ids = np.array([windows[number].ids])
        step = whole.forward(ids, np.ones_like(ids), np.arange(ids.shape[1])[None])
        for name in (RESIDUAL, DOWN):
            assert values[name].shape == (ids.shape[1], 64 if name == RESIDUAL else 128)
            np.testing.assert_allclose(values[name], step.extras[name][0], rtol=1e-4, atol=1e-3)


def test_heads_of_keys_and_values_are_joined(spiky: Planted) -> None:
    """`[batch, heads, seq, head_dim]` comes as its product wrote it, `[seq, features]`."""
    flat, heads = "layers.2/self_attn/v_proj/out", "layers.2/self_attn/v_heads/out"
    for _, values in run(spiky.path, [[flat, heads]], spiky.windows[:2]):
        np.testing.assert_array_equal(values[heads], values[flat])


def test_groups_run_one_after_the_other(spiky: Planted) -> None:
    found = run(spiky.path, [[RESIDUAL], [DOWN]], spiky.windows[:2], always=["embed/out"])
    assert [(number, set(values)) for number, values in found] == [
        (number, {"embed/out", name}) for name in (RESIDUAL, DOWN) for number in (0, 1)
    ]


def test_windows_may_differ_in_length(spiky: Planted) -> None:
    windows = [Window(spiky.windows[0].ids[:length], False) for length in (1, 17, 40)]
    found = run(spiky.path, [[RESIDUAL]], windows)
    assert [values[RESIDUAL].shape[0] for _, values in found] == [1, 17, 40]


def test_nothing_is_kept_between_windows(spiky: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    """One window's values are handed out before the next window runs."""
    ran: list[int] = []
    feeds = taps.window_feeds
    monkeypatch.setattr(taps, "window_feeds", lambda *a: ran.append(1) or feeds(*a))
    runs = tapped_runs(spiky.path, [[RESIDUAL]], spiky.windows[:5], progress=Progress(quiet=True))
    for expected in (1, 2, 3):
        next(runs)
        assert len(ran) == expected


def test_half_graph_is_tapped_in_float32(spiky: Planted) -> None:
    model = spiky.load()
    to_half(model)
    path = spiky.path.with_name("half.onnx")
    io.save(model, path)
    ((_, values),) = run(path, [[RESIDUAL]], spiky.windows[:1])
    assert values[RESIDUAL].dtype == np.float32


def test_integer_values_stay_integers(spiky: Planted) -> None:
    ((_, values),) = run(spiky.inserted, [["iq.sinks.0.index"]], spiky.windows[:1])
    assert values["iq.sinks.0.index"].dtype == np.int32
    assert values["iq.sinks.0.index"].tolist() == [1] + [0] * 39


def test_no_file_stays_behind(spiky: Planted) -> None:
    run(spiky.path, [[RESIDUAL], [DOWN]], spiky.windows[:1])
    assert not list(spiky.path.parent.glob(".taps-*"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_the_tensor(tmp_path: Path, bad: float) -> None:
    """Where they first appear among the taps: window and position too."""
    decoder = planted.Decoder(blocks=2, spikes=())
    model = planted.proto(decoder)
    tensor = next(t for t in model.graph.initializer if t.name == "embed_tokens.weight")
    table = onnx.numpy_helper.to_array(tensor).copy()
    table[11, 3] = bad
    tensor.CopyFrom(onnx.numpy_helper.from_array(table, tensor.name))
    onnx.save(model, tmp_path / "model.onnx")
    windows = [Window([1, 2, 3], False), Window([4, 5, 11, 6], False)]
    with pytest.raises(GraphError, match=r"'embed/out'.*NaN or Inf.*window 1, position 2"):
        run(tmp_path / "model.onnx", [["embed/out"]], windows)


def test_progress_counts_runs(spiky: Planted) -> None:
    class Counting(Progress):
        seen: list[tuple[int, int]] = []  # noqa: RUF012

        def update(self, done: int, total: int) -> None:
            self.seen.append((done, total))

    progress = Counting(quiet=True)
    run(spiky.path, [[RESIDUAL], [DOWN]], spiky.windows[:2], progress=progress)
    assert progress.seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_groups_stay_under_the_budget() -> None:
    widths = {f"v{i}": 100 for i in range(10)}
    groups = group_by_bytes(widths, 8, limit=3 * 100 * 8 * 4)
    assert [len(group) for group in groups] == [3, 3, 3, 1]
    assert [name for group in groups for name in group] == list(widths)


def test_a_value_larger_than_the_budget_runs_alone() -> None:
    groups = group_by_bytes({"small": 1, "huge": 1000, "last": 1}, 10, limit=4000)
    assert groups == [["small"], ["huge"], ["last"]]


def test_default_budget_holds_a_gigabyte() -> None:
    widths = {f"v{i}": 1 << 10 for i in range(1024)}
    assert all(
        sum(widths[name] for name in group) * 512 * 4 <= 1 << 30
        for group in group_by_bytes(widths, 512)
    )
    assert len(group_by_bytes(widths, 512)) == 2


def test_provider_that_is_missing_is_no_silent_fallback(calm: Planted) -> None:
    runs = tapped_runs(
        calm.path, [["logits"]], calm.windows[:1],
        providers=("NoSuchExecutionProvider",), progress=Progress(quiet=True),
    )  # fmt: skip
    with pytest.raises(EngineError, match="NoSuchExecutionProvider"):
        next(iter(runs))
