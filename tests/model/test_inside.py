"""What a model's folder makes us read, ship or run: only what lies in it, and no code unasked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from iq_export.errors import ModelError
from iq_export.model.load import ModelSource, license_files, resolve
from iq_export.model.tokenizer import write_tokenizer
from iq_export.model.trace import _write_license, trace
from iq_export.run.generate import Tokenizer
from tests import planted

Getter = Callable[[str], Path]
READ = ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors",
        "tokenizer_config.json", "LICENSE", "README.md", "modeling.py")  # fmt: skip


@pytest.fixture
def llama(folders: Getter, tmp_path: Path) -> Path:
    folder = shutil.copytree(folders("llama"), tmp_path / "llama")
    for name in ("LICENSE", "README.md", "modeling.py"):
        (folder / name).write_text("text")
    return folder


def as_snapshot(folder: Path, cache: Path) -> Path:
    """The files of `folder` as the hub's client keeps them: links to blobs."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True), (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, repository / "blobs" / f"blob{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    return snapshot


@pytest.mark.parametrize("name", READ)
def test_a_link_out_of_the_folder_is_refused(llama: Path, tmp_path: Path, name: str) -> None:
    assert resolve(str(llama)).kind == "folder"
    if (llama / name).exists():
        (llama / name).rename(tmp_path / "elsewhere")
    else:
        (tmp_path / "elsewhere").write_text("{}")
    (llama / name).symlink_to("../elsewhere")
    with pytest.raises(ModelError, match=f"{name} is a link that leads out of its folder: put"):
        resolve(str(llama))
    if name.startswith(("tokenizer", "generation")):
        with pytest.raises(ModelError, match="leads out of its folder"):
            resolve("smollm2-135m", tokenizer=llama)


def test_a_folder_of_templates_elsewhere_is_refused(llama: Path, tmp_path: Path) -> None:
    templates = llama / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("{{ messages }}")
    assert resolve(str(llama)).kind == "folder"
    templates.rename(tmp_path / "elsewhere")
    templates.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="leads out of its folder"):
        resolve(str(llama))


def test_a_pipe_is_not_waited_for(llama: Path) -> None:
    (llama / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(llama / "generation_config.json")
    with pytest.raises(ModelError, match="not a regular file"):
        resolve(str(llama))


def test_other_links_are_nobodys_business(llama: Path, tmp_path: Path) -> None:
    (llama / "images").symlink_to(tmp_path)
    (llama / "photo.png").symlink_to("/etc/hostname")
    (llama / "old.json").symlink_to("nothing.json")
    (llama / "weights.safetensors").symlink_to("model.safetensors")
    (tmp_path / "named").symlink_to(llama)
    assert resolve(str(tmp_path / "named")).kind == "folder"


def test_a_snapshot_of_the_hub_ships_the_files_themselves(llama: Path, tmp_path: Path) -> None:
    snapshot, assets = as_snapshot(llama, tmp_path / "hub"), tmp_path / "assets"
    assets.mkdir()
    source = resolve(str(snapshot))
    write_tokenizer(source, assets)
    _write_license(license_files(snapshot), source, assets)
    assert (assets / "LICENSE").read_text() == "text"
    assert not any(file.is_symlink() for file in assets.iterdir())
    assert Tokenizer(assets).encode("w3 w5", add_bos=False) == [3, 5]


def test_a_licence_beside_a_file_is_not_taken_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir(), (tmp_path / "assets").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "model" / "LICENSE").symlink_to("../secret")
    source = ModelSource("gguf", "m", tmp_path / "model" / "m.gguf")
    with pytest.raises(ModelError, match="leads out of its folder"):
        _write_license(license_files(tmp_path / "model"), source, tmp_path / "assets")
    assert not list((tmp_path / "assets").iterdir())


def test_a_tokenizer_is_not_read_from_elsewhere(llama: Path, tmp_path: Path) -> None:
    (llama / "tokenizer.json").rename(tmp_path / "t.json")
    (llama / "tokenizer.json").symlink_to("../t.json")
    with pytest.raises(ModelError, match="leads out of its folder"):
        Tokenizer(llama)


