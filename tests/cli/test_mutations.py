"""Inputs with one thing changed, many of them, in this process: each ends in a sentence.

A mutation is a number, from which it follows; the fuzzer (`tests.cli.fuzz`) does more of the kind
with all commands, and slower.
"""

from __future__ import annotations

import json
import random
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from iq_export.cli import main
from iq_export.errors import IqError, ModelError
from tests import planted
from tests.cli import fuzz_inputs as inputs

SEED = 20
_VALUES: tuple[Any, ...] = (
    *inputs.JSON_VALUES, -3, 7, 1e-320, 2**20, "0", "nan", "sliding_attention", "silu", "linear",
    ["full_attention"], ["sliding_attention", "full_attention"], {"rope_type": "yarn"},
    {"rope_type": "longrope", "factor": None}, {"type": "dynamic", "factor": "x"},
    {"rope_type": "linear", "factor": 0}, {"__float__": "Infinity"}, {"__float__": 3},
)  # fmt: skip
# What configurations may have besides the keys that this one has.
_KEYS = (
    "rope_scaling", "rope_theta", "rope_parameters", "sliding_window", "layer_types", "auto_map",
    "attn_logit_softcapping", "final_logit_softcapping", "quantization_config", "torch_dtype",
    "dtype", "tie_word_embeddings", "attention_bias", "mlp_bias", "partial_rotary_factor",
    "num_experts", "is_encoder_decoder", "text_config", "architectures", "pretraining_tp",
    "max_position_embeddings", "use_cache", "output_attentions", "id2label", "num_labels",
    "torchscript", "return_dict", "problem_type", "bad_words_ids", "generation_config",
    "_attn_implementation", "attn_implementation", "transformers_version", "name_or_path",
    "use_sliding_window", "max_window_layers", "query_pre_attn_scalar", "chunk_size_feed_forward",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "hf"
    inputs.hugging_face(folder)
    return folder


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    inputs.tokenizer(folder / "tokenizer")
    planted.save(planted.Decoder(vocab=264), folder)
    return folder


def _edited(number: int, text: str) -> str:
    """One or two keys of a config.json changed, removed or added."""
    rng = random.Random(f"{SEED}/{number}")
    config = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2))):
        key = rng.choice((*config, *_KEYS))
        if rng.random() < 0.1:
            config.pop(key, None)
        else:
            config[key] = rng.choice(_VALUES)
    return json.dumps(config)


