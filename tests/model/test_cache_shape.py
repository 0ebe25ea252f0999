"""Models whose caches hold something else than keys and values are one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from iq_export.errors import ModelError
from iq_export.model.capture import cache_shape

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"]}),
        ("MiniMaxConfig", {"num_local_experts": 2, "layer_types": ["linear_attention"] * 3}),
        ("OpenAIGPTConfig", {}),
    ],
)
def test_caches_of_another_kind(config: str, changes: dict[str, Any]) -> None:
    import transformers

    made = getattr(transformers, config)(**SIZES, **changes)
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    with pytest.raises(ModelError, match="not supported") as error:
        cache_shape(model)
    assert str(error.value).count("\n") == 0
