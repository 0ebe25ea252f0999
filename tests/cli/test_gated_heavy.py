"""A model whose residual stream exceeds half precision: Gemma-3-270M, `make test-gated`.

Plain fp16 gives NaN on it. Its terms must be accepted before it is fetched, so these tests run only
where it is in the cache already or IQ_EXPORT_ACCEPT_TERMS names it.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession

from iq_export.bundle.package import Bundle
from iq_export.graph import io
from iq_export.graph.half import HALF_MAX
from iq_export.model.fetch import is_cached
from iq_export.observe.samples import Window, load_text, windows
from iq_export.references import reference_graphs
from iq_export.run.generate import Tokenizer

MODEL = "gemma3-270m"
ACCEPTED = MODEL in os.environ.get("IQ_EXPORT_ACCEPT_TERMS", "") or is_cached(MODEL)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.heavy,
    pytest.mark.skipif(not ACCEPTED, reason=f"IQ_EXPORT_ACCEPT_TERMS does not name {MODEL}"),
]

TOOLS = Path(__file__).parents[2] / "tools"
BARS = {"fp16": 1.01, "w8a8": 1.03}
PLAIN = "plain fp16"
# Values of one ONNX Runtime run, so that memory stays small.
_GROUP = 60


def run(*words: str) -> Any:
    command = [sys.executable, "-m", "iq_export.cli", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}:\n{done.stderr[-4000:]}"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gated")


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    """BoolQ's passages: text that was not used for calibration."""
    path = folder / "boolq.txt"
    path.write_text(runpy.run_path(str(TOOLS / "fetch_boolq.py"))["boolq_text"](), "utf-8")
    return path


@pytest.fixture(scope="module", params=BARS)
def bundle(request: pytest.FixtureRequest, folder: Path) -> Bundle:
    """Compiled as a user does it; the trace is shared."""
    out = folder / request.param
    words = ["--recipe", request.param, "--accept-terms", "--work", str(folder / "work")]
    run(
        "compile", MODEL, str(out), *words, "--target", "h100"
    )  # whose engine is built on the device
    return Bundle.open(out)


@pytest.fixture(scope="module")
def rows(bundle: Bundle, folder: Path, text: Path) -> list[dict[str, Any]]:
    words = ["--text", str(text), "--work", str(folder / "work"), "--windows", "32", "--no-speed"]
    return run("eval", str(bundle.folder), *words)["rows"]


def test_the_stream_is_scaled_and_says_so(bundle: Bundle) -> None:
    assert bundle.plan()["residual_scale"] == 0.25
    assert any("1/4" in note for note in bundle.manifest.notes)


def test_accuracy_beside_plain_half(bundle: Bundle, rows: list[dict[str, Any]]) -> None:
    recipe = bundle.manifest.recipe
    ours = {row["bos"]: row for row in rows if row["graph"] == f"bundle ({recipe})"}
    assert ours[True]["error"] is None and ours[False]["error"] is None
    print(f"{recipe}: perplexity / fp32 by BOS", {bos: row["ratio"] for bos, row in ours.items()})
    # The tokenizer puts a BOS in front of every text; without one the model itself is at a loss.
    assert ours[True]["ratio"] <= BARS[recipe]
    plain = next(row for row in rows if row["graph"] == PLAIN and row["bos"])
    assert "NaN" in plain["error"]


def test_every_half_value_is_finite(
    bundle: Bundle, folder: Path, text: Path, tmp_path: Path
) -> None:
    """A CPU computes between half values in float32, so each is looked at where it is half."""
    tokenizer, words = Tokenizer(bundle.folder), load_text(text)
    cut = [windows(tokenizer, words, length=256, count=2, seed=9, bos=b)[0] for b in KINDS]
    assert half_peak(bundle.model, cut) < HALF_MAX
    plain = tmp_path / "plain.onnx"
    io.save(reference_graphs(bundle, folder / "work")[PLAIN], plain)
    assert half_peak(plain, cut) == np.inf


KINDS: tuple[Any, ...] = ("with", "without")


def half_peak(path: Path, cut: list[Window]) -> float:
    """The largest magnitude of any half value but weights, Inf for NaN."""
    model = onnx.load(path, load_external_data=False)
    half = onnx.TensorProto.FLOAT16
    typed = {v.name: v for v in model.graph.value_info if v.type.tensor_type.elem_type == half}
    names = [
        name
        for node in model.graph.node
        if node.op_type not in ("DequantizeLinear", "Transpose")
        for name in node.output
        if name in typed
    ]
    assert len(names) > 300
    peak = 0.0
    for start in range(0, len(names), _GROUP):
        part = names[start : start + _GROUP]
        del model.graph.output[:]
        model.graph.output.extend(typed[name] for name in part)
        tapped = path.with_name(".taps.onnx")
        try:
            onnx.save(model, tapped)
            session = InferenceSession(tapped, providers=["CPUExecutionProvider"])
        finally:
            tapped.unlink(missing_ok=True)
        for window in cut:
            found = session.run(part, feeds(session, window))
            top = [np.abs(value.astype(np.float32)).max() for value in found]
            peak = max(peak, float(np.nan_to_num(np.array(top), nan=np.inf, posinf=np.inf).max()))
    return peak


def feeds(session: InferenceSession, window: Window) -> dict[str, np.ndarray]:
    ids = np.asarray([window.ids], np.int64)
    positions = np.arange(ids.shape[1], dtype=np.int64)[None]
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}
    shapes = {v.name: (1, v.shape[1], 0, v.shape[3]) for v in session.get_inputs()
              if v.name not in known}  # fmt: skip
    return known | {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
