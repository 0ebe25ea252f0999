"""Experts of a traced graph: their marks, written out; and a whole model with shared experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from iq_export.graph import io
from iq_export.graph.sites import find_sites
from iq_export.model.experts import DOMAIN, marked, write_experts
from iq_export.model.verify import compare, refer
from tests.model import families, parity

TOKENS, HIDDEN, WIDE, EXPERTS = 7, 4, 6, 3
# As they are traced: gated, in halves of one product; plain, [in, out] and with biases.
GATED = """
<ir_version: 10, opset_import: ["" : 23, "iq_export.experts" : 1]>
g (float[t, 4] x, int64[t, 2] chosen, float[t, 2] shares) => (float[t, 4] y) {
  a = iq_export.experts.ToExperts (x, chosen)
  b = iq_export.experts.ExpertMatMul <transposed = 0> (a, gate_up_proj)
  gate, up = Split <axis = -1, num_outputs = 2> (b)
  active = Tanh (gate)
  c = Mul (active, up)
  d = iq_export.experts.ExpertMatMul <transposed = 0> (c, down_proj)
  sum = iq_export.experts.FromExperts <experts = 3> (d, chosen, shares)
  y = Identity (sum)
}
"""
PLAIN = """
<ir_version: 10, opset_import: ["" : 23, "iq_export.experts" : 1]>
g (float[t, 4] x, int64[t, 2] chosen, float[t, 2] shares) => (float[t, 4] y) {
  a = iq_export.experts.ToExperts (x, chosen)
  b = iq_export.experts.ExpertMatMul <transposed = 1> (a, up_proj)
  c = iq_export.experts.ExpertAdd (b, up_proj_bias)
  active = Tanh (c)
  d = iq_export.experts.ExpertMatMul <transposed = 1> (active, down_turned)
  sum = iq_export.experts.FromExperts <experts = 3> (d, chosen, shares)
  y = Identity (sum)
}
"""
SHAPES = {
    "gate_up_proj": (EXPERTS, 2 * WIDE, HIDDEN), "down_proj": (EXPERTS, HIDDEN, WIDE),
    "up_proj": (EXPERTS, HIDDEN, WIDE), "up_proj_bias": (EXPERTS, WIDE),
    "down_turned": (EXPERTS, WIDE, HIDDEN),
}  # fmt: skip


def written(text: str, arrays: dict[str, np.ndarray]) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in arrays.items() if name in used
    )
    model = ir.from_proto(proto)
    for value in (value for node in model.graph for value in node.outputs):
        value.dtype = ir.DataType.FLOAT
        if value.name in ("gate", "up"):
            value.shape = ir.Shape([1, None, WIDE])
    assert marked(model.graph)
    write_experts(model.graph)
    assert not marked(model.graph)
    del model.opset_imports[DOMAIN]
    return model


def expected(
    text: str, w: dict[str, np.ndarray], x: np.ndarray, chosen: np.ndarray, shares: np.ndarray
) -> np.ndarray:
    y = np.zeros_like(x)
    for token, (pair, its) in enumerate(zip(chosen, shares, strict=True)):
        for expert, share in zip(pair, its, strict=True):
            if text == GATED:
                gate, up = np.split(w["gate_up_proj"][expert] @ x[token], 2)
                out = w["down_proj"][expert] @ (np.tanh(gate) * up)
            else:
                inner = x[token] @ w["up_proj"][expert] + w["up_proj_bias"][expert]
                out = np.tanh(inner) @ w["down_turned"][expert]
            y[token] += share * out
    return y


@pytest.mark.parametrize("text", [GATED, PLAIN])
@pytest.mark.parametrize("unused", [None, 0, 2])
def test_marks_are_written_out(text: str, unused: int | None) -> None:
    """Every token gets what its experts make of it; one that nobody chose has no rows."""
    rng = np.random.default_rng(0)
    weights = {n: rng.normal(size=shape).astype(np.float32) for n, shape in SHAPES.items()}
    session = onnxruntime.InferenceSession(ir.to_proto(written(text, weights)).SerializeToString())
    known = [expert for expert in range(EXPERTS) if expert != unused]
    for tokens in (TOKENS, 1):
        x = rng.normal(size=(tokens, HIDDEN)).astype(np.float32)
        chosen = np.stack([rng.choice(known, 2, replace=False) for _ in range(tokens)])
        shares = rng.uniform(size=(tokens, 2)).astype(np.float32)
        (found,) = session.run(None, {"x": x, "chosen": chosen, "shares": shares})
        np.testing.assert_allclose(found, expected(text, weights, x, chosen, shares), atol=1e-5)


def test_products_of_experts_read_matrices() -> None:
    weights = {n: np.zeros(shape, np.float32) for n, shape in SHAPES.items()}
    names = {n.inputs[1].name for n in written(GATED, weights).graph if n.op_type == "MatMul"}
    kinds = ("gate_proj", "up_proj", "down_proj")
    assert names == {f".{e}.{kind}.weight" for e in range(EXPERTS) for kind in kinds}


def test_a_model_with_shared_experts_is_traced(tmp_path: Path) -> None:
    """Its code works on flat tokens throughout: products read `[batch, seq, features]` again."""
    model = families.model("qwen2_moe")
    path = parity.export(model, tmp_path)
    sites = find_sites(io.load(path))
    assert sites.refused == () and len(sites.blocks) == 3
    for block in sites.blocks:
        mlp, at = block.mlp, f"layers.{block.index}/mlp"
        assert [route.output.node for route in mlp.routes if not route.rows] == [
            f"{at}/shared_expert/down_proj"
        ]
        assert [route.output.node for route in mlp.routes if route.rows] == [
            f"{at}/experts.{expert}/down_proj" for expert in range(4)
        ]
        assert {linear.node for linear in mlp.routers} == {f"{at}/gate", f"{at}/shared_expert_gate"}
        assert mlp.straight and len(mlp.readers) > 2
    assert compare(path, refer(model)).holds
