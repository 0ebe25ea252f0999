"""The comparison tool on a tiny planted model: its arithmetic, its peers, its table, its resume."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from iq_export.errors import DataError, UsageError
from iq_export.graph import io
from iq_export.graph.sites import find_sites
from iq_export.observe.loss import log_softmax
from iq_export.observe.samples import Window
from iq_export.passes.fold_smoothing import fold_smoothing
from iq_export.progress import Progress
from iq_export.run.ort import CausalLM, Step, left_pad
from tests import planted
from tools.compare import __main__ as command
from tools.compare import data, measure, methods, peer, plain, statistics, table, worker
from tools.compare.environments import Environments, default_folder
from tools.compare.prefix import Prefix, PrefixedLM, choose_tokens, make_prefix

QUIET = Progress(quiet=True)
BOS = 256


# --- arithmetic -----------------------------------------------------------------------------------


def test_flips_and_accuracy_by_hand() -> None:
    chosen, reference, gold = [0, 1, 2, 1], [0, 2, 2, 0], [0, 1, 2, 3]
    assert statistics.flips(chosen, reference) == 0.5
    assert statistics.accuracy(chosen, gold) == 0.75


def test_paired_interval_by_hand() -> None:
    # Differences 0, +1, 0, -1, 0: mean 0, sample variance 2 / 4.
    chosen, reference, gold = [0, 1, 0, 0, 2], [0, 0, 0, 1, 3], [0, 1, 0, 1, 0]
    difference, low, high = statistics.paired_interval(chosen, reference, gold)
    half = 1.96 * math.sqrt(0.5) / math.sqrt(5)
    assert difference == 0
    assert (low, high) == pytest.approx((-half, half), rel=1e-4)


def test_same_answers_have_no_interval() -> None:
    assert statistics.paired_interval([1, 0], [1, 0], [1, 1]) == (0, 0, 0)


def test_over_seeds() -> None:
    assert statistics.over_seeds([3.0, None, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert statistics.over_seeds([None]) is None


# --- data -----------------------------------------------------------------------------------------


def test_no_passage_is_on_both_sides() -> None:
    passages = [f"passage {number}" for number in range(100)]
    calibration, evaluation = data.split_passages(passages)
    assert not set(calibration) & set(evaluation)
    assert set(calibration) | set(evaluation) == set(passages)
    assert 0.2 < len(calibration) / len(passages) < 0.35


class Bytes:
    """A tokenizer of bytes."""

    bos_id = BOS

    def encode(self, text: str, add_bos: bool) -> list[int]:
        return [BOS] * add_bos + list(text.encode())


def test_requests_split_context_and_choice() -> None:
    questions = [data.Item("Q: a\nAnswer:", ("yes", "no"), 0)] * 2
    found = data.requests(questions, Bytes())
    assert [(r.item, r.choice) for r in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert bytes(found[1].continuation) == b" no"
    assert found[0].context[0] == BOS and found[2].context[0] != BOS  # every second item has one


# --- measuring ------------------------------------------------------------------------------------


class Fixed:
    """Predicts token `favourite` with logit 2 everywhere, the others with 0."""

    vocab_size = 300

    def __init__(self, favourite: int) -> None:
        self.favourite = favourite

    def forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        *,
        need_present: bool = True,
    ) -> Step:
        logits = np.zeros((*input_ids.shape, self.vocab_size), np.float32)
        logits[..., self.favourite] = 2
        return Step(logits, [])


def test_choice_is_normalised_by_length() -> None:
    # "ab" has one favourite token in two, "aab" two in three, "c" none in one; per character the
    # space in front counts as a token and not as a character.
    item = data.Item("Q", ("ab", "aab", "c"), 1)
    result = measure.measure_task(Fixed(ord("a")), [item], data.requests([item], Bytes()), QUIET)
    total = math.log(math.exp(2) + 299)
    scores = [(2 - 3 * total) / 2, (4 - 4 * total) / 3, -2 * total]
    assert result["chosen"] == [int(np.argmax(scores))]
    assert result["gold"] == [1]


def test_log_likelihood_in_a_padded_batch_is_that_of_a_single_run(spiky: planted.Planted) -> None:
    model = CausalLM(spiky.path)
    wanted = [
        data.Request(0, 0, [3, 5, 9], [2, 4]),
        data.Request(0, 1, [3, 5, 9, 11, 20, 8], [1, 7, 30]),
    ]
    found = measure._log_likelihoods(model, wanted, [0, 1])
    for request, total in zip(wanted, found, strict=True):
        row = request.context + request.continuation
        single = planted.logits(model, [row[:-1]])[0]
        alone = log_softmax(single, np.float64)[len(request.context) - 1 :]
        exact = sum(alone[i, token] for i, token in enumerate(request.continuation))
        assert total == pytest.approx(exact, abs=1e-3)


def test_text_against_itself_agrees(spiky: planted.Planted) -> None:
    model = CausalLM(spiky.path)
    _, reference = measure.measure_text(model, spiky.windows[:3], None, QUIET)
    assert reference is not None
    result, _ = measure.measure_text(model, spiky.windows[:3], reference, QUIET)
    assert result["kl"] == pytest.approx(0, abs=1e-6)
    assert result["top1"] == 1
    assert result["tokens"] == 3 * 39


def test_batches_stay_under_the_limit() -> None:
    wanted = [data.Request(0, 0, [1] * length, [2]) for length in (9, 7, 7, 3, 1)]
    assert measure._batches(range(5), wanted, 20) == [[0, 1], [2, 3], [4]]


# --- plain methods --------------------------------------------------------------------------------


def logits(path: Path, window: Window) -> np.ndarray:
    return planted.logits(CausalLM(path), [list(window.ids)])[0]


def relative(path: Path, exact: Path, windows: list[Window]) -> float:
    pairs = [(logits(path, w), logits(exact, w)) for w in windows]
    return float(np.mean([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]))


def quantized(
    spiky: planted.Planted, folder: Path, how: plain.Plain, bits: tuple[int, int]
) -> Path:
    out = folder / "model.onnx"
    plain.build(spiky.path, out, spiky.windows[:6], bits, how, bos=None)
    return out


def test_smoothing_keeps_the_function(spiky: planted.Planted, tmp_path: Path) -> None:
    model = spiky.load()
    how = plain.Plain(smoothing=(0.5,))
    seen = plain.observe(spiky.path, spiky.sites, spiky.windows[:4], None, seed=0)
    fold_smoothing(model, spiky.sites, plain._smoothing(model, spiky.sites, seen, how, (8, 8)))
    io.save(model, tmp_path / "model.onnx")
    assert relative(tmp_path / "model.onnx", spiky.path, spiky.windows[:3]) < 1e-4


def test_clipping_is_never_worse_than_absmax() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(64, 16)).astype(np.float32)
    rows[3, 2] = 40  # one value stretches the range
    weight = rng.normal(size=(16, 8)).astype(np.float32)
    limit, error = plain.clip_by_error(rows, 40.0, weight, (8, 4))
    _, whole = plain.clip_by_error(rows, 40.0, weight, (8, 4), clips=np.ones(1))
    assert limit < 40 and error < whole


def test_searched_smoothing_takes_the_least_error() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(64, 16)).astype(np.float32)
    rows[:, 2] *= 50
    seen = plain.Seen(np.abs(rows).max(0), np.abs(rows).max(1), rows)
    weight = rng.normal(size=(16, 8)).astype(np.float32)
    best = plain.smooth(seen, weight, plain.Plain(smoothing=(0.0, 0.5)), (8, 8))
    assert best.name == "absmax 0.5"


@pytest.mark.parametrize("how", [plain.Plain(), plain.Plain("mse", smoothing=(0.5,))])
def test_every_product_is_quantized(
    spiky: planted.Planted, tmp_path: Path, how: plain.Plain
) -> None:
    path = quantized(spiky, tmp_path, how, (8, 8))
    names = [linear.node for linear in spiky.sites.linears]
    assert worker.quantized_products(path, names) == set(names)
    assert worker.quantized_products(spiky.path, names) == set()
    assert relative(path, spiky.path, spiky.windows[:3]) < 1


def test_spiking_products_are_left(spiky: planted.Planted, tmp_path: Path) -> None:
    how = plain.Plain(leave_above=64.0)
    built = plain.build(
        spiky.path, tmp_path / "model.onnx", spiky.windows[:6], (8, 8), how, bos=None
    )
    assert built.left == ["layers.1/mlp/down_proj", "layers.3/mlp/down_proj"]
    names = {linear.node for linear in spiky.sites.linears}
    found = worker.quantized_products(tmp_path / "model.onnx", sorted(names))
    assert found == names - set(built.left)


def test_four_bits_are_simulated(calm: planted.Planted, tmp_path: Path) -> None:
    path = quantized(calm, tmp_path, plain.Plain("mse"), (4, 4))
    graph = onnx.load(path)
    codes = [
        output for node in graph.graph.node if node.op_type == "QuantizeLinear"
        for output in node.output
    ]  # fmt: skip
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in codes)
    onnx.save(graph, tmp_path / "tapped.onnx")
    found = CausalLM(tmp_path / "tapped.onnx", extra_outputs=codes)
    ids = np.asarray([calm.windows[0].ids], np.int64)
    step = found.forward(ids, np.ones_like(ids), np.arange(ids.shape[1])[None])
    assert len(step.extras) == 4 * calm.decoder.blocks
    assert all(value.min() >= -8 and value.max() <= 7 for value in step.extras.values())
    kinds = {init.data_type for init in graph.graph.initializer}
    assert onnx.TensorProto.INT4 in kinds


# --- the prefix -----------------------------------------------------------------------------------


def test_prefix_equals_the_tokens_in_front(spiky: planted.Planted, tmp_path: Path) -> None:
    model = CausalLM(spiky.path)
    make_prefix(model, [4, 9, 2], None).save(tmp_path / "prefix.npz")
    prefix = Prefix.load(tmp_path / "prefix.npz")
    rows = [[5, 6, 7, 8], [11, 12]]
    found = PrefixedLM(model, prefix).forward(*left_pad(rows, pad_id=0)).logits
    for number, row in enumerate(rows):
        whole = planted.logits(model, [[4, 9, 2, *row]])[0]
        np.testing.assert_allclose(found[number, -len(row) :], whole[3:], atol=1e-3)


def test_bos_of_the_window_is_the_prefix_own(spiky: planted.Planted) -> None:
    model = CausalLM(spiky.path)
    prefixed = PrefixedLM(model, make_prefix(model, [4, 9, 1], 1))
    rows = [[1, 6, 7, 8], [12, 13]]
    found = prefixed.forward(*left_pad(rows, pad_id=0)).logits
    whole = planted.logits(model, [[4, 9, 1, 6, 7, 8]])[0]
    np.testing.assert_allclose(found[0], whole[2:], atol=1e-3)
    other = planted.logits(model, [[4, 9, 1, 12, 13]])[0]
    np.testing.assert_allclose(found[1, -2:], other[3:], atol=1e-3)


def test_prefix_tokens_are_the_frequent_outliers_and_bos() -> None:
    # Two windows of four tokens; position 0 always spikes, token 7 in both windows, token 8 in one.
    token = np.array([3, 7, 1, 8, 4, 1, 7, 2])
    position = np.tile(np.arange(4), 2)
    window = np.repeat([0, 1], 4)
    maxima = np.ones((2, 8))
    maxima[1, [0, 4]] = 1000
    assert choose_tokens(np.ones((2, 8)), window, position, token, BOS) == []
    assert choose_tokens(maxima, window, position, token, BOS) == [BOS]


def test_later_outliers_come_before_bos() -> None:
    token = np.concatenate([[3, 7, 1, 1, 1, 1], [4, 1, 7, 1, 1, 1]])
    position = np.tile(np.arange(6), 2)
    maxima = np.ones((1, 12))
    maxima[0, [0, 1, 6, 8]] = 1000
    assert choose_tokens(maxima, np.repeat([0, 1], 6), position, token, BOS) == [7, BOS]


def test_prefix_takes_the_spike_out_of_the_ranges(spiky: planted.Planted, tmp_path: Path) -> None:
    built = plain.build(
        spiky.path, tmp_path / "model.onnx", spiky.windows[:6], (8, 8),
        plain.Plain(prefix=True), bos=1,
    )  # fmt: skip
    assert built.prefix is not None and built.prefix.ids == [1]
    down = spiky.sites.blocks[1].mlp.output.input
    seen = [
        plain.observe(spiky.path, spiky.sites, spiky.windows[:6], prefix, seed=0)[down].absmax
        for prefix in (None, built.prefix)
    ]
    assert seen[1] < seen[0] / 10


# --- peers' packages ------------------------------------------------------------------------------


def peer_job(spiky: planted.Planted, folder: Path, **job: Any) -> Path:
    np.save(folder / "windows.npy", np.array([w.ids for w in spiky.windows[:3]], np.int64))
    job |= {
        "model": str(spiky.path), "output": str(folder / "model.onnx"),
        "windows": str(folder / "windows.npy"),
        "nodes": [linear.node for linear in spiky.sites.linears],
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    return folder / "job.json"


def run_peer(python: Path, job: Path) -> dict[str, Any]:
    done = subprocess.run([python, peer.__file__, job], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("method", ["MinMax", "Entropy"])
def test_onnxruntime_quantizes_every_product(
    spiky: planted.Planted, tmp_path: Path, method: str
) -> None:
    job = peer_job(spiky, tmp_path, tool="onnxruntime", options={"method": method})
    report = run_peer(Path(sys.executable), job)
    assert report["peak_bytes"] > 0 and "onnxruntime" in report["versions"]
    names = [linear.node for linear in find_sites(io.load(spiky.path)).linears]
    assert worker.quantized_products(tmp_path / "model.onnx", names) == set(names)
    assert np.isfinite(logits(tmp_path / "model.onnx", spiky.windows[0])).all()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("environment", "tool", "options"),
    [
        ("modelopt", "modelopt", {"method": "max"}),
        ("modelopt", "modelopt", {"method": "entropy"}),
        ("neural-compressor", "onnxruntime", {"method": "MinMax", "smooth": True}),
    ],
)
def test_packages_in_their_environments(
    spiky: planted.Planted, tmp_path: Path, environment: str, tool: str, options: dict[str, Any]
) -> None:
    try:
        python = Environments(default_folder(), build=False).python(environment)
    except DataError as error:
        pytest.skip(str(error))
    run_peer(python, peer_job(spiky, tmp_path, tool=tool, options=options))
    names = [linear.node for linear in spiky.sites.linears]
    assert worker.quantized_products(tmp_path / "model.onnx", names) == set(names)


def test_a_missing_environment_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nvidia-modelopt"):
        Environments(tmp_path, build=False).python("modelopt")


# --- methods and jobs -----------------------------------------------------------------------------


def test_every_recipe_of_the_project_is_a_row() -> None:
    names = {job.method.name for job in methods.recipe_jobs("w8a8", None, [0])}
    assert {"ours:w8a8", "ours:w8a8+insertion-kv"} <= names and "ours:w4a16" not in names
    assert "ours:fp16" in {job.method.name for job in methods.float_jobs(None, 0)}
    assert {"rtn", "ort-minmax", "modelopt-max"} <= names


def test_context_rows_have_one_seed_unless_named() -> None:
    found = [job for job in methods.recipe_jobs("w8a8", None, [0, 1]) if job.method.brief]
    assert found and all(job.seed == 0 for job in found)
    assert [job.seed for job in methods.recipe_jobs("w8a8", ["rotated"], [0, 1])] == [0, 1]


def test_packages_have_no_simulated_recipes() -> None:
    names = {job.method.name for job in methods.recipe_jobs("w8a6", None, [0])}
    assert "rtn" in names and "ort-minmax" not in names


def test_bits_of_a_recipe_name() -> None:
    assert methods.bits("w4a8-norot") == (4, 8)
    assert methods.is_simulation("w8a6") and not methods.is_simulation("w8a8")
    with pytest.raises(UsageError, match="int8"):
        methods.bits("int8")


def test_unknown_method_is_refused() -> None:
    with pytest.raises(UsageError, match="nosuch"):
        methods.chosen(["nosuch"])


# --- table ----------------------------------------------------------------------------------------


def record(method: str, seed: int = 0, **figures: Any) -> dict[str, Any]:
    text = {"perplexity": figures.get("perplexity", 10.0), "kl": 0.1, "top1": 0.9, "tokens": 5}
    task = {"chosen": figures.get("chosen", [0, 1]), "gold": [0, 0], "not_finite": 0}
    return {
        "method": method, "label": method, "about": "a row", "kind": figures.get("kind", "plain"),
        "recipe": None if method == "fp32" else "w8a8", "seed": seed, "simulation": False,
        "error": figures.get("error"),
        "build": {"quantized": figures.get("quantized", 4), "linears": 4, "left": [],
                  "seconds": 3.0, "peak_bytes": 2e9, "notes": []},
        "results": {"texts": {"boolq": text}, "tasks": {"piqa": task}},
    }  # fmt: skip


def test_rows_are_medians_over_seeds() -> None:
    records = [record("fp32", kind="float")]
    records += [record("rtn", seed, perplexity=p) for seed, p in enumerate((12.0, 11.0, 15.0))]
    row = table.summarize(records)[1]
    assert row["boolq"]["ratio"] == {"median": 1.2, "low": 1.1, "high": 1.5}
    assert row["seeds"] == [0, 1, 2]
    assert row["piqa"]["accuracy"]["median"] == 0.5
    text = table.markdown(table.summarize(records))
    assert "| rtn | w8a8 | 100.0% | 12.000 (11.000..15.000) | 1.2000 (1.1000..1.5000) |" in text


def test_questions_of_one_seed_are_enough() -> None:
    records = [record("fp32", kind="float"), record("rtn"), record("rtn", seed=1)]
    records[2]["results"]["tasks"] = {}
    row = table.summarize(records)[1]
    assert row["seeds"] == [0, 1] and row["piqa"]["flips"]["median"] == 0


def test_a_failed_row_says_why() -> None:
    records = [record("fp32", kind="float"), record("rtn", error="it broke")]
    text = table.markdown(table.summarize(records))
    assert "failed: it broke" in text


def test_no_rows_without_fp32() -> None:
    assert table.summarize([record("rtn")]) == []
    assert table.markdown([]) == "No row is finished."


def test_best_peers_quantize_everything() -> None:
    records = [record("fp32", kind="float")]
    records += [record(n, perplexity=p) for n, p in (("a", 13.0), ("b", 11.0), ("c", 12.0))]
    records += [record("left", perplexity=10.1, quantized=3)]
    records += [record("ours", perplexity=10.1, kind="ours")]
    assert command.best_peers(records) == ["b", "c"]


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX causal LM with spikes, a tokenizer of bytes beside it, and a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    planted.save(planted.Decoder(vocab=258, blocks=4), folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>")])
    (folder / "assets").mkdir()
    core.save(str(folder / "assets" / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "assets" / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "prose.txt").write_text(
        " ".join(f"The {n} dogs saw {n * n} foxes." for n in range(99))
    )
    return folder


def compare(tiny: Path, work: Path, *extra: str) -> int:
    return command.main([
        "--model", str(tiny / "model.onnx"), "--tokenizer", str(tiny / "assets"),
        "--work", str(work), "--text", str(tiny / "prose.txt"), "--calibration", "builtin",
        "--samples", "3", "--calibration-length", "40", "--windows", "2", "--length", "40",
        "--items", "0", "--seeds", "0", "--no-install", *extra,
    ])  # fmt: skip


def test_one_command_and_its_second_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tiny, tmp_path, "--recipes", "w8a8", "--methods", "rtn,prefix") == 0
    first = capsys.readouterr()
    assert "of memory" in first.err  # what it needs is said first
    assert "| RTN absmax | w8a8 | 100.0% |" in first.out
    report = json.loads((tmp_path / "comparison.json").read_text())
    assert report["complete"] and report["seeds"] == [0] and report["cpu"]
    assert report["checksums"]["calibration"] != report["checksums"]["prose"]
    rows = {row["method"]: row for row in report["rows"]}
    assert rows["fp32"]["prose"]["ratio"]["median"] == 1
    assert 0 < rows["prefix"]["prose"]["kl"]["median"] < 1
    assert rows["rtn"]["peak_bytes"]["median"] > 0
    assert not list((tmp_path / "graphs").iterdir())  # gigabytes, unless asked for

    real = command._child

    def only_trace(step: str, task: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        assert step == "trace", f"{step} was run again"
        return real(step, dict(task), folder)

    monkeypatch.setattr(command, "_child", only_trace)
    assert compare(tiny, tmp_path, "--recipes", "w8a8", "--methods", "rtn,prefix") == 0
    assert capsys.readouterr().out == first.out


@pytest.mark.parametrize("traced", ["traced/model.onnx", "whole.onnx"])
def test_the_traced_model_and_its_assets_outlive_a_row(tmp_path: Path, traced: str) -> None:
    """A graph whose weights lie in other files is written whole, not beside its assets."""
    for stage in ("traced/assets", "run/w8a8-fp16"):
        (tmp_path / stage).mkdir(parents=True)
    task = {"traced": str(tmp_path / traced), "assets": str(tmp_path / "traced" / "assets")}
    worker._clear(tmp_path, task)
    assert [path.name for path in tmp_path.iterdir()] == ["traced"]


@pytest.mark.slow
def test_ours_is_a_row_like_the_others(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tiny, tmp_path, "--recipes", "w8a8", "--methods", "ours:w8a8,ours:fp16") == 0
    out = capsys.readouterr().out
    assert "| iq-export w8a8 | w8a8 | 100.0% |" in out and "1 of 1 lifecycles replaced" in out
    assert "| iq-export fp16 | - | 0.0% |" in out
    assert [entry.name for entry in (tmp_path / "compile").iterdir() if entry.is_dir()] == [
        "traced"
    ]


def test_interrupt_prints_what_is_there(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = command._child

    def interrupted(step: str, task: dict[str, Any], folder: Path) -> dict[str, Any]:
        if task.get("kind") == "plain":
            raise KeyboardInterrupt
        return real(step, task, folder)

    monkeypatch.setattr(command, "_child", interrupted)
    assert compare(tiny, tmp_path, "--recipes", "w8a8", "--methods", "rtn") == 130
    assert "| fp32, traced | - |" in capsys.readouterr().out
    report = json.loads((tmp_path / "comparison.json").read_text())
    assert not report["complete"]


def test_calibrating_on_the_evaluation_text_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(tiny / "prose.txt")
    assert compare(tiny, tmp_path, "--calibration", text) == DataError.exit_code
    assert "calibration text is an evaluation text" in capsys.readouterr().err


def test_a_row_that_fails_does_not_end_the_others(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "no-peers")
    code = compare(
        tiny, tmp_path, "--recipes", "w8a8", "--methods", "modelopt-max,rtn", "--peer-env", folder
    )
    assert code == 0
    out = capsys.readouterr().out
    assert "failed: no environment" in out and "| RTN absmax | w8a8 | 100.0% |" in out
    assert not json.loads((tmp_path / "comparison.json").read_text())["complete"]
