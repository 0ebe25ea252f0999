"""Attention of the installed ONNX Runtime against NumPy: what the compiled graphs rely on.

Also a script, for another release: `python attention.py` with that release on the path ends with 1
and names the cases that differ. It needs NumPy, onnx and ONNX Runtime only.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

_HEADS, _HEAD_DIM, _SEQ, _TOTAL, _WINDOW, _SCALE = 4, 16, 6, 9, 3, 0.25


@dataclass(frozen=True)
class Case:
    """`window`: only the last _WINDOW tokens are seen; `softcap` 0: none."""

    half: bool
    softcap: float
    window: bool
    kv_heads: int


CASES = [Case(*c) for c in itertools.product((False, True), (0.0, 5.0), (False, True), (4, 2, 1))]


def error(case: Case) -> float:
    """Largest difference to float64 NumPy. Two rows, the first left-padded by two tokens."""
    kind = np.float16 if case.half else np.float32
    random = np.random.default_rng(0)
    query = (3 * random.normal(size=(2, _HEADS, _SEQ, _HEAD_DIM))).astype(kind)
    key = (3 * random.normal(size=(2, case.kv_heads, _TOTAL, _HEAD_DIM))).astype(kind)
    value = random.normal(size=key.shape).astype(kind)
    rows, cols = np.arange(_SEQ)[:, None] + _TOTAL - _SEQ, np.arange(_TOTAL)[None]
    seen = cols <= rows
    if case.window:
        seen &= cols > rows - _WINDOW
    mask = np.broadcast_to(seen, (2, 1, _SEQ, _TOTAL)).copy()
    mask[0, :, :, :2] = False
    mask |= cols == rows
    session = onnxruntime.InferenceSession(_model(case), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"q": query, "k": key, "v": value, "mask": mask})
    return float(np.abs(found - _reference(query, key, value, mask, case.softcap)).max())


def tolerance(case: Case) -> float:
    """Rounding of the type; a wrong order of mask and softcap is off by 0.5 and more."""
    return 2e-2 if case.half else 1e-4


def _reference(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray, softcap: float
) -> np.ndarray:
    """Scale, softcap, mask, softmax: the order of ONNX's Attention."""
    repeats = _HEADS // key.shape[1]
    key, value = (np.repeat(x.astype(np.float64), repeats, axis=1) for x in (key, value))
    scores = _SCALE * query.astype(np.float64) @ key.swapaxes(-1, -2)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ value


def _model(case: Case) -> bytes:
    kind = TensorProto.FLOAT16 if case.half else TensorProto.FLOAT
    node = helper.make_node(
        "Attention", ["q", "k", "v", "mask"], ["y"], scale=_SCALE, softcap=case.softcap
    )
    cached = [2, case.kv_heads, "total", _HEAD_DIM]
    inputs = [
        helper.make_tensor_value_info("q", kind, [2, _HEADS, "seq", _HEAD_DIM]),
        helper.make_tensor_value_info("k", kind, cached),
        helper.make_tensor_value_info("v", kind, cached),
        helper.make_tensor_value_info("mask", TensorProto.BOOL, [2, 1, "seq", "total"]),
    ]
    outputs = [helper.make_tensor_value_info("y", kind, None)]
    graph = helper.make_graph([node], "attention", inputs, outputs)
    opsets = [helper.make_opsetid("", 23)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


if __name__ == "__main__":
    wrong = [case for case in CASES if error(case) > tolerance(case)]
    print(f"ONNX Runtime {onnxruntime.__version__}: {len(wrong)} of {len(CASES)} wrong", *wrong)
    sys.exit(bool(wrong))
