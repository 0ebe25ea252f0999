"""Models whose branches end in a norm, with spikes that half precision cannot hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession

from iq_export.baselines import baselines
from iq_export.decide.job import Calibration
from iq_export.graph import io
from iq_export.graph.half import HALF_MAX
from iq_export.passes.to_half import to_half
from iq_export.pipeline import Rewrite, rewrite
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.run.ort import CausalLM
from tests import planted
from tests.planted import CPU, DELIMITER, Decoder, Planted, Spike, logits

SIZE = 1e5  # beyond half's largest number
DIES = Decoder(blocks=5, post_norms=True, spikes=(Spike(1, 3, size=SIZE),))
STAYS = replace(DIES, spikes=(Spike(1, None, size=SIZE),))
TWO = replace(
    DIES,
    spikes=(Spike(1, 3, size=SIZE), Spike(1, 3, size=SIZE, marker=2, token=DELIMITER, sign=-1)),
)


def made(decoder: Decoder, folder: Path, recipe: str, dtype: str = "fp16") -> Rewrite:
    traced, data = planted.save(decoder, folder), planted.windows(decoder, count=10)
    work = folder / "work"
    work.mkdir()
    return rewrite(
        traced, work, load_recipe(recipe), dtype,
        Calibration(data[:4], data[4:], 0.1, 0, CPU), Progress(quiet=True),
    )  # fmt: skip


def rows(decoder: Decoder) -> list[list[int]]:
    return [window.ids for window in planted.windows(decoder, count=4, seed=9)]


def half_peak(path: Path, decoder: Decoder) -> float:
    """The largest magnitude of any half value in the graph, Inf and NaN included, each rounded."""
    model = onnx.load(path, load_external_data=False)
    half = onnx.TensorProto.FLOAT16
    typed = {v.name: v for v in model.graph.value_info if v.type.tensor_type.elem_type == half}
    names = [o for node in model.graph.node for o in node.output if o in typed]
    del model.graph.output[:]
    model.graph.output.extend(typed[name] for name in names)
    ids, mask, positions = planted.left_pad(rows(decoder), pad_id=0)
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    empty = np.zeros((len(ids), decoder.kv_heads, 0, decoder.head_dim), np.float16)
    with NamedTemporaryFile(dir=path.parent, suffix=".onnx") as file:
        onnx.save(model, file.name)
        session = InferenceSession(file.name, providers=list(CPU))
        past = [v.name for v in session.get_inputs() if v.name.startswith("past")]
        found = session.run(names, feeds | dict.fromkeys(past, empty))
    assert len(names) > 50
    return max(float(np.abs(np.nan_to_num(v.astype(np.float32), nan=np.inf)).max()) for v in found)


@pytest.mark.parametrize("decoder", [DIES, TWO], ids=["one", "two"])
def test_lifecycles_are_found_and_insertion_alone_is_exact(
    decoder: Decoder, tmp_path: Path
) -> None:
    data = planted.observe(decoder, tmp_path)
    assert {(life.birth, life.death, life.channel) for life in data.lifecycles} == {(1, 3, 5)}
    assert all(decision.replaced for decision in data.decisions)
    assert data.stats.residual_max.max() > HALF_MAX
    exact, found = (logits(CausalLM(p), rows(decoder)) for p in (data.path, data.inserted))
    assert np.abs(exact - found).max() < 1e-4 * np.ptp(exact)


@pytest.mark.parametrize("decoder", [DIES, TWO, STAYS], ids=["dies", "two", "stays"])
def test_half_is_finite_where_plain_half_is_not(decoder: Decoder, tmp_path: Path) -> None:
    done = made(decoder, tmp_path, "fp16")
    assert done.sinks and done.quantized.is_file() and not done.quantizers
    ((label, model),) = baselines(done).items()
    plain = tmp_path / "plain.onnx"
    io.save(model, plain)
    assert label == "plain fp16"
    assert half_peak(plain, decoder) > HALF_MAX
    assert half_peak(done.quantized, decoder) < HALF_MAX
    exact, found, broken = (
        logits(CausalLM(path, round_half=True), rows(decoder))
        for path in (done.traced, done.quantized, plain)
    )
    assert np.abs(exact - found).max() < 0.01 * np.ptp(exact)
    assert not np.isfinite(broken).all()


def test_a_constant_spike_is_taken_out_and_the_stream_left_alone(tmp_path: Path) -> None:
    done = made(DIES, tmp_path, "fp16")
    assert len(done.sinks) == 1 and done.scale_exponent == 0


def test_a_spike_that_stays_is_restored_in_a_smaller_stream(tmp_path: Path) -> None:
    """After its last block nothing may take the spike out any more: the final norm reads it."""
    done = made(STAYS, tmp_path, "fp16")
    assert len(done.sinks) == 1 and done.scale_exponent == 2
    assert np.abs(done.sinks[0].restore).max() == pytest.approx(SIZE / 4, rel=0.01)


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody finds the spike, and still half cannot hold it."""
    monkeypatch.setattr("iq_export.pipeline.discover", lambda stats: [])


@pytest.mark.usefixtures("unseen")
def test_what_is_no_lifecycle_is_scaled(tmp_path: Path) -> None:
    done = made(DIES, tmp_path, "fp16")
    assert not done.sinks and done.scale_exponent == 2
    assert half_peak(done.quantized, DIES) < HALF_MAX
    exact, found = (
        logits(CausalLM(path, round_half=True), rows(DIES))
        for path in (done.traced, done.quantized)
    )
    assert np.abs(exact - found).max() < 0.01 * np.ptp(exact)


@pytest.mark.usefixtures("unseen")
def test_float32_is_not_scaled(tmp_path: Path) -> None:
    done = made(DIES, tmp_path, "fp16", dtype="fp32")
    assert done.scale_exponent == 0
    exact, found = (logits(CausalLM(p), rows(DIES)) for p in (done.traced, done.quantized))
    assert np.array_equal(exact, found)


def test_w8a8_of_a_scaled_stream(tmp_path: Path) -> None:
    """Half adds nothing to the error of int8."""
    errors = {}
    for dtype in ("fp32", "fp16"):
        (tmp_path / dtype).mkdir()
        done = made(STAYS, tmp_path / dtype, "w8a8", dtype)
        exact, found = (
            logits(CausalLM(path, round_half=True), rows(STAYS))[:, 1:]
            for path in (done.traced, done.quantized)
        )
        errors[dtype] = float(((found - exact) ** 2).sum() / (exact**2).sum())
    assert errors["fp16"] < 1.1 * errors["fp32"]
    assert errors["fp32"] < 0.3  # the spike that stays stretches ranges
    assert half_peak(done.quantized, STAYS) < HALF_MAX
    labels = baselines(done)
    assert set(labels) == {"plain fp16", "round-to-nearest w8a8"}


def test_a_cpu_hides_the_overflow_unless_values_are_rounded(spiky: Planted, tmp_path: Path) -> None:
    decoder = DIES
    path = planted.save(decoder, tmp_path)
    model = io.load(path)
    to_half(model)
    half = tmp_path / "half.onnx"
    io.save(model, half)
    assert np.isfinite(logits(CausalLM(half), rows(decoder))).all()
    assert not np.isfinite(logits(CausalLM(half, round_half=True), rows(decoder))).all()
    exact = logits(CausalLM(spiky.path), rows(spiky.decoder))
    same = logits(CausalLM(spiky.path, round_half=True), rows(spiky.decoder))
    assert np.array_equal(exact, same)
