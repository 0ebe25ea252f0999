"""A model that takes pictures, from the command line: compiled, measured, or refused in a line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from iq_export.bundle.package import Bundle
from iq_export.cli import main
from tests import seeing

pytest.importorskip("PIL")

STEPS = {
    "size": {"height": seeing.SIDE * seeing.PATCH, "width": seeing.SIDE * seeing.PATCH},
    "resample": 0, "image_mean": [0.5, 0.5, 0.0], "image_std": [0.25, 0.25, 1.0],
}  # fmt: skip


def photos(folder: Path, count: int, seed: int) -> Path:
    """PNG files of the size that the model takes."""
    from PIL import Image

    folder.mkdir()
    for number, pixels in enumerate(seeing.pictures(count, seed=seed)):
        pixels[:2] = np.clip(pixels[:2] / 4 + 0.5, 0, 1)
        values = np.round(255 * pixels).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(values).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.onnx` with an input of its own name, pictures, and `out`, compiled of them."""
    home = tmp_path_factory.mktemp("seeing")
    seeing.save(seeing.SPIKY, home, name="picture")
    (home / "steps.json").write_text(json.dumps(STEPS))
    photos(home / "some", 20, seed=1), photos(home / "others", 6, seed=2)
    assert main(["compile", *arguments(home, "out"), "--keep-work", "-q"]) == 0
    return home


def arguments(home: Path, out: str, *more: str) -> list[str]:
    return [
        str(home / "model.onnx"), str(home / out), "--calibration", str(home / "some"),
        "--preprocessor", str(home / "steps.json"), "--samples", "12", "--plugin", "off", *more,
    ]  # fmt: skip


def test_a_bundle_has_the_input_under_its_name_and_how_pictures_become_it(home: Path) -> None:
    bundle = Bundle.open(home / "out")
    (tensor,) = bundle.manifest.graph.inputs
    assert tensor.name == "picture" and tensor.shape[0] == "batch" and tensor.dtype == "float16"
    assert json.loads((home / "out" / "preprocessor_config.json").read_text()) == STEPS
    assert "tokenizer.json" not in bundle.manifest.files
    (life,) = bundle.manifest.graph.lifecycles
    assert life["replaced"] and not life["position_0_forced"] and life["common_tokens"] == []
    assert bundle.manifest.check is not None and bundle.manifest.check["cosine"] > 0.99
    assert set(bundle.plan()["convolutions"]) == {"patch"}


def test_eval_compares_the_outputs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(home / "out")
    assert main(["eval", out, "--data", str(home / "others"), "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    figures = {row["graph"]: row["figures"] for row in found["rows"]}
    assert found["windows"] == 6
    assert figures["insertion only"]["cosine_mean"] > 0.999
    assert figures["bundle (w8a8)"]["cosine_mean"] > 0.99
    assert figures["bundle (w8a8)"]["cosine_mean"] > figures["round-to-nearest w8a8"]["cosine_mean"]
    assert main(["eval", out]) == 2
    assert "with --data DIR" in capsys.readouterr().err


def test_verify_runs_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(home / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finite_tensors"] > 20


def test_decisions_are_taken_for_another_type(home: Path) -> None:
    taken = arguments(home, "again", "--decisions", str(home / "out"), "--dtype", "fp32")
    assert main(["compile", *taken, "-q"]) == 0
    graph = onnx.load(home / "again" / "model.onnx", load_external_data=False).graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert sum(node.op_type == "SinkDetect" for node in graph.node) == 1


@pytest.mark.parametrize(("command", "more", "message"), [
    ("run", ["--prompt", "x"], "generates no text, and run continues a prompt"),
    ("compile", ["--budget", "1.1"], "predicts no text"),
    ("compile", ["--recipe", "w8a8kv8"], "has none: use w8a8"),
    ("compile", ["--calibration", "builtin"], "takes no text, so builtin cannot calibrate it"),
    ("compile", ["--preprocessor", "nothing.json"], "nothing"),
])  # fmt: skip
def test_what_is_about_text_is_refused(
    home: Path,
    command: str,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(home / "out")] if command == "run" else arguments(home, "never")
    assert main([command, *given, *more]) > 0
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said and said.startswith("iq-export: error:")
    assert not (home / "never").exists()
