"""The sweep over all causal LMs: how it sorts, goes on, and what it writes; a sample of it."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from iq_export.errors import GraphError, ModelError
from tools import families
from tools.families import __main__ as command
from tools.families import judge as judging
from tools.families.judge import COMPILES, NOT_MADE, REFUSED, TRACEBACK, apart, judge
from tools.families.products import block_products
from tools.families.record import Record
from tools.families.table import RECURRENT, tables
from tools.families.tiny import NotMade, causal_lms, tiny_config
from tools.pages import part

GIGABYTES = 12 << 30
COMPILED = {
    "outcome": COMPILES, "products": 14, "int8": 14, "parity": 4.2e-7, "noise_ratio": 1.2,
    "engine": "", "seconds": 6.0,
}  # fmt: skip
ROWS: dict[str, Any] = {
    "gemma3": COMPILED | {"part": "text"},
    "gemma2": COMPILED | {"engine": "no softcap"},
    "llama": COMPILED,
    "modernbert-decoder": COMPILED | {"int8": 6},
    "mixtral": {
        "outcome": REFUSED, "step": "configuration",
        "reason": "mixtral has architecture 'mixtral', which is not supported: a | b.",
    },
    "odd": {"outcome": TRACEBACK, "step": "trace to ONNX", "reason": "KeyError: 'x'"},
    "none": {"outcome": NOT_MADE, "reason": "ValueError: no"},
    "mamba": {"outcome": REFUSED, "step": "configuration", "reason": "It has state spaces."},
}  # fmt: skip


def test_the_table() -> None:
    text = tables(Record("5.0", ROWS))
    assert "transformers 5.0 has 8 types of causal LMs, 1 of them recurrent." in text
    assert "| compiles | 4 of 7 | 0 |" in text
    assert "| refused | 1 of 7 | 1 |" in text
    assert "| traceback | 1 of 7 | 0 |" in text
    assert "| compiles with 95% of its block products in int8 | 3 | |" in text
    assert "| gemma3 (`--part text`) | 14 of 14 |" in text
    assert "| llama | 14 of 14 | 4.2e-07 | 1.2 | built |" in text
    assert "| compiles, with an engine for rtx-all | 3 | |" in text
    assert "| gemma2 | 14 of 14 | 4.2e-07 | 1.2 | no softcap |" in text
    assert "| mixtral | refused | at once | a \\| b. |" in text
    assert "| odd | traceback | trace to onnx | keyError: 'x' |" in text
    assert "| mamba | refused | at once | it has state spaces. |" in text


def test_the_page_is_what_the_record_gives() -> None:
    root = Path(families.__file__).parents[2]
    record = Record(**json.loads((root / command.RECORD).read_text(encoding="utf-8")))
    assert part(root / command.PAGE, "families") == tables(record)
    assert set(record.rows) == set(causal_lms()) >= RECURRENT
    outcomes = {kind: row["outcome"] for kind, row in record.rows.items()}
    assert TRACEBACK not in outcomes.values()
    assert {outcomes[kind] for kind in RECURRENT} == {REFUSED}
    for row in record.rows.values():
        reason = row.get("reason", ".")
        assert reason.endswith(".") and "\n" not in reason and "/tmp" not in reason


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ModelError("It is refused."), REFUSED),
        (GraphError("So is this."), REFUSED),
        (NotMade("ValueError: no"), NOT_MADE),
        (KeyError("x"), TRACEBACK),
        (AssertionError(), TRACEBACK),
    ],
)
def test_what_is_raised_is_sorted(
    error: Exception, outcome: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(kind: str, folder: Path, progress: Any) -> Any:
        with progress.step("Trace"), progress.step("trace to ONNX"):
            raise error

    monkeypatch.setattr(judging, "_compiled", fail)
    row = judge("llama", tmp_path)
    assert row["outcome"] == outcome and row["reason"]
    if outcome in (REFUSED, TRACEBACK):
        assert row["step"] == "trace to ONNX"


def _late(folder: Path) -> Any:
    time.sleep(60)


def _dying(folder: Path) -> Any:
    os._exit(9)


def _greedy(folder: Path) -> Any:
    try:
        bytearray(1 << 50)
    except MemoryError:
        return {"outcome": REFUSED, "reason": "no memory"}


def test_a_fork_is_limited() -> None:
    assert apart(_greedy, seconds=30, memory=GIGABYTES)["reason"] == "no memory"
    assert apart(_dying, seconds=30, memory=GIGABYTES) == {
        "outcome": TRACEBACK, "reason": "the process ended with 9.",
    }  # fmt: skip
    late = apart(_late, seconds=0.2, memory=GIGABYTES)
    assert late == {"outcome": TRACEBACK, "reason": "not done within 0.2 seconds."}


def test_it_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def row(work: partial[Any], **limits: float) -> Any:
        asked.extend(work.args)
        if asked == ["mixtral", "odd"]:
            raise KeyboardInterrupt
        return ROWS[work.args[0]]

    page = tmp_path / "page.md"
    page.write_text("<!-- families: begin -->\n<!-- families: end -->\n", encoding="utf-8")
    argv = ["--json", str(tmp_path / "rows.json"), "--table", str(page)]
    monkeypatch.setattr(command, "causal_lms", lambda: ["mixtral", "odd", "llama"])
    monkeypatch.setattr(command, "apart", row)
    with pytest.raises(KeyboardInterrupt):
        command.main(argv)
    assert command.main(argv) == 0
    assert asked == ["mixtral", "odd", "odd", "llama"]
    assert command.main([*argv, "--only", "odd"]) == 0
    assert asked[4:] == ["odd"]
    found = Record.read(tmp_path / "rows.json")
    assert list(found.rows) == ["llama", "mixtral", "odd"]
    assert part(page, "families") == tables(found)
    with pytest.raises(SystemExit):
        command.main([*argv, "--only", "llama9000"])


def test_rows_of_another_transformers_are_not_mixed_in(tmp_path: Path) -> None:
    Record("4.0", ROWS).write(tmp_path / "rows.json")
    assert Record.read(tmp_path / "rows.json").rows == {}


def test_block_products_are_those_that_a_residual_connection_passes_by() -> None:
    """A tied head reads its table through a Transpose; attention multiplies no weights."""
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23]>
        causal_lm (float[b, 2] x, int64[b] input_ids) => (float[b, 3] logits)
        <float[3, 2] table = {1, 2, 3, 4, 5, 6}, float[2, 2] up = {1, 2, 3, 4},
         float[2, 2] down = {1, 2, 3, 4}, float[2] bias = {1, 2}>
        {
            narrow = Gather (table, input_ids)
            size = Shape (input_ids)
            [before] stream = MatMul (narrow, down)
            longer = Reshape (x, size)
            [n1] a = MatMul (stream, up)
            [n2] scores = MatMul (a, longer)
            [n3] c = MatMul (scores, down)
            biased = Add (c, bias)
            sum = Add (stream, biased)
            [behind] dense = MatMul (sum, up)
            turned = Transpose <perm = [1, 0]> (table)
            [n4] product = MatMul (dense, turned)
            logits = Add (product, product)
        }"""
    )
    assert block_products(model) == {"n1", "n3"}


