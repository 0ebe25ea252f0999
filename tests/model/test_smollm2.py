"""The embedded model itself: traced, it is the model that transformers loads."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from iq_export.model.load import materialize, resolve
from iq_export.model.trace import TracedModel, trace
from iq_export.run.generate import Tokenizer, generate
from iq_export.run.ort import CausalLM, left_pad
from tests.model.whole import load_model, whole_graph

pytestmark = pytest.mark.slow

LAYERS = 30
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return",
    "Once upon a time, in a small village by the sea, there lived an old man who",
)


@pytest.fixture(scope="module")
def traced(smollm2_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> TracedModel:
    """That of the session's compile."""
    kept = smollm2_bundle.parent / "work" / "traced"
    place = tmp_path_factory.mktemp("smollm2") / "traced"
    return trace(resolve("smollm2-135m"), place, reuse=kept)


@pytest.fixture(scope="module")
def original() -> Any:
    model = load_model(materialize(resolve("smollm2-135m"))).model
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def graph(traced: TracedModel) -> CausalLM:
    return CausalLM(whole_graph(traced))


@pytest.fixture(scope="module")
def rows(traced: TracedModel) -> list[list[int]]:
    tokenizer = Tokenizer(traced.assets)
    return [tokenizer.encode(text, add_bos=i == 0) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def expected(original: Any, rows: list[list[int]]) -> list[np.ndarray]:
    import torch

    with torch.no_grad():
        return [
            original(input_ids=torch.tensor([row]), use_cache=False).logits[0].numpy()
            for row in rows
        ]


def test_left_padded_batch_equals_the_rows(
    graph: CausalLM, rows: list[list[int]], expected: list[np.ndarray]
) -> None:
    bound = 1e-3 * (expected[0].max() - expected[0].min())
    padded = graph.forward(*left_pad(rows, 2)).logits
    assert np.isfinite(padded).all()
    for index, (row, want) in enumerate(zip(rows, expected, strict=True)):
        assert np.abs(padded[index, -len(row) :] - want).max() < bound
        alone = graph.forward(*left_pad([row], 2)).logits[0]
        assert np.abs(alone - want).max() < bound


def test_greedy_tokens_are_the_same(graph: CausalLM, original: Any, rows: list[list[int]]) -> None:
    """64 steps, with the cache, and without by computing everything anew."""
    import torch

    prompt = rows[2]
    with torch.no_grad():
        out = original.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None
        )
    wanted = out[0, len(prompt) :].tolist()
    assert len(wanted) == 64
    assert list(generate(graph, prompt, max_new_tokens=64)) == wanted
    whole = [*prompt, *wanted[:-1]]
    anew = graph.forward(*left_pad([whole], 2)).logits[0, len(prompt) - 1 :].argmax(-1)
    assert anew.tolist() == wanted


def test_the_graph_is_as_promised(traced: TracedModel) -> None:
    model = onnx.load(traced.model, load_external_data=False)
    count = collections.Counter(node.op_type for node in model.graph.node)
    found = {op: count[op] for op in ("MatMul", "RMSNormalization", "RotaryEmbedding", "Attention")}
    assert found == {
        "MatMul": 7 * LAYERS + 1,
        "RMSNormalization": 2 * LAYERS + 1,
        "RotaryEmbedding": 2 * LAYERS,
        "Attention": LAYERS,
    }
    assert count["Cos"] == count["Sin"] == 1 and count["Expand"] == 0
    assert traced.layers_traced == 2
    assert traced.parity is not None and traced.parity < 1e-4
    # 134,515,008 parameters in fp32: the tied embedding is stored once.
    data = Path(f"{traced.model}.data").stat().st_size
    assert 134_515_008 * 4 <= data + 4096 < 134_515_008 * 4 + 65_536


def test_the_licence_goes_with_the_weights(traced: TracedModel) -> None:
    assert "Apache License" in (traced.assets / "LICENSE").read_text(encoding="utf-8")
    assert "SmolLM2" in (traced.assets / "NOTICE").read_text(encoding="utf-8")


def test_it_answers(traced: TracedModel, graph: CausalLM) -> None:
    tokenizer = Tokenizer(traced.assets)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.encode(tokenizer.apply_chat_template(question), add_bos=False)
    tokens = generate(graph, prompt, max_new_tokens=24, eos_ids=tokenizer.eos_ids)
    assert "".join(tokenizer.stream(tokens)) == "The capital of France is Paris."
