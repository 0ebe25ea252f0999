"""The real model through the commands of the README, held to the bars of the project.

One compile for the whole session (`smollm2_bundle`); everything here is read from its outputs.
"""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from iq_export.bundle.package import Bundle
from iq_export.cli import main
from iq_export.evaluate.compare import REFERENCE, compare
from iq_export.graph import io
from iq_export.references import reference_graphs
from iq_export.run.generate import Tokenizer

pytestmark = pytest.mark.slow

MINUTES, GIGABYTE = 60, 1e9
TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def boolq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BoolQ's passages: text that was not used for calibration."""
    path = tmp_path_factory.mktemp("text") / "boolq.txt"
    boolq_text = runpy.run_path(str(TOOLS / "fetch_boolq.py"))["boolq_text"]
    path.write_text(boolq_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def evaluated(
    smollm2_bundle: Path, boolq: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """A copy of the bundle after `iq-export eval` on 4 windows of 512 tokens."""
    folder = tmp_path_factory.mktemp("evaluated") / "bundle"
    shutil.copytree(smollm2_bundle, folder)
    work = str(smollm2_bundle.parent / "work")
    argv = ["eval", str(folder), "--text", str(boolq), "--work", work, "--windows", "4"]
    assert main(argv) == 0
    return Bundle.open(folder)


def ratios(evaluated: Bundle) -> dict[tuple[str, bool], float]:
    """(graph, with BOS) -> perplexity over fp32's."""
    assert evaluated.manifest.accuracy is not None
    return {(r["graph"], r["bos"]): r["ratio"] for r in evaluated.manifest.accuracy["rows"]}


def one(found: dict[tuple[str, bool], float], word: str) -> list[float]:
    """The ratios of the graph whose label holds `word`, with and without BOS."""
    values = [ratio for (graph, _), ratio in found.items() if word in graph]
    assert len(values) == 2, f"no graph '{word}' in {sorted(found)}"
    return values


def test_folder_is_whole_and_runs_in_a_plain_session(smollm2_bundle: Path) -> None:
    assert main(["verify", str(smollm2_bundle)]) == 0
    names = set(Bundle.open(smollm2_bundle).manifest.files)
    assert {"model.onnx", "model.onnx.data", "plan.json", "report.html", "config.json",
            "tokenizer.json", "engines/rtx-ampere.plan"} <= names  # fmt: skip
    assert any("LICENSE" in name for name in names)


def test_cost_of_the_compile(smollm2_bundle: Path) -> None:
    text = (smollm2_bundle.parent / "compile.json").read_text(encoding="utf-8")
    document = json.loads(text)
    assert document["seconds"] <= 12 * MINUTES
    assert document["peak_rss_bytes"] <= 5 * GIGABYTE


def test_two_lifecycles_are_found(smollm2_bundle: Path) -> None:
    assert len(Bundle.open(smollm2_bundle, verify=False).manifest.graph.lifecycles) == 2


def test_ranges_of_birth_and_death_shrink(smollm2_bundle: Path) -> None:
    bundle = Bundle.open(smollm2_bundle, verify=False)
    quantizers = {q["name"]: q for q in bundle.plan()["quantizers"]}
    replaced = [life for life in bundle.manifest.graph.lifecycles if life["replaced"]]
    assert replaced
    for block in {life[end] for life in replaced for end in ("birth", "death")}:
        (name,) = [q for q in quantizers if q.startswith(f"layers.{block}/mlp/down_proj")]
        assert quantizers[name]["absmax_before"] >= 20 * quantizers[name]["absmax_after"]


def test_size_against_the_fp32_export(smollm2_bundle: Path) -> None:
    ours = sum(path.stat().st_size for path in smollm2_bundle.glob("model.onnx*"))
    graph = io.load(smollm2_bundle.parent / "work" / "traced" / "model.onnx").graph
    traced = sum(v.const_value.nbytes for v in graph.initializers.values() if v.const_value)
    assert ours <= 0.32 * traced


def test_insertion_alone_is_exact(evaluated: Bundle) -> None:
    assert all(abs(ratio - 1) <= 0.001 for ratio in one(ratios(evaluated), "insertion"))


def test_w8a8_is_near_fp32_and_round_to_nearest_is_not(evaluated: Bundle) -> None:
    found = ratios(evaluated)
    # With twice the calibration windows, the default, it is at 1.008.
    assert all(ratio <= 1.03 for ratio in one(found, "bundle"))
    assert all(ratio > 1.5 for ratio in one(found, "round-to-nearest"))


def test_prefill_is_timed_against_fp32(evaluated: Bundle) -> None:
    assert evaluated.manifest.speed is not None
    assert evaluated.manifest.speed["length"] == 512


def test_it_speaks(smollm2_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "What is the capital of France? Answer in one sentence."
    argv = ["run", str(smollm2_bundle), "--prompt", prompt, "--max-new-tokens", "24", "--json"]
    assert main(argv) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert "Paris" in document["text"]


def test_it_is_inspected(evaluated: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(evaluated.folder)]) == 0
    text = capsys.readouterr().out
    assert "4 windows x 512 tokens of boolq.txt" in text
    assert "rtx-ampere" in text


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["code", "dialogue", "french"])
def test_insertion_elsewhere_than_calibrated(smollm2_bundle: Path, name: str) -> None:
    """Templates from English prose hold for other text: within 0.2 % of fp32."""
    text = runpy.run_path(str(TOOLS / "fetch_texts.py"))["TEXTS"][name]()
    work = smollm2_bundle.parent / "work"
    made = reference_graphs(Bundle.open(smollm2_bundle), work)
    graphs = {label: made[label] for label in (REFERENCE, "insertion only")}
    found = compare(graphs, Tokenizer(smollm2_bundle), text, count=8, length=512, text_name=name)
    assert found.windows == 8
    measured = {row.bos: row.ratio for row in found.rows if row.graph != REFERENCE}
    print(f"{name}: perplexity with insertion only / fp32, by BOS: {measured}")
    assert all(abs(ratio - 1) <= 0.002 for ratio in measured.values())