def test_what_tokens_choose_their_experts_by_is_no_block_product() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23]>
        g (int64[b] input_ids) => (float[b, 8] logits)
          <float[9, 4] table = {0}, float[4, 4] router = {0}, float[4, 4] up = {0},
           float[4, 8] head = {0}, int64[1] k = {2}>
        {
            x = Gather (table, input_ids)
            [n1] scores = MatMul (x, router)
            shares = Softmax (scores)
            best, chosen = TopK (shares, k)
            [n2] hidden = MatMul (x, up)
            part = GatherElements <axis = 1> (hidden, chosen)
            share = Mul (part, best)
            both = Concat <axis = 1> (share, best)
            sum = Add (x, both)
            logits = MatMul (sum, head)
        }"""
    )
    assert block_products(model) == {"n2"}


@pytest.mark.parametrize(("kind", "says"), [("jetmoe", "experts"), ("rwkv", "(no attention")])
def test_a_sample_is_refused(kind: str, says: str, tmp_path: Path) -> None:
    row = judge(kind, tmp_path)
    assert row["outcome"] == REFUSED and row["step"] == "configuration" and says in row["reason"]


def test_a_sample_compiles(tmp_path: Path) -> None:
    row = judge("starcoder2", tmp_path)
    assert row["outcome"] == COMPILES, row
    assert row["int8"] == row["products"] == 12 and row["parity"] < 1e-5


def test_a_tiny_configuration_is_that_of_a_decoder() -> None:
    config = tiny_config("bart")
    assert (config.model_type, config.d_model, config.decoder_layers) == ("bart", 64, 2)
    assert not config.is_encoder_decoder


@pytest.mark.heavy
@pytest.mark.parametrize("kind", causal_lms())
def test_every_type_is_as_recorded(kind: str) -> None:
    root = Path(families.__file__).parents[2]
    record = Record(**json.loads((root / command.RECORD).read_text(encoding="utf-8")))
    row = apart(partial(judge, kind), seconds=900, memory=GIGABYTES)
    wanted = record.rows[kind]
    assert (row["outcome"], row.get("int8")) == (wanted["outcome"], wanted.get("int8")), row
