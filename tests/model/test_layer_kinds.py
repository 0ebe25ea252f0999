"""Latents, chunks, layers of several sizes: the flat module says what the model says."""

from __future__ import annotations

import pytest
import torch

from iq_export.model.capture import CHUNKED, MaskPlan, build_masks, cache_shape, flat_module
from tests.model import families

KEYS, VALUES = (4, 24), (4, 16)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # Narrower values are filled up to the size of keys.
        ("youtu", (KEYS, KEYS) * 3),
        ("minicpm3", (KEYS, KEYS) * 3),
        ("deepseek_v2-dense", (KEYS, KEYS) * 3),
        ("llama4-dense", ((2, 16), (2, 16)) * 3),
        ("gemma4", ((2, 16),) * 2 + ((2, 32),) * 4),
    ],
)
def test_two_steps_of_a_padded_row(name: str, sizes: tuple[tuple[int, int], ...]) -> None:
    model = families.model(name).requires_grad_(False)
    ids = torch.randint(4, families.VOCAB, (1, 2 * families.WINDOW + 5))
    expected = model(input_ids=ids, use_cache=False).logits
    shape = cache_shape(model)
    assert (shape.sizes, shape.layers) == (sizes, (0, 1, 2))
    module, pads = flat_module(model, shape), 3
    padded = torch.cat([torch.zeros(1, pads, dtype=torch.long), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= pads).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    past = tuple(torch.zeros(1, heads, 0, features) for heads, features in sizes)
    found = []
    for begin, end in ((0, 12), (12, padded.shape[1])):
        logits, *rest = module(
            padded[:, begin:end], mask[:, :end], positions[:, begin:end], tuple(past)
        )
        past = tuple(rest)
        found.append(logits)
    assert [tensor.shape[1::2] for tensor in past] == [torch.Size(size) for size in sizes]
    torch.testing.assert_close(torch.cat(found, 1)[:, pads:], expected, rtol=1e-5, atol=2e-5)


def test_chunks_begin_with_the_first_token_of_a_row() -> None:
    attention = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    masks = build_masks(attention, 2, 5, MaskPlan((CHUNKED,), None, chunk=3))
    seen = [[[column for column in range(7) if row[column]] for row in rows[0]]
            for rows in masks[CHUNKED]]  # fmt: skip
    assert seen[0] == [[0, 1, 2], [3], [3, 4], [3, 4, 5], [6]]
    assert seen[1] == [[2], [2, 3], [2, 3, 4], [5], [5, 6]]
