"""What MODEL can be, and one clear sentence for everything that it cannot."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iq_export.errors import GraphError, ModelError, UsageError
from iq_export.graph.stored import Merged
from iq_export.model import hub, load
from iq_export.model.load import ModelSource, fingerprint, materialize, resolve
from tests.model import families
from tests.model.whole import load_model

Getter = Callable[[str], Path]


def one_sentence(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


@pytest.fixture
def llama(folders: Getter, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return shutil.copytree(folders("llama"), tmp_path / "llama")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_kinds(folders: Getter, tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.onnx").write_bytes(b"")
    assert resolve("smollm2-135m").kind == "gguf"
    assert "Apache-2.0" in resolve("smollm2-135m").license_note
    assert resolve(str(folders("llama"))).kind == "folder"
    assert resolve(str(tmp_path / "m.gguf")).kind == "gguf"
    onnx = resolve(str(tmp_path / "m.onnx"), tokenizer=folders("llama"))
    assert (onnx.kind, onnx.name, onnx.tokenizer) == ("onnx", "m", folders("llama"))
    hub = resolve("HuggingFaceTB/SmolLM2-360M", revision="main")
    assert (hub.kind, hub.path, hub.revision) == ("hub", None, "main")


@pytest.mark.parametrize("name", ("smollm2", "smollm-135m", "SmolLM2-135M"))
def test_the_embedded_model_is_suggested(name: str) -> None:
    with pytest.raises(ModelError, match="Did you mean 'smollm2-135m'") as error:
        resolve(name)
    assert "org/name" in one_sentence(error)


def test_a_misspelt_path_gets_a_suggestion(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"Did you mean '.*llama'"):
        resolve(str(llama.parent / "lama"))
    with pytest.raises(ModelError, match=r"There is no model 'nothing-like-it\.gguf'"):
        resolve("nothing-like-it.gguf")


def test_files_of_other_kinds(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"neither \.gguf nor \.onnx"):
        resolve(str(llama / "model.safetensors"))


def test_an_onnx_file_needs_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match="--tokenizer DIR"):
        resolve(str(tmp_path / "m.onnx"))
    with pytest.raises(UsageError, match="not a folder"):
        resolve(str(tmp_path / "m.onnx"), tokenizer=tmp_path / "absent")
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        resolve(str(tmp_path / "m.onnx"), tokenizer=tmp_path)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"no config\.json\. Give the file: .*weights\.gguf"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"), (("{", "is damaged: Exp"), ("[]", "no JSON object"), ("{}", "model_type"))
)
def test_damaged_configurations(text: str, message: str, llama: Path) -> None:
    (llama / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        resolve(str(llama))


def test_foreign_code_is_not_run(llama: Path) -> None:
    edit_config(llama, model_type="their-own", auto_map={"AutoModel": "modeling.Theirs"})
    (llama / "modeling.py").write_text("raise SystemExit('foreign code was run')")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        resolve(str(llama))
    assert resolve(str(llama), trust_remote_code=True).trust_remote_code


def test_quantized_checkpoints_are_refused(llama: Path) -> None:
    edit_config(llama, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"already quantized \(gptq\)"):
        resolve(str(llama))


@pytest.mark.parametrize(("family", "message"), (("t5", "encoder-decoder"), ("mamba", "mamba")))
def test_architectures_that_are_no_decoders(family: str, message: str, folders: Getter) -> None:
    with pytest.raises(ModelError, match=message) as error:
        load_model(resolve(str(folders(family))))
    one_sentence(error)


def test_an_architecture_that_transformers_does_not_know(llama: Path) -> None:
    edit_config(llama, model_type="llama9000")
    with pytest.raises(ModelError, match="llama9000") as error:
        load_model(resolve(str(llama)))
    one_sentence(error)


def test_a_model_that_is_no_language_model(llama: Path) -> None:
    (llama / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match=r"'vit', which is not a causal LM"):
        load_model(resolve(str(llama)))


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"3", b'{"a": 1}', b'{"a": {"data_offsets": [0, null]}}', b"[" * 100_000,
        b'{"a": {"data_offsets": [0, "8"]}}', b'{"a": {"data_offsets": {}}}', b"\xff",
    ],
)  # fmt: skip
def test_headers_of_safetensors_that_say_nothing(header: bytes, llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged") as error:
        resolve(str(llama))
    one_sentence(error)


def test_what_is_neither_file_nor_folder(llama: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    for name in (str(tmp_path / "m.gguf"), os.devnull):
        with pytest.raises(ModelError, match="is neither a file nor a folder"):
            resolve(name)
    (llama / "model.safetensors").unlink()
    os.mkfifo(llama / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors is not a regular file"):
        resolve(str(llama))
    with pytest.raises(ModelError, match="There is no model '~nobody-here/x'"):
        resolve("~nobody-here/x")


@pytest.mark.parametrize("keep", (4, 100, 20_000))
def test_truncated_safetensors(keep: int, llama: Path) -> None:
    path = llama / "model.safetensors"
    assert path.stat().st_size > keep
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged") as error:
        resolve(str(llama))
    one_sentence(error)


def test_missing_weights_are_not_made_up(llama: Path) -> None:
    """transformers would fill them with random numbers and only warn."""
    from safetensors.torch import load_file, save_file

    path = llama / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"first is 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_model(resolve(str(llama)))


def test_pickles_are_not_read(llama: Path) -> None:
    import torch

    (llama / "model.safetensors").unlink()
    torch.save({}, llama / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model\.safetensors") as error:
        load_model(resolve(str(llama)))
    one_sentence(error)


@pytest.mark.parametrize(
    ("content", "message"),
    ((b"", "no GGUF header"), (b"GGML" + bytes(60), "no GGUF header"),
     (b"GGUF" + struct.pack("<I", 99) + bytes(60), "version 99")),
)  # fmt: skip
def test_files_that_are_no_gguf(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        resolve(str(path))


def tiny_gguf(path: Path) -> Path:
    """A Llama of two small tensors with a complete header."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"w{i}" for i in range(96)])
    writer.add_token_types([1] * 96)
    writer.add_token_merges([])
    writer.add_tensor("token_embd.weight", np.zeros((96, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("part", "says"),
    [(0.02, "its GGUF header is"), (0.3, "'token_embd.weight'"), (0.9999, "'output_norm.weight'")],
)
def test_truncated_gguf(part: float, says: str, tmp_path: Path) -> None:
    """A dry run, which resolves the model and no more, sees it too."""
    path = tiny_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(ModelError, match=f"m cannot be loaded .*{says}") as error:
        resolve(str(path))
    one_sentence(error)


def test_an_incomplete_gguf(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf")
    with pytest.raises(ModelError) as error:
        load_model(resolve(str(path)))
    one_sentence(error)


def test_a_gguf_that_cannot_be_compiled_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf")
    data = path.read_bytes()
    for found, other, message in (
        (b"gpt-2", b"gpt-X", "cuts text the way 'gpt-X'"),
        (b"llama.block_count", b"llama.block_cOunt", r"llama\.block_cOunt = 1"),
    ):
        path.write_bytes(data.replace(found, other))
        with pytest.raises(ModelError, match=message) as error:
            resolve(str(path))
        one_sentence(error)


def test_damaged_gguf_headers_give_sentences(tmp_path: Path) -> None:
    import random

    from iq_export.model.load import readable
    from iq_export.model.tokenizer import write_tokenizer

    whole = bytearray(tiny_gguf(tmp_path / "m.gguf").read_bytes())
    choose = random.Random(1)
    (tmp_path / "assets").mkdir()
    failed = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(choose.randint(1, 4)):
            data[choose.randrange(8, 1500)] = choose.choice(
                (0, 1, 8, 9, 255, choose.randrange(256))
            )
        (tmp_path / "m.gguf").write_bytes(data)
        try:
            source = resolve(str(tmp_path / "m.gguf"))
            with readable(source):
                write_tokenizer(source, tmp_path / "assets")
        except ModelError:
            failed += 1
    assert failed > 100


def hub_failure(name: str) -> Exception:
    from types import SimpleNamespace

    from huggingface_hub import errors

    response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
    kinds: dict[str, Callable[[], Exception]] = {
        "gated": lambda: errors.GatedRepoError("no", response=response),
        "unknown": lambda: errors.RepositoryNotFoundError("no", response=response),
        "revision": lambda: errors.RevisionNotFoundError("no", response=response),
        "offline": lambda: errors.LocalEntryNotFoundError("no"),
        "server": lambda: errors.HfHubHTTPError("no", response=response),
        "network": lambda: hub.transport_errors()[-1]("no"),
    }
    return kinds[name]()


@pytest.mark.parametrize(
    ("failure", "message"),
    (
        ("gated", "accept its licence"),
        ("unknown", "no model 'org/name' on the Hugging Face hub"),
        ("revision", "no revision 'v9'"),
        ("offline", "hub cannot be reached"),
        ("server", "hub cannot be reached"),
        ("network", "hub cannot be reached"),
    ),
)
def test_hub_failures(failure: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise hub_failure(failure)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match=message) as error:
        materialize(resolve("org/name", revision="v9"))
    one_sentence(error)


def test_a_hub_model_becomes_a_folder(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / "0123abc"
    (llama / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    shutil.copytree(llama, snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(snapshot))
    source = materialize(resolve("org/name"))
    assert (source.name, source.path, source.revision) == ("org/name", snapshot, "0123abc")
    assert source.license_note == "apache-2.0"
    assert load_model(source).model.config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("iq_export.model.gguf", "None.size", AttributeError),
        ("iq_export.model.gguf", "{}['key']", KeyError),
        ("iq_export.model.gguf", "undefined", NameError),
        ("iq_export.model.gguf", "int('x')", ModelError),
        ("iq_export.model.gguf", "open('/nowhere/x')", ModelError),
        ("transformers.modeling", "None.size", ModelError),
        ("torch.nn", "undefined", ModelError),
        ("iq_exporter", "None.size", ModelError),
    ],
)
def test_a_fault_of_ours_is_no_bad_model(module: str, line: str, expected: type[Exception]) -> None:
    """What a line of this package raises by mistake keeps its traceback."""
    source = load.ModelSource("folder", "m", Path("m"))
    with pytest.raises(expected), load.readable(source):
        eval(line, {"__name__": module})


def test_the_fingerprint_follows_the_contents(llama: Path) -> None:
    source = resolve(str(llama))
    first = fingerprint(source)
    assert fingerprint(resolve(str(llama))) == first
    edit_config(llama, rms_norm_eps=1e-3)
    assert fingerprint(source) != first


def test_models_load_in_full_precision(folders: Getter, tmp_path: Path) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folders("llama"))
    model.to(torch.float16).save_pretrained(tmp_path / "half")
    source = ModelSource("folder", "half", tmp_path / "half", tokenizer=folders("llama"))
    loaded = load_model(source)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert not loaded.model.training


def same_weights(loaded: load.LoadedModel, wanted: Any) -> bool:
    import torch

    found = loaded.model.state_dict()
    return all(torch.equal(found[key], value.float()) for key, value in wanted.state_dict().items())


def test_sharded_half_weights_stay_in_their_files(folders: Getter, tmp_path: Path) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folders("qwen2")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half", max_shard_size="20KB")
    source = ModelSource("folder", "half", tmp_path / "half", tokenizer=folders("qwen2"))
    (tmp_path / "own").mkdir()
    lazy = load.load_model(source, tmp_path / "own")
    assert not list((tmp_path / "own").iterdir()) and lazy.notes == ()
    names = [name for name, tensor in lazy.model.named_parameters() if tensor.dim() > 1]
    places = [lazy.weights.place(lazy.model.get_parameter(name)) for name in names]
    assert len({place.file for place in places if place}) > 2 and None not in places
    assert same_weights(load_model(source), model)


def test_weights_that_change_as_they_are_read_are_copied(folders: Getter, tmp_path: Path) -> None:
    """Once; the model is as transformers loads it."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folders("llama"))
    model = model.to(torch.float64)
    model.save_pretrained(tmp_path / "float64")
    loaded = load_model(ModelSource("folder", "float64", tmp_path / "float64"))
    assert loaded.notes == (
        "float64 was held in memory as a whole: its weights are changed as they are read",
    )
    assert not loaded.weights.empty and same_weights(loaded, model)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_experts_stay_in_the_files(kind: str, tmp_path: Path) -> None:
    """Each is a tensor there, and transformers makes one of all: of it, there are their places."""
    model = families.model(kind)
    model.save_pretrained(tmp_path / kind)
    source = ModelSource("folder", kind, tmp_path / kind)
    assert same_weights(load_model(source), model)
    (tmp_path / "own").mkdir()
    loaded = load.load_model(source, tmp_path / "own")
    assert loaded.notes == () and not list((tmp_path / "own").iterdir())
    experts = loaded.model.model.layers[0].mlp.experts
    place = loaded.weights.place(experts.gate_up_proj)
    assert isinstance(place, Merged) and place.shape == tuple(experts.gate_up_proj.shape)
    exact = model.model.layers[0].mlp.experts.gate_up_proj.numpy(force=True)
    half = exact.shape[1] // 2
    np.testing.assert_array_equal(place.part(1, half, 2 * half).read(), exact[1, half:])
    np.testing.assert_array_equal(
        place.part(2, half + 1, half + 3).read(), exact[2, half + 1 : half + 3]
    )
    with pytest.raises(GraphError, match="several"):
        place.part(0, 1, half + 1)


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_beside_a_tied_embedding(equal: bool, folders: Getter, tmp_path: Path) -> None:
    """It is tied if it has the same values, and else kept, as transformers has it."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders("llama"), tmp_path / "llama")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] * (1 if equal else 2)
    tensors["lm_head.weight"] = head.clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = load_model(resolve(str(folder))).model
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is equal
    assert model.lm_head.weight.equal(head)


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModelError, match=r"pip install 'iq-export\[compile\]'"):
        load._need_transformers()