@pytest.fixture
def older(llama: Path) -> Path:
    """Without `tokenizer.json`: only transformers can make a tokenizer of it."""
    (llama / "tokenizer.json").rename(llama / "vocab.json")
    return llama


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizers_code_is_not_run_unasked(
    older: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on stdin."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    names = {"AutoTokenizer": ["theirs.Theirs", None], "AutoConfig": "theirs.Config"}
    (older / "theirs.py").write_text("raise SystemExit('foreign code was run')")
    kind = {"model_type": "their-own"} if file == "config.json" else {}
    _edit(older / file, auto_map=names, **kind)
    for model, tokenizer in (("smollm2-135m", older), (str(older), None)):
        with pytest.raises(ModelError, match="--trust-remote-code"):
            resolve(model, tokenizer=tokenizer)
    assert resolve("smollm2-135m", tokenizer=older, trust_remote_code=True).trust_remote_code
    (older / "vocab.json").rename(older / "tokenizer.json")  # it needs no code
    assert resolve("smollm2-135m", tokenizer=older).tokenizer == older


def test_attention_code_of_the_hub_is_not_run_unasked(llama: Path) -> None:
    for value in ("org/kernel", {"": "org/kernel:attention"}):
        _edit(llama / "config.json", _attn_implementation=value)
        with pytest.raises(ModelError, match="code of the Hugging Face hub"):
            resolve(str(llama))
    assert resolve(str(llama), trust_remote_code=True).trust_remote_code
    _edit(llama / "config.json", _attn_implementation="eager")
    assert resolve(str(llama)).kind == "folder"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An ONNX file whose weights lie in `weights.bin` beside it."""
    (tmp_path / "onnx").mkdir()
    path = tmp_path / "onnx" / "model.onnx"
    onnx.save(
        planted.proto(planted.Decoder()), path, save_as_external_data=True, location="weights.bin"
    )
    return path


def _adopt(path: Path, tokenizer: Path, out: Path) -> Path:
    return trace(resolve(str(path), tokenizer=tokenizer), out).folder


def test_an_onnx_files_weights_are_not_taken_from_elsewhere(
    file: Path, folders: Getter, tmp_path: Path
) -> None:
    whole = _adopt(file, folders("llama"), tmp_path / "whole")
    data = file.parent / "weights.bin"
    data.rename(tmp_path / "weights.bin")
    with pytest.raises(ModelError, match=r"is incomplete: weights\.bin is not there"):
        _adopt(file, folders("llama"), tmp_path / "traced")
    data.symlink_to("../weights.bin")
    with pytest.raises(ModelError, match="leads out of its folder"):
        _adopt(file, folders("llama"), tmp_path / "traced")
    data.unlink()
    (tmp_path / "weights.bin").rename(file.parent / "real.bin")
    data.symlink_to("real.bin")
    assert _same(whole, _adopt(file, folders("llama"), tmp_path / "linked"))
    (file.parent / "real.bin").write_bytes((file.parent / "real.bin").read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"is incomplete: weights\.bin has \d+ bytes of at least"):
        _adopt(file, folders("llama"), tmp_path / "cut")


def test_an_onnx_file_in_the_hubs_cache(file: Path, folders: Getter, tmp_path: Path) -> None:
    whole = _adopt(file, folders("llama"), tmp_path / "whole")
    snapshot = as_snapshot(file.parent, tmp_path / "hub")
    assert _same(whole, _adopt(snapshot / "model.onnx", folders("llama"), tmp_path / "traced"))


def _same(one: Path, other: Path) -> bool:
    names = ("model.onnx", "model.onnx.data")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_a_traced_folder_with_a_link_is_made_again(
    file: Path, folders: Getter, tmp_path: Path
) -> None:
    out = _adopt(file, folders("llama"), tmp_path / "traced")
    notice = out / "assets" / "NOTICE"
    notice.rename(tmp_path / "NOTICE")
    notice.symlink_to(tmp_path / "NOTICE")
    assert not (_adopt(file, folders("llama"), out) / "assets" / "NOTICE").is_symlink()
