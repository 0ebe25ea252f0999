"""A conversation of several turns through the KV cache gives the same tokens as one pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from iq_export.run.generate import Tokenizer
from iq_export.run.ort import CausalLM
from tests.planted import DELIMITER, Planted

SEED_TURNS = ([3, 11, 4], [DELIMITER, 8, 21, DELIMITER, 2], [17], [5, DELIMITER, 30])


def converse(
    model: CausalLM, turns: Sequence[Sequence[int]], reply: int
) -> tuple[list[int], list[int], np.ndarray]:
    """All tokens, the places of the model's own, and the logits before those `[own, vocab]`.

    Every turn continues from the cache of the one before: a chunk for the user's tokens, then one
    decode step per token of the reply.
    """
    tokens: list[int] = []
    places: list[int] = []
    seen: list[np.ndarray] = []
    past, cached = None, 0
    for turn in turns:
        tokens += turn
        for _ in range(reply):
            total = len(tokens)
            step = model.forward(
                np.array([tokens[cached:]]), np.ones((1, total), np.int64),
                np.arange(cached, total)[None], past,
            )  # fmt: skip
            past, cached = step.present, total
            seen.append(step.logits[0, -1])
            places.append(total)
            tokens.append(int(step.logits[0, -1].argmax()))
    return tokens, places, np.stack(seen)


def one_pass(model: CausalLM, tokens: Sequence[int]) -> np.ndarray:
    """Logits `[length, vocab]` of the whole transcript at once."""
    ids = np.array([tokens])
    return model.forward(ids, np.ones_like(ids), np.arange(ids.shape[1])[None]).logits[0]


@pytest.mark.parametrize("kind", ["spiky", "delimited", "staggered"])
def test_turns_equal_one_pass(kind: str, request: pytest.FixtureRequest) -> None:
    data: Planted = request.getfixturevalue(kind)
    model = CausalLM(data.inserted)
    tokens, places, logits = converse(model, SEED_TURNS, reply=6)
    once = one_pass(model, tokens)[np.array(places) - 1]
    np.testing.assert_allclose(logits, once, atol=1e-4)
    assert [tokens[place] for place in places] == once.argmax(-1).tolist()


def test_a_later_turn_has_no_position_0(staggered: Planted) -> None:
    """Its first token is no sink, and the sinks of earlier turns stay what they were."""
    model = staggered.load_inserted()
    name = "iq.sinks.0.index"
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.append(values[name])
    session = CausalLM(staggered.save_beside(model, "turns.onnx"), extra_outputs=[name])
    tokens = [token for turn in SEED_TURNS for token in turn]
    past, found, start = None, [], 0
    for turn in SEED_TURNS:
        end = start + len(turn)
        step = session.forward(
            np.array([turn]), np.ones((1, end), np.int64), np.arange(start, end)[None], past
        )
        found.append(step.extras[name][0])
        past, start = step.present, end
    ids = np.array([tokens])
    once = session.forward(ids, np.ones_like(ids), np.arange(len(tokens))[None]).extras[name][0]
    np.testing.assert_array_equal(np.concatenate(found), once)
    expected = [place == 0 or token == DELIMITER for place, token in enumerate(tokens)]
    np.testing.assert_array_equal(once > 0, expected)


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize(("graph", "reply"), [("insertion only", 10), ("bundle", 4)])
def test_smollm2_talks_the_same_in_one_pass(
    smollm2_bundle: Path, smollm2_inserted: Path, graph: str, reply: int
) -> None:
    """Three questions, each asked with the conversation so far in the cache.

    The bundle is half precision, of which a CPU writes about one token a second.
    """
    model = CausalLM(
        smollm2_inserted if graph == "insertion only" else smollm2_bundle / "model.onnx"
    )
    tokenizer = Tokenizer(smollm2_bundle)
    turns = [
        tokenizer.encode(f"{before}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
                         add_bos=False)
        for before, question in (("", "What is the capital of France?"),
                                 ("<|im_end|>\n", "And of Italy?"),
                                 ("<|im_end|>\n", "Which of the two is older?"))
    ]  # fmt: skip
    tokens, places, _ = converse(model, turns, reply)
    once = one_pass(model, tokens)
    assert [tokens[place] for place in places] == [int(once[p - 1].argmax()) for p in places]
