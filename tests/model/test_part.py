"""The text part of checkpoints of several parts: what compiles, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iq_export.errors import IqError, ModelError, UsageError
from iq_export.graph import io
from iq_export.model.load import resolve
from iq_export.model.part import text_part
from iq_export.model.support import check_support
from iq_export.model.trace import trace
from iq_export.recipe import load_recipe
from iq_export.run.ort import CausalLM
from tests.model.conftest import tiny_tokenizer
from tests.model.test_trace import in_chunks, tokens
from tests.model.whole import whole_graph

TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 16, "head_dim": 8,
}  # fmt: skip
# The first two lie beyond the vocabulary: some models look for them among the ids.
TOKENS = {"image_token_index": 200, "image_token_id": 200, "video_token_id": 94}
# Each writes its text part, its vision part and its weights' names in another way.
CHECKPOINTS = {
    "gemma3": {
        "text_config": TEXT
        | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model"},
    },
    "mllama": {
        "text_config": TEXT | {"cross_attention_layers": [1]},
        "vision_config": VISION
        | {"num_global_layers": 1, "vision_output_dim": 64, "intermediate_layers_indices": [1],
           "supported_aspect_ratios": [[1, 1]], "attention_heads": 4},
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "sliding_window": None},
        "vision_config": VISION | {"model_type": "pixtral"},
    },
    "qwen2_5_vl": {
        "text_config": TEXT
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1],
                               "rope_theta": 1e4}},
        "vision_config": {
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
            "out_hidden_size": 32, "fullatt_block_indexes": [1],
        },
    },
}  # fmt: skip


def make_checkpoint(kind: str, folder: Path) -> Any:
    """Save a random checkpoint of several parts, with a tokenizer; returns the model."""
    import torch
    import transformers as hf
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(7)
    config = CONFIG_MAPPING[kind](**CHECKPOINTS[kind], **TOKENS)
    model = hf.AutoModelForMultimodalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return model


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_text_part_says_what_the_whole_says_of_text(kind: str, tmp_path: Path) -> None:
    """In one pass, and in chunks left-padded beside a longer row."""
    import torch

    whole = make_checkpoint(kind, tmp_path / "m")
    traced = trace(resolve(str(tmp_path / "m"), part="text"), tmp_path / "traced")
    graph = CausalLM(whole_graph(traced))
    rows = [tokens(20, 1), tokens(11, 2)]
    with torch.no_grad():
        expected = [whole(input_ids=torch.tensor([row])).logits[0].numpy() for row in rows]
    bound = 1e-5 * (expected[0].max() - expected[0].min())
    assert np.abs(in_chunks(graph, rows[:1], ())[0] - expected[0]).max() < bound
    padded = in_chunks(graph, rows, (1, 7, 1))
    for index, want in enumerate(expected):
        assert np.abs(padded[index, -len(want) :] - want).max() < bound
    assert "NonZero" not in {node.op_type for node in io.load(traced.model).graph}
    (left,) = (note for note in traced.notes if note.startswith("left out"))
    assert "vis" in left and "parameters)" in left and "lm_head" not in left
    if kind == "mllama":
        assert "1 layers of the decoder" in left and traced.layers_traced == 3
    else:
        assert traced.layers_traced < TEXT["num_hidden_layers"]


def test_several_parts_ask_for_the_option_and_one_part_refuses_it(tmp_path: Path) -> None:
    recipe = load_recipe("w8a8")
    raw = {"model_type": "gemma3", **CHECKPOINTS["gemma3"]}
    with pytest.raises(ModelError, match=r"\(text_config, vision_config\).* with --part text\.$"):
        check_support(raw, "m", recipe)
    found = check_support(raw, "m", recipe, part="text")
    assert (found.layers, found.head_dim, found.shape.vocabulary) == (4, 8, 96)
    assert found.completed["sliding_window"] == 5
    alone = {"model_type": "llama", **TEXT}
    with pytest.raises(UsageError, match=r"as a whole: leave out --part text\.$"):
        check_support(alone, "m", recipe, part="text")
    with pytest.raises(UsageError, match="leave out --part text"):
        resolve("smollm2-135m", part="text")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ({"hidden_size": 0}, "'hidden_size' is 0"),
        ({"num_hidden_layers": 10**9}, "memory"),
        ({"hidden_act": "foo"}, "'hidden_act' is 'foo'"),
        ({"num_key_value_heads": 3}, "not divisible by 3"),
    ],
)
def test_the_text_part_is_checked_as_a_model_is(text: dict[str, Any], says: str) -> None:
    raw = {"model_type": "llava", "text_config": TEXT | {"model_type": "llama"} | text}
    with pytest.raises(IqError, match=says):
        check_support(raw, "m", load_recipe("w8a8"), part="text")


def test_a_model_that_writes_no_text_has_no_text_part() -> None:
    with pytest.raises(ModelError, match="not a causal LM"):
        check_support({"model_type": "clip"}, "m", load_recipe("w8a8"), part="text")


def test_several_parts_that_read_text_are_one_sentence() -> None:
    class Several:
        model_type = "duet"

        def get_text_config(self) -> None:
            raise ValueError("Multiple valid text configs were found")

    with pytest.raises(ModelError, match="'duet' has several parts that read text"):
        text_part(Several())
