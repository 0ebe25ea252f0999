"""The number of positions a config states, and whether more of them would be wrong or only odd."""

from __future__ import annotations

from typing import Any

import pytest

from iq_export.model.limits import position_limit

LONG = {"short_factor": [1.0], "long_factor": [2.0]}


@pytest.mark.parametrize(
    ("config", "positions", "hard"),
    [
        ({"model_type": "llama", "max_position_embeddings": 2048}, 2048, False),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024, True),
        ({"model_type": "gpt_bigcode", "n_positions": 256, "n_embd": 64}, 256, True),
        ({"model_type": "biogpt", "max_position_embeddings": 1024}, 1024, True),
        (
            {
                "model_type": "phi3",
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope", **LONG},
            },
            4096,
            True,
        ),
        (
            {
                "model_type": "phi3",
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "su", **LONG},
            },
            4096,
            True,
        ),
        (
            {
                "model_type": "minicpm3",
                "max_position_embeddings": 65536,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "original_max_position_embeddings": 32768,
                    **LONG,
                },
            },
            32768,
            True,
        ),
        (
            {
                "model_type": "llama",
                "max_position_embeddings": 4096,
                "rope_scaling": {"type": "dynamic", "factor": 4.0},
            },
            4096,
            True,
        ),
        (
            {
                "model_type": "llama",
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
            False,
        ),
        (
            {
                "model_type": "qwen2",
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
            False,
        ),
        (
            {
                "model_type": "gemma3_text",
                "max_position_embeddings": 32768,
                "rope_parameters": {
                    "full_attention": {"rope_type": "dynamic", "factor": 2.0},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            32768,
            True,
        ),
    ],
)
def test_position_limit(config: dict[str, Any], positions: int, hard: bool) -> None:
    limit = position_limit(config)
    assert limit is not None
    assert (limit.positions, limit.hard) == (positions, hard)
    assert limit.reason


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "bloom"}, {"max_position_embeddings": None}, {"n_positions": -1}]
)
def test_a_config_that_states_no_length_has_no_limit(config: dict[str, Any]) -> None:
    assert position_limit(config) is None
