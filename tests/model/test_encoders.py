"""Encoders of transformers: which task a checkpoint is for; what is traced equals the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iq_export.errors import UsageError
from iq_export.graph import io
from iq_export.graph.interface import Interface, Role
from iq_export.graph.sites import find_sites
from iq_export.model.encoders import TASKS, TOLERANCE, task_of
from iq_export.model.load import resolve
from iq_export.model.trace import trace
from tests.model.conftest import tiny_tokenizer

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
SEES = {**SIZES, "image_size": 16, "patch_size": 8}
READS = {**SIZES, "vocab_size": 99}


def random_model(name: str, config: Any) -> Any:
    """A transformers model whose weights, vectors too, are random."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    return model


def vit() -> Any:
    from transformers import ViTConfig

    return random_model("ViTForImageClassification", ViTConfig(**SEES, num_labels=5))


def dinov2() -> Any:
    """Layer scales and register tokens."""
    from transformers import Dinov2WithRegistersConfig

    sizes = {key: value for key, value in SEES.items() if key != "intermediate_size"}
    config = Dinov2WithRegistersConfig(**sizes, mlp_ratio=2, num_register_tokens=3)
    return random_model("Dinov2WithRegistersModel", config)


def clip() -> Any:
    from transformers import CLIPConfig

    text = {**READS, "max_position_embeddings": 30, "eos_token_id": 2}
    return random_model("CLIPModel", CLIPConfig(text_config=text, vision_config=SEES,
                                                projection_dim=16))  # fmt: skip


def modernbert() -> Any:
    from transformers import ModernBertConfig

    config = ModernBertConfig(**READS, pad_token_id=0, local_attention=8,
                              global_attn_every_n_layers=2)  # fmt: skip
    return random_model("ModernBertForMaskedLM", config)


def bert() -> Any:
    """Its stream itself passes norms."""
    from transformers import BertConfig

    return random_model("BertModel", BertConfig(**READS, pad_token_id=0))


def whisper() -> Any:
    from transformers import WhisperConfig

    config = WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=99,
        max_source_positions=20, max_target_positions=20, num_mel_bins=8, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return random_model("WhisperForConditionalGeneration", config)


@pytest.mark.parametrize(("architecture", "task"), [
    ("LlamaForCausalLM", "text-generation"),
    ("GPT2LMHeadModel", "text-generation"),
    ("GPT2Model", "text-generation"),
    ("SomethingElse", "text-generation"),
    ("BertForMaskedLM", "fill-mask"),
    ("BertModel", "feature-extraction"),
    ("ViTForImageClassification", "image-classification"),
    ("Dinov2Model", "image-feature-extraction"),
    ("WhisperForConditionalGeneration", "automatic-speech-recognition"),
])  # fmt: skip
def test_a_checkpoint_is_for_what_its_architecture_says(architecture: str, task: str) -> None:
    assert task_of({"architectures": [architecture]}, None) == task
    assert task_of({"architectures": [architecture]}, "fill-mask") == "fill-mask"


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown task 'sing': use text-generation, feature"):
        task_of({}, "sing")


def traced(make: Callable[[], Any], folder: Path, task: str | None = None) -> Any:
    model = folder / "model"
    make().save_pretrained(model)
    tiny_tokenizer(model)
    return trace(resolve(str(model), task=task), folder / "traced")


def test_a_picture_classifier_is_traced(tmp_path: Path) -> None:
    found = traced(vit, tmp_path)
    assert found.parity <= TOLERANCE and found.noise_ratio is None
    graph = io.load(found.model)
    interface, sites = Interface.of_graph(graph.graph), find_sites(graph)
    assert interface.primary is not None and interface.primary.role is Role.PIXELS
    assert interface.primary.shape == ("batch", 3, 16, 16)
    assert interface.result.role is Role.LOGITS and not interface.is_causal
    assert len(sites.blocks) == 2 and len(sites.linears) == 12 and len(sites.convolutions) == 1
    assert not (found.assets / "tokenizer.json").exists()


@pytest.mark.heavy
@pytest.mark.parametrize(("make", "task", "blocks", "results"), [
    (dinov2, None, 2, ("last_hidden_state", "pooler_output")),
    (clip, "image-feature-extraction", 2, ("image_embeds",)),
    (clip, "feature-extraction", 2, ("text_embeds",)),
    (modernbert, None, 2, ("logits",)),
    (bert, None, 2, ("last_hidden_state", "pooler_output")),
    (whisper, None, 2, ("last_hidden_state",)),
])  # fmt: skip
def test_encoders_are_traced(
    make: Callable[[], Any],
    task: str | None,
    blocks: int,
    results: tuple[str, ...],
    tmp_path: Path,
) -> None:
    found = traced(make, tmp_path, task)
    assert found.parity <= TOLERANCE
    graph = io.load(found.model)
    assert tuple(str(value.name) for value in graph.graph.outputs) == results
    assert len(find_sites(graph).blocks) == blocks
    primary = Interface.of_graph(graph.graph).primary
    assert primary is not None
    if task is not None:
        assert primary.role is TASKS[task].takes
