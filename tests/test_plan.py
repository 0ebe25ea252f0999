"""`plan.json` and `sinks.safetensors` say what was decided, as plain data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from iq_export.decide.job import Calibration
from iq_export.pipeline import Rewrite, rewrite
from iq_export.plan import plan_record
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.report.html import render
from iq_export.saved_decisions import save_arrays
from tests import planted
from tests.planted import CPU
from tests.report.test_html import Balance
from tests.tiny_bundle import manifest


class Words:
    def decode(self, ids: list[int]) -> str:
        return " ".join(f"w{i}" for i in ids)

    def token(self, token: int) -> str | None:
        return None


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Rewrite:
    folder = tmp_path_factory.mktemp("plan")
    decoder = planted.WITH_DELIMITER
    data = planted.windows(decoder, count=12)
    calibration = Calibration(data[:4], data[4:], 0.1, 0, CPU)
    recipe = replace(load_recipe("w8a8"), smoothing=False)
    traced = planted.save(decoder, folder)
    (folder / "work").mkdir()
    return rewrite(traced, folder / "work", recipe, "fp32", calibration, Progress(quiet=True))


def test_plan_is_json(done: Rewrite) -> None:
    record = plan_record(done, Words())
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_what_was_found_stands_in_the_report_beside_what_was_made(done: Rewrite) -> None:
    plan = plan_record(done, Words())
    found, lives = plan["found"], plan["lifecycles"]
    assert (found["blocks"], found["hidden"]) == (len(done.sites.blocks), done.sites.hidden)
    assert found["channels"][0]["channel"] == lives[0]["channel"]
    assert {1} <= set(found["sample"]["lifecycle"]) <= {0, 1}
    made = manifest(name="planted", recipe="w8a8", dtype="fp32", opset=23, lifecycles=lives)
    page = render(made, plan)
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert "leave all others at block 1, on residual channel 5" in page
    assert "It stretches no product" not in page
    assert 'class="made"' in page and "compiled graph" in page
    for title in ("Findings", "Why the model broke", "Birth, persistence, death", "Templates",
                  "What stays in float"):  # fmt: skip
        assert f"<h2>{title}</h2>" in page


def test_lifecycles(done: Rewrite) -> None:
    (record,) = plan_record(done, Words())["lifecycles"]
    assert (record["birth"], record["death"], record["end"], record["channel"]) == (1, 3, 3, 5)
    assert record["replaced"] is True
    assert record["templates"] == 2
    assert len(record["template_spread"]) == 2
    assert sum(record["template_tokens"]) == record["tokens"]
    assert record["deviation"] == max(record["deviation_per_norm"].values()) < 0.02
    assert record["common_tokens"][0]["token"] == f"w{planted.DELIMITER}"
    assert record["position_0_forced"] is True
    assert record["match_agreement"] == 1
    assert record["thin_templates"] == []
    # A window has one first token and up to two delimiters; where it has one, the order is right.
    assert record["order_of_appearance"]["differs"] == 0
    (site,) = record["sites"]
    assert (site["block"], site["tokens"]) == (1, record["tokens"])


def test_insertion_says_form_losses_and_reason(done: Rewrite) -> None:
    (record,) = plan_record(done, Words())["lifecycles"]
    insertion = record["insertion"]
    assert insertion["form"] == done.sinks[0].form
    assert set(insertion["loss"]) == {"norm", "norm+kv", "kv"}
    assert all(set(x) == {"kl", "kl_semantic", "nll"} for x in insertion["loss"].values())
    assert insertion["reason"].startswith("KL to the traced graph")
    attended = set(done.sinks[0].key_values.rows)
    assert set(record["deviation_per_key_value"]) == attended
    assert set(record["deviation_max_per_key_value"]) == attended


def test_kept_lifecycle_says_why(done: Rewrite) -> None:
    """Replaceable, but the recipe left it: nothing of it is in the graph."""
    (record,) = plan_record(
        replace(done, chosen=replace(done.chosen, sinks=()), insertions=[]), Words()
    )["lifecycles"]
    assert record["replaced"] is False
    assert "insertion" not in record
    assert record["reason"].endswith("half precision holds the spike, so this recipe leaves it")


def test_sites_and_quantizers(done: Rewrite) -> None:
    record = plan_record(done, Words())
    assert [(s["block"], s["branch"]) for s in record["sites"]] == [
        (block, branch) for block in range(4) for branch in ("attention", "mlp")
    ]
    assert len(record["quantizers"]) == 16
    for quantizer in record["quantizers"]:
        assert quantizer["scale"] == pytest.approx(
            quantizer["clip"] * quantizer["absmax_semantic"] / 127
        )
        assert 0 < quantizer["p999_after"] <= quantizer["absmax_after"] * 1.001
    assert record["recall"] == done.recall
    assert set(record["observations"]) == {"residual_max_per_block", "down_proj_max_per_block"}
    assert all(len(x["before"]) == 4 for x in record["observations"].values())


def test_templates_file(done: Rewrite, tmp_path: Path) -> None:
    save_arrays(done.chosen, tmp_path / "sinks.safetensors")
    found = load_file(tmp_path / "sinks.safetensors")
    (sinks,) = done.sinks
    assert set(found) == {"0.detection", "0.restore"} | {f"0.insert.{name}" for name in sinks.norms}
    assert sinks.form == "norm"
    np.testing.assert_array_equal(found["0.restore"], sinks.restore)
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    assert {array.shape[0] for array in found.values()} == {2}


@pytest.mark.parametrize(("form", "residual"), [("kv", "set"), ("norm+kv", "restore")])
def test_templates_of_keys_and_values(
    done: Rewrite, tmp_path: Path, form: str, residual: str
) -> None:
    (sinks,) = (replace(s, form=form) for s in done.sinks)
    save_arrays(replace(done.chosen, sinks=(sinks,)), tmp_path / "sinks.safetensors")
    found = load_file(tmp_path / "sinks.safetensors")
    inserted = {f"0.insert.{name}" for name in sinks.norms} if form != "kv" else set()
    attended = {f"0.attend.{name}" for name in sinks.key_values.rows}
    assert set(found) == {"0.detection", f"0.{residual}"} | inserted | attended
    assert {array.shape[0] for array in found.values()} == {2}
