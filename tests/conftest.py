"""Fixtures for the whole suite. The real model is compiled once per session, by the command."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

from iq_export.engine.plugin import PluginBuild, build_plugin, find_headers, find_nvcc
from tests import planted
from tests.host import build
from tests.shared import made_once

# A shell that starts us in the background, or nohup, has us and all our children ignore these; what
# is tested answers to them.
for _signal, _default in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _default)

# Of several worker processes each has cores of its own: libraries start a thread per core that they
# may use, and these spin while they wait for one that another worker keeps from running.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1 and hasattr(os, "sched_setaffinity"):
    _number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, _cores[_number::_workers] or _cores)

MODEL = "smollm2-135m"
# Of its compile; what it does by default takes twice as long.
LIGHT = ("--samples", "8", "--insertion", "kv")


@pytest.fixture(scope="session")
def smollm2_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M compiled to W8A8 for one target, as a user does it. Tests must not write in it.

    The work folder with the traced graph stands beside it as `work`, and what `--json` printed as
    `compile.json`.
    """
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "iq_export.cli", "compile", MODEL, str(folder / "bundle"),
               "--recipe", "w8a8", "--target", "rtx-ampere", "--keep-work", *LIGHT,
               "--work", str(folder / "work"), "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"compile of {MODEL} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    (folder / "compile.json").write_text(done.stdout, encoding="utf-8")
    return folder / "bundle"


@pytest.fixture(scope="session")
def smollm2_inserted(smollm2_bundle: Path) -> Path:
    """The graph of `smollm2_bundle` with insertion alone, float32, written as a whole."""
    from iq_export.bundle.package import Bundle
    from iq_export.graph import io
    from iq_export.references import reference_graphs

    made = reference_graphs(Bundle.open(smollm2_bundle), smollm2_bundle.parent / "work")
    path = smollm2_bundle.parent / "inserted.onnx"
    io.save(made["insertion only"], path)
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: two layers of random weights (no spikes) and a trained tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from tools.cost import small_tokenizer

    folder = tmp_path_factory.mktemp("model") / "tiny"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=small_tokenizer(), bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    # Head size 64 and widths of 128: TensorRT's attention kernel and int4 blocks ask for them.
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> PluginBuild:
    """The plugin, compiled once for sm_86; skips where a tool is missing, or the headers and the
    network. Tests must not change it."""

    def make(folder: Path) -> None:
        if find_nvcc() is not None and find_headers() is None:
            root = Path(__file__).resolve().parents[1]
            command = [sys.executable, str(root / "tools" / "fetch_trt_headers.py")]
            subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": str(root)})
        build = build_plugin(folder, (86,), warnings_are_errors=True)
        if build.path is None and build.reason.startswith("no plugin:"):
            pytest.skip(build.reason)
        assert build.path is not None, build.reason
        (folder / "build.json").write_text(json.dumps(asdict(build), default=str))

    folder = made_once(tmp_path_factory, "plugin", make)
    made = json.loads((folder / "build.json").read_text())
    made |= {"path": Path(made["path"]), "architectures": tuple(made["architectures"])}
    return PluginBuild(**made)


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels' arithmetic on the CPU; needs CUDA's headers, but neither TensorRT nor a GPU."""
    folder = made_once(
        tmp_path_factory, "host", lambda folder: build(folder, "iq_host_test", {"IQ_TESTS": "ON"})
    )
    return ctypes.CDLL(str(folder / "libiq_host_test.so"))


@pytest.fixture(scope="session")
def spiky(tmp_path_factory: pytest.TempPathFactory) -> planted.Planted:
    """A tiny model whose position 0 spikes, observed and with sinks inserted. Do not change it."""
    return planted.observe(planted.Decoder(), tmp_path_factory.mktemp("spiky"))


@pytest.fixture(scope="session")
def delimited(tmp_path_factory: pytest.TempPathFactory) -> planted.Planted:
    """As `spiky`, and a delimiter token spikes downwards wherever it stands: two templates."""
    return planted.observe(planted.WITH_DELIMITER, tmp_path_factory.mktemp("delimited"))


@pytest.fixture(scope="session")
def staggered(tmp_path_factory: pytest.TempPathFactory) -> planted.Planted:
    """As `delimited`, but the delimiter is born a block later: two sites of detection."""
    return planted.observe(planted.TWO_BIRTHS, tmp_path_factory.mktemp("staggered"))


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> planted.Planted:
    """The same kind of model without spikes."""
    return planted.observe(planted.NO_SPIKES, tmp_path_factory.mktemp("calm"))


# Of two processes neither should be left alone with the last of them.
_LONGEST = ("smollm2", "tests/model", "tests/cli", "tests/runtime", "tests", "tests/tools",
            "tests/passes", "tests/plugins", "tests/engine")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests, with the reason, where there is no GPU. What takes longest comes first."""
    from iq_export.engine.trt import device_compute_capability

    places = {scope: place for place, scope in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(_scope(item.config, item.nodeid), len(places)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and device_compute_capability() is None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """What shares the compiled SmolLM2, and what stands in one folder, runs in one process: what
    their fixtures make once would be made in both. (Groups by marker need a pytest before 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return _scope(config, nodeid)

    return ByFolder(config, log)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


def _scope(config: pytest.Config, nodeid: str) -> str:
    path = nodeid.split("::", maxsplit=1)[0]
    return "smollm2" if _reads_smollm2(str(config.rootpath / path)) else str(Path(path).parent)


@cache
def _reads_smollm2(path: str) -> bool:
    return "smollm2_bundle" in Path(path).read_text(encoding="utf-8")