@pytest.fixture
def loads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile` stops when the model is loaded."""
    from iq_export.model import trace

    real = trace.load_model

    def load(source: Any, folder: Path) -> Any:
        real(source, folder)
        raise ModelError("loaded")

    monkeypatch.setattr(trace, "load_model", load)


@pytest.fixture
def traces_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile` stops when the model is traced, which takes a second or two."""
    import sys

    def stop(*_: Any) -> Any:
        raise ModelError("traced")

    import iq_export.compile  # noqa: F401

    monkeypatch.setattr(sys.modules["iq_export.compile"], "calibrate_and_rewrite", stop)


def _compile(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, str]:
    argv = ["compile", str(model), str(tmp_path / "out"), "--recipe", "fp16", "--target", "h100",
            "--insertion", "norm", "--samples", "1", "--length", "16", "-q", *more]  # fmt: skip
    code = main(argv)
    return code, capsys.readouterr().err


def _config_edits(
    numbers: range, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[tuple[int, str, str]]:
    copy = Path(shutil.copytree(model, tmp_path / "hf"))
    whole = (model / "config.json").read_text()
    for number in numbers:
        text = _edited(number, whole)
        (copy / "config.json").write_text(text)
        yield number, text, _what_is_wrong(lambda: _compile(copy, tmp_path, capsys))


def _what_is_wrong(run: Callable[[], tuple[int, str]]) -> str:
    """Nothing if the run ends in one sentence."""
    try:
        code, error = run()
    except SystemExit:
        return "usage"
    except Exception as fault:
        frames = traceback.extract_tb(fault.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "iq_" in f.filename]
        return f"{type(fault).__name__}: {str(fault)[:200]} at {ours[-1:]}"
    lines = error.strip().splitlines()
    if code not in {*range(8)} - {0, 1} or not lines or "error: " not in lines[-1]:
        return f"code {code}: {error[-300:]}"
    return "" if len(lines) == 1 else f"says more than a sentence: {error[:500]}"


@pytest.mark.usefixtures("loads_only")
def test_config_edits(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [each for each in _config_edits(range(20), model, tmp_path, capsys) if each[2]]
    assert not found, found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.heavy
@pytest.mark.usefixtures("traces_only")
def test_config_edits_up_to_the_trace(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [each for each in _config_edits(range(150), model, tmp_path, capsys) if each[2]]
    assert not found, found


def _flipped(number: int, content: bytes) -> bytes:
    """One to four bits changed, half of the time among the first kilobyte's."""
    rng = random.Random(f"{SEED}/{number}")
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        most = len(changed) if rng.random() < 0.5 else min(len(changed), 1024)
        changed[rng.randrange(most)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _readers() -> list[Callable[[Path], Any]]:
    """All that opens an ONNX file."""
    from iq_export.engine.onnx_header import read_header
    from iq_export.graph import io
    from iq_export.graph.vocabulary import position_rows, read_vocabulary

    return [read_header, io.load, read_vocabulary, position_rows]


@pytest.mark.filterwarnings("ignore:Ignoring unknown external data")
def test_bit_flips_of_an_onnx_file(graph: Path, tmp_path: Path) -> None:
    """What reads the file says so in one of our errors, or reads it."""
    whole = (graph / "model.onnx").read_bytes()
    path = tmp_path / "model.onnx"
    found = []
    for number in range(100):
        path.write_bytes(_flipped(number, whole))
        for read in _readers():
            try:
                read(path)
            except IqError as error:
                assert len(str(error)) < 2000
            except Exception as fault:
                found.append((number, read.__name__, type(fault).__name__, str(fault)[:200]))
    assert not found, found


def _graph_flips(
    numbers: range, graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[tuple[int, str]]:
    copy = Path(shutil.copytree(graph, tmp_path / "graph"))
    whole = (graph / "model.onnx").read_bytes()
    more = ("--tokenizer", str(graph / "tokenizer"))
    for number in numbers:
        (copy / "model.onnx").write_bytes(_flipped(number, whole))
        path = copy / "model.onnx"
        yield number, _what_is_wrong(lambda path=path: _compile(path, tmp_path, capsys, *more))


@pytest.mark.usefixtures("traces_only")
def test_a_compile_of_a_flipped_file(
    graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [each for each in _graph_flips(range(15, 30), graph, tmp_path, capsys) if each[1]]
    assert not found, found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph"]


@pytest.mark.heavy
@pytest.mark.usefixtures("traces_only")
def test_a_compile_of_many_flipped_files(
    graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [each for each in _graph_flips(range(400), graph, tmp_path, capsys) if each[1]]
    assert not found, found


_LONG = "n" * 300


@pytest.mark.parametrize(
    "argv",
    [
        ["compile", _LONG, "out"], ["compile", "MODEL", _LONG], ["compile", "MODEL", "a/" + _LONG],
        ["compile", "MODEL", "n" * 250], ["compile", "MODEL", "d/" * 3000 + "out"],
        ["compile", "MODEL", "out", "--work", _LONG],
        ["compile", "MODEL", "out", "--tokenizer", _LONG],
        ["compile", "MODEL", "out", "--calibration", _LONG], ["inspect", _LONG], ["verify", _LONG],
        ["eval", _LONG], ["run", _LONG, "--prompt", "x"], ["build", _LONG],
        ["package", "--triton", _LONG, "repo"], ["inspect", "ü" * 200],
        ["compile", "MODEL", "caf\udce9"], ["compile", "caf\udce9", "out"], ["eval", "\udcff"],
        ["compile", "MODEL", "out", "--work", "\udcff"], ["eval", "x", "--text", "\udcff"],
        ["package", "--triton", "x", "\udcff"], ["package", "--triton", "x", "r", "--name", _LONG],
        ["build", "x", "--timingCacheFile", _LONG], ["build", "x", "--timingCacheFile", "\udcff"],
    ],
)  # fmt: skip
@pytest.mark.usefixtures("loads_only")
def test_names(
    argv: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    argv = [str(model) if word == "MODEL" else word for word in argv]

    def run() -> tuple[int, str]:
        return main([*argv, "-q"]), capsys.readouterr().err

    assert _what_is_wrong(run) == ""
    assert list(tmp_path.iterdir()) == []
