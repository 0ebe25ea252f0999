"""Models that write out their attention get masks that are added to scores."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from iq_export.model.capture import cache_shape, flat_module

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "config",
    [
        hf.GPTNeoXJapaneseConfig(**SIZES, intermediate_multiple_size=2),  # adds its mask
        hf.BioGptConfig(**SIZES, intermediate_size=48),  # hands its mask over, and does not say so
    ],
    ids=lambda config: config.model_type,
)
def test_the_module_says_what_the_model_says(config: hf.PreTrainedConfig) -> None:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    ids = torch.randint(0, 40, (1, 9))
    expected = model(input_ids=ids, use_cache=False).logits
    shape = cache_shape(model)
    module = flat_module(model, shape)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 9])
    positions = torch.tensor([[0, 0, 0, *range(9)]])
    past = tuple(torch.zeros(1, heads, 0, features) for heads, features in shape.sizes)
    logits, *_ = module(padded, mask, positions, past)
    torch.testing.assert_close(logits[:, 3:], expected, rtol=1e-5, atol=1e-5)
