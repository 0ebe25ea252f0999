"""What torch and onnxscript would change or not take, and is exported all the same."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from iq_export.model.arithmetic import float64
from iq_export.model.capture import mask_plan
from iq_export.model.verify import compare, refer
from tests.model import families, parity
from tools.families.tiny import tiny_config


def test_the_epsilon_of_a_norm_is_kept_however_small(tmp_path: Path) -> None:
    graph = ir.load(parity.export(families.model("helium"), tmp_path)).graph
    norms = [node for node in graph if node.op_type == "RMSNormalization"]
    assert len(norms) == 7
    for node in norms:
        assert node.attributes["epsilon"].as_float() == pytest.approx(1e-8)


def test_a_table_of_masks_bounds_the_trace_and_not_the_graph(tmp_path: Path) -> None:
    model = families.model("gpt_neo")
    path = parity.export(model, tmp_path)
    assert compare(path, refer(model)).holds
    (attention,) = (node for node in ir.load(path).graph if node.op_type == "Attention")
    assert attention.inputs[3].dtype == ir.DataType.BOOL


def test_a_window_that_the_code_does_not_apply_is_none() -> None:
    import transformers as hf

    with torch.device("meta"):
        plans = [
            mask_plan(hf.AutoModelForCausalLM.from_config(tiny_config(kind)))
            for kind in ("moshi", "mistral")
        ]
    assert [plan.window for plan in plans] == [None, 32]


def test_a_number_that_only_float64_holds_is_one_there() -> None:
    with float64():
        made = torch.full((), torch.finfo(torch.float64).min)
        assert torch.full((2,), 3).dtype == torch.int64
    assert made.dtype == torch.float64 and torch.isfinite(made)
