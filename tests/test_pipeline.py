"""All stages on the planted models: what is decided, measured and written."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession

from iq_export.baselines import quantized_graph, round_to_nearest
from iq_export.carry import carry
from iq_export.decide.job import Calibration
from iq_export.decide.sinks import overflows_half
from iq_export.decide.trial import Reference, Trial
from iq_export.errors import GraphError, UsageError
from iq_export.graph import io
from iq_export.observe.rows import collect_rows
from iq_export.passes.order import INSERTED, TURNED
from iq_export.passes.to_half import to_half
from iq_export.pipeline import Rewrite, rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.run.ort import CausalLM
from tests import planted
from tests.planted import CPU, Decoder, Planted, logits

Run = Callable[..., Rewrite]


def calibration(decoder: Decoder) -> Calibration:
    data = planted.windows(decoder, count=10)
    return Calibration(
        windows=data[:4], probes=data[4:], max_relative_deviation=0.1, seed=0,
        providers=CPU,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run(decoder, recipe=, dtype=)`: the rewrite, made once for the same arguments."""
    made: dict[object, Rewrite] = {}

    def get(decoder: Decoder, recipe: str = "w8a8", dtype: str = "fp32") -> Rewrite:
        key = (decoder, recipe, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp("rewrite")
            traced = planted.save(decoder, folder)
            work = folder / "work"
            work.mkdir()
            made[key] = rewrite(
                traced, work, load_recipe(recipe), dtype, calibration(decoder),
                Progress(quiet=True),
            )  # fmt: skip
        return made[key]

    return get


QUIET = {"providers": CPU, "progress": Progress(quiet=True)}
SPIKY, CALM = Decoder(), planted.NO_SPIKES
ROWS = [window.ids for window in planted.windows(SPIKY, count=4, seed=9)]


def error(path: Path, reference: Path) -> float:
    """Relative squared error of the logits at semantic rows (all but position 0)."""
    exact, found = (logits(CausalLM(p), ROWS)[:, 1:] for p in (reference, path))
    return float(((found - exact) ** 2).sum() / (exact**2).sum())


def test_w8a8(run: Run) -> None:
    done = run(SPIKY)
    (decision,) = done.decisions
    assert decision.replaced
    assert done.sink_nodes == 8
    assert done.recall == 1
    assert len(done.quantizers) == 16
    # Nothing in full precision is written on the way.
    assert {path.name for path in done.quantized.parent.iterdir()} == {
        "codes", "model.onnx", "model.onnx.data",
    }  # fmt: skip


def test_finished_file_is_compared_with_fp32(run: Run) -> None:
    check = run(SPIKY, dtype="fp16").check
    assert check is not None and check.tokens == 4 * 40
    assert check.top1 > 0.9 and check.lost < 0.25 and check.tensors > 40


def test_a_file_that_has_lost_everything_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iq_export.ship.MOST_LOST", 0.0)  # as if this were everything
    traced = planted.save(CALM, tmp_path)
    (tmp_path / "work").mkdir()
    with pytest.raises(GraphError, match=r"finished file is broken.* of block \d"):
        rewrite(
            traced, tmp_path / "work", load_recipe("w8a8-norot"), "fp16", calibration(CALM),
            Progress(quiet=True),
        )  # fmt: skip


def test_insertion_alone_changes_next_to_nothing(run: Run) -> None:
    done = run(SPIKY)
    inserted = done.write(INSERTED, done.quantized.with_name("inserted.onnx"))
    assert error(inserted, done.traced) < 1e-5


def test_form_of_insertion_is_chosen_on_the_quantized_graph(run: Run) -> None:
    (insertion,), (sinks,) = run(SPIKY).insertions, run(SPIKY).sinks
    assert sinks.form == insertion.form
    assert insertion.loss[insertion.form].kl <= min(x.kl for x in insertion.loss.values()) + 2e-4
    # A sink's own prediction is lost in the kv form, and counts.
    assert insertion.loss["kv"].kl > 10 * insertion.loss["kv"].kl_semantic


@pytest.mark.parametrize("insertion", ["norm", "kv"])
def test_form_that_is_asked_for(tmp_path: Path, insertion: str) -> None:
    traced = planted.save(SPIKY, tmp_path)
    (tmp_path / "work").mkdir()
    data = replace(calibration(SPIKY), insertion=insertion)
    recipe = load_recipe("w8a8")
    done = rewrite(traced, tmp_path / "work", recipe, "fp32", data, Progress(quiet=True))
    ops = [node.op_type for node in io.load(done.quantized).graph if node.domain == "iq"]
    assert ops.count("SinkRestore") == (insertion == "norm")
    assert done.sink_nodes == len(ops) == (8 if insertion == "norm" else 12)
    assert error(done.quantized, done.traced) < 0.03


def test_w8a8_beats_round_to_nearest(run: Run) -> None:
    done = run(SPIKY)
    baseline = done.quantized.with_name("nearest.onnx")
    io.save(round_to_nearest(done), baseline)
    ours, nearest = error(done.quantized, done.traced), error(baseline, done.traced)
    assert ours < 0.03
    assert nearest > 2 * ours


def test_down_projection_ranges_shrink(run: Run) -> None:
    """The bar of the project: at least 20 times at the birth and the death."""
    done = run(SPIKY)
    found = {q.linears: q for q in done.quantizers.values()}
    for block in (SPIKY.spikes[0].birth, SPIKY.spikes[0].death):
        quantizer = found[(f"layers.{block}/mlp/down_proj",)]
        assert quantizer.before.absmax > 20 * quantizer.after.absmax
    assert max(done.observed_before["down_proj_max_per_block"]) > 500
    assert max(done.observed_after["down_proj_max_per_block"]) < 20
    assert max(done.observed_before["residual_max_per_block"]) > 900
    assert max(done.observed_after["residual_max_per_block"]) < 300


def test_scales_are_clipped_semantic_ranges(run: Run) -> None:
    for quantizer in run(SPIKY).quantizers.values():
        assert 0 < quantizer.clip <= 1
        semantic = quantizer.after.absmax_semantic
        assert quantizer.scale == pytest.approx(quantizer.clip * semantic / 127)


def test_fewer_codes_are_clipped_more(run: Run) -> None:
    """At 8 bits an MLP's range stays near the full one; with 64 codes it must give that up."""

    def mean_clip(recipe: str) -> float:
        found = run(SPIKY, recipe=recipe).quantizers.values()
        return float(np.mean([q.clip for q in found if "/mlp/" in q.linears[0]]))

    assert mean_clip("w8a6") < 0.9 * mean_clip("w8a8")


def test_quantized_graph_is_chunk_invariant(run: Run) -> None:
    model = CausalLM(run(SPIKY).quantized)
    once, chunked = logits(model, ROWS), logits(model, ROWS, chunk=7)
    # Rounding may fall to the other side where sums differ in the last digit.
    assert np.mean(np.abs(chunked - once) > 1e-2) < 0.01


def test_half(run: Run) -> None:
    done = run(SPIKY)
    scales = {name: quantizer.scale for name, quantizer in done.quantizers.items()}
    model = quantized_graph(done.graph(INSERTED), done.sites, scales)
    to_half(model)
    path = done.quantized.with_name("half.onnx")
    io.save(model, path)
    InferenceSession(str(path))
    assert CausalLM(path).kv_dtype == np.float16
    assert error(path, done.traced) < 0.03


def test_model_without_spikes_gets_no_sink_ops(run: Run) -> None:
    done = run(CALM)
    assert done.decisions == []
    assert done.sinks == []
    assert done.sink_nodes == 0
    assert done.recall is None
    model = io.load(done.quantized)
    assert not model.functions
    assert "iq" not in model.opset_imports
    assert error(done.quantized, done.traced) < 0.01


def test_w4a16_leaves_spikes_that_half_can_hold(run: Run) -> None:
    done = run(SPIKY, "w4a16", "fp16")
    assert done.decisions[0].replaced
    assert done.sinks == []
    assert done.sink_nodes == 0
    assert done.quantizers == {}
    assert set(done.blocks.values()) == {64, 128}
    InferenceSession(str(done.quantized))
    assert error(done.quantized, done.traced) < 0.2


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_w4a16_takes_away_spikes_that_half_cannot_hold(run: Run, dtype: str) -> None:
    huge = replace(SPIKY, spikes=(replace(SPIKY.spikes[0], size=60_000.0),))
    done = run(huge, "w4a16", dtype)
    assert (done.sink_nodes > 0) == (dtype == "fp16")


def test_spikes_within_a_factor_of_two_count_as_overflow(spiky: Planted) -> None:
    (life,) = spiky.lifecycles
    assert not overflows_half(life)
    assert not overflows_half(replace(life, residual_peak=32_000.0))
    assert overflows_half(replace(life, residual_peak=33_000.0))
    assert overflows_half(replace(life, down_peak=33_000.0))


@pytest.mark.parametrize("smoothing", [False, True])
def test_two_kinds_of_sinks(tmp_path: Path, smoothing: bool) -> None:
    """Delimiters are found by their magnitude alone, behind quantizers made for other tokens."""
    decoder, recipe = planted.WITH_DELIMITER, load_recipe("w8a8")
    traced = planted.save(decoder, tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    recipe = replace(recipe, smoothing=smoothing)
    done = rewrite(traced, work, recipe, "fp32", calibration(decoder), Progress(quiet=True))
    assert [sinks.count for sinks in done.sinks] == [2]
    assert done.recall > 0.95
    nodes = [node.name for node in io.load(done.quantized).graph]
    assert sum(name.endswith("/side_gather") for name in nodes) == len(done.sites.blocks)
    rows = [window.ids for window in planted.windows(decoder, count=4, seed=9)]
    semantic = np.array(rows) != planted.DELIMITER
    semantic[:, 0] = False
    exact, found = (logits(CausalLM(p), rows)[semantic] for p in (done.traced, done.quantized))
    assert ((found - exact) ** 2).sum() / (exact**2).sum() < 0.05


def quiet_spike_norms(decoder: Decoder, factor: float) -> dict[str, np.ndarray]:
    """Weights whose norms hold the spike's channel down where it lives, as trained models do.

    The rest of a sink's row, which varies, is then as loud as the spike.
    """
    values, (spike,) = planted.weights(decoder), decoder.spikes
    assert spike.death is not None
    for block in range(spike.birth + 1, spike.death + 1):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            values[f"layers.{block}.{norm}.weight"][spike.channel] *= factor
    for name in ("gate", "up"):  # the neuron that takes the spike away reads it as loud as before
        values[f"layers.{spike.death}.mlp.{name}_proj.weight"][spike.channel, 0] /= factor
    return values


@pytest.mark.parametrize(("factor", "constant"), [(1.0, True), (0.02, False)])
def test_constancy_is_judged_as_products_read_the_rows(
    tmp_path: Path, factor: float, constant: bool
) -> None:
    """With the norms' weights folded away the spike's channel makes all sinks look alike."""
    traced = planted.save(SPIKY, tmp_path, quiet_spike_norms(SPIKY, factor))
    work = tmp_path / "work"
    work.mkdir()
    done = rewrite(
        traced, work, load_recipe("w8a8"), "fp32", calibration(SPIKY), Progress(quiet=True)
    )
    (decision,) = done.decisions
    assert decision.replaced is constant
    assert decision.templates is not None
    names = dict.fromkeys(decision.templates.norms, SPIKY.hidden)
    members = decision.lifecycle.members
    rows = collect_rows(
        done.graph(TURNED), names, done.stats, members, calibration(SPIKY).all, **QUIET
    )
    for values in rows.values():
        off = np.linalg.norm(values - values.mean(0), axis=1) / np.linalg.norm(values.mean(0))
        assert off.mean() < 0.1


def test_spike_that_smoothing_hides_stays_and_is_smoothed_with_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who stays must be rounded well, so smoothing is chosen again and sees the spike."""
    traced = planted.save(SPIKY, tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(
        "iq_export.decide.sinks._Peaks.all",
        lambda *_: [np.ones(sum(len(w.ids) for w in calibration(SPIKY).all), np.float32)],
    )
    done = rewrite(traced, work, load_recipe("w8a8"), "fp32", calibration(SPIKY), Progress())
    (decision,) = done.decisions
    assert not decision.replaced
    assert "cannot be detected" in decision.reason
    assert done.sinks == []
    assert "smoothing is chosen again" in capsys.readouterr().err
    down = done.sites.blocks[1].mlp.output.input
    assert done.before[down].absmax_semantic == done.before[down].absmax


def test_same_input_same_files(run: Run, tmp_path: Path) -> None:
    done = run(CALM)
    again = rewrite(
        done.traced, tmp_path, load_recipe("w8a8"), "fp32", calibration(CALM), Progress(quiet=True)
    )
    for name in ("model.onnx", "model.onnx.data"):
        assert (
            again.quantized.with_name(name).read_bytes()
            == done.quantized.with_name(name).read_bytes()
        )


def test_tensor_that_is_always_zero_is_refused_by_name(tmp_path: Path) -> None:
    decoder = replace(CALM, blocks=2)
    values = planted.weights(decoder)
    values["layers.1.mlp.up_proj.weight"][:] = 0
    traced = planted.save(decoder, tmp_path, values)
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(GraphError, match=r"'layers\.1/mlp/.*' is zero for every calibration token"):
        rewrite(
            traced, work, load_recipe("w8a8"), "fp32", calibration(decoder), Progress(quiet=True)
        )


def test_width_that_no_int4_block_divides_is_refused_by_name(tmp_path: Path) -> None:
    decoder = replace(CALM, blocks=1, features=96)
    traced = planted.save(decoder, tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(UsageError, match=r"down_proj\.weight' has 96 input features"):
        rewrite(
            traced, work, load_recipe("w4a16"), "fp16", calibration(decoder), Progress(quiet=True)
        )


def _notes(said: str) -> list[str]:
    """What of the graph is left as it is."""
    words = ("left as it is", "not rotated")
    return sorted(line.strip() for line in said.splitlines() if line.strip().startswith(words))


def test_refused_blocks_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder = replace(CALM, blocks=3)
    model = planted.proto(decoder)
    norm = "layers.1/post_attention_layernorm"
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[0] == f"{norm}/out":
            node.input[0] = "layers.1/Add/out"
    model.graph.node.remove(next(node for node in model.graph.node if node.name == norm))
    traced = tmp_path / "model.onnx"
    onnx.save(model, traced)
    work = tmp_path / "work"
    work.mkdir()
    data = calibration(decoder)
    done = rewrite(traced, work, load_recipe("w8a8"), "fp32", data, Progress())
    said = capsys.readouterr().err
    assert "left as it is: node layers.1/Add_2 (Add)" in said and "not rotated: node" in said
    assert [w for w in done.warnings if w.startswith("not rotated")]  # a bundle says so too
    (tmp_path / "again").mkdir()
    carry(
        traced, tmp_path / "again", lambda sites: done.chosen, data.windows,
        providers=data.providers, progress=Progress(),
    )  # fmt: skip
    assert _notes(capsys.readouterr().err) == _notes(said)
    assert [block.attention.norm[:8] for block in done.sites.blocks] == ["layers.0", "layers.2"]
    InferenceSession(str(done.quantized))


@pytest.mark.parametrize("rejecting", [True, False])
def test_clips_that_hide_sinks_are_rejected(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rejecting: bool,
) -> None:
    """Method step 8; where even whole ranges do not help, the compile ends with a sentence."""
    stages = importlib.import_module("iq_export.decide.recall")
    monkeypatch.setattr("iq_export.decide.quantizers.choose_clip", lambda *_: (0.02, 0.0))
    if not rejecting:
        monkeypatch.setattr(stages, "unclipped", lambda quantizers, *_: quantizers)
    decoder = planted.WITH_DELIMITER
    # A rotation spreads the spike over all channels, where no clip hides it.
    recipe = replace(load_recipe("w8a8"), smoothing=False, folded_rotation=False)
    traced = planted.save(decoder, tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    arguments = (traced, work, recipe, "fp32", calibration(decoder), Progress())
    if rejecting:
        done = rewrite(*arguments)
        assert done.recall >= stages.LEAST_RECALL
        clips = {q.linears[0]: q.clip for q in done.quantizers.values()}
        assert clips["layers.1/mlp/gate_proj"] == 1
        assert clips["layers.2/mlp/gate_proj"] == 0.02
        assert "clipping factors up to the birth are rejected" in capsys.readouterr().err
    else:
        message = (
            r"finds \d+% of the sinks, less than 80%: the range of tensor '\S+' \(block [01], "
            r"\w+\) hides them from detection: it ends at [\d.]+, the tensor at [\d.]+\."
        )
        with pytest.raises(GraphError, match=message):
            rewrite(*arguments)


def test_every_token_spiking_is_said_and_nothing_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = planted.weights(SPIKY)
    values["position.weight"][:, SPIKY.spikes[0].marker] = planted.MARKER_VALUE
    traced = planted.save(SPIKY, tmp_path, values)
    (tmp_path / "work").mkdir()
    done = rewrite(
        traced, tmp_path / "work", load_recipe("w8a8"), "fp32", calibration(SPIKY), Progress()
    )
    assert done.decisions == [] and done.sink_nodes == 0
    (warning,) = [text for text in done.warnings if "every token spikes" in text]
    assert "block 1, 3: none can be told from the others" in warning
    assert warning in capsys.readouterr().err


def test_two_births_quantized(tmp_path: Path) -> None:
    """Both sites of detection are found behind their quantizers, on held-out text too."""
    decoder = planted.TWO_BIRTHS
    traced = planted.save(decoder, tmp_path)
    (tmp_path / "work").mkdir()
    data = replace(calibration(decoder), heldout=planted.windows(decoder, count=6, seed=3))
    done = rewrite(
        traced, tmp_path / "work", load_recipe("w8a8"), "fp32", data, Progress(quiet=True)
    )
    assert [len(sinks.early) for sinks in done.sinks] == [1]
    assert done.recall == 1
    (matching,) = done.matching
    assert (matching.precision, matching.recall, matching.agreement) == (1, 1, 1)
    rows = [window.ids for window in planted.windows(decoder, count=4, seed=9)]
    semantic = np.array(rows) != planted.DELIMITER
    semantic[:, 0] = False
    exact, found = (logits(CausalLM(p), rows)[semantic] for p in (done.traced, done.quantized))
    assert ((found - exact) ** 2).sum() / (exact**2).sum() < 0.05


def budgeted(
    folder: Path,
    budget: float,
    gain: float,
    monkeypatch: pytest.MonkeyPatch,
    shipped: Callable[[], float] | None = None,
) -> Rewrite:
    """With losses made up: 1.02 less `gain` per site left out. Of random tokens any rounding may be
    the better prediction, so real ones would say nothing; the harms are measured."""
    left: list[int] = []

    def ratio(_: Trial, skipped: Collection[str] = ()) -> float:
        left.append(len(skipped))
        return 1.02 - gain * len(skipped)

    monkeypatch.setattr(Trial, "ratio", ratio)
    last = shipped or (lambda: 1.02 - gain * max(left))
    monkeypatch.setattr(Reference, "ratio", lambda *_, **__: (last(), 0.0))
    traced = planted.save(SPIKY, folder)
    (folder / "work").mkdir()
    data = replace(calibration(SPIKY), budget=budget)
    return rewrite(traced, folder / "work", load_recipe("w8a8"), "fp16", data, Progress(quiet=True))


def test_a_budget_leaves_the_fewest_products_in_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = budgeted(tmp_path, 1.016, 0.002, monkeypatch)
    mixed = done.mixed
    assert mixed is not None and mixed.met and mixed.ratio_without == 1.02
    assert len(mixed.skipped) == 3
    worst = sorted(mixed.harm, key=lambda name: -mixed.harm[name])
    assert min(mixed.harm.values()) >= 0 and mixed.skipped[0].name in worst[:6]
    assert len(done.linears) == 28 - len(mixed.linears)
    nodes = {node.name: node for node in io.load(done.quantized).graph}
    for linear in done.sites.linears:
        producers = {value.producer().op_type for value in nodes[linear.node].inputs
                     if value.producer() is not None}  # fmt: skip
        assert ("DequantizeLinear" in producers) == (linear.node not in mixed.linears)
    assert len(mixed.harm) == 16
    assert not set(mixed.linears) & {n for q in done.quantizers.values() for n in q.linears}
    assert not (done.quantized.parent / "partial.onnx").exists()


def test_a_file_over_the_budget_leaves_more_in_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search kept the budget, what ships did not: it goes on until that does."""
    measured = [1.017, 1.0165, 1.015]
    ship = iter(measured)
    done = budgeted(tmp_path, 1.016, 0.002, monkeypatch, lambda: next(ship))
    mixed = done.mixed
    assert mixed is not None and mixed.met
    assert mixed.ratio == measured[-1] and mixed.searched == pytest.approx(1.014)
    assert len(mixed.skipped) == 3 + 2
    assert not [text for text in done.warnings if "budget" in text]
    nodes = {node.name: node for node in io.load(done.quantized).graph}
    plain = {
        linear.node for linear in done.sites.linears
        if not any(v.producer() and v.producer().op_type == "DequantizeLinear"
                   for v in nodes[linear.node].inputs)
    }  # fmt: skip
    assert plain == set(mixed.linears)


def test_a_budget_that_nothing_meets_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = budgeted(tmp_path, 1.005, 0.0, monkeypatch)
    assert done.mixed is not None and not done.mixed.met
    (warning,) = [text for text in done.warnings if "budget" in text]
    assert "cannot be met" in warning and f"{done.mixed.ratio:.4f} x" in warning
    InferenceSession(str(done.quantized))
