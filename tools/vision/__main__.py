"""Does a vision transformer that spikes survive int8? Baseline, round to nearest, and iq-export.

    python -m tools.vision [--crops 1000] [--birth 3 --death 9 --ratio 1000 --patches 3 --seed 0]

Measured on crops of photos that nothing was calibrated on, against the float32 graph of the same
model: features of the class token and the map of saliency. Writes `docs/measured/vision.json`;
features are kept in the work folder, and the same command goes on from them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from iq_export.bundle.manifest import write_atomically
from iq_export.checksum import sha256_file
from iq_export.errors import IqError
from iq_export.evaluate.agreement import compare_features, compare_maps
from tools.vision import data, plain
from tools.vision.plant import FEATURES, Planting, each, planted_vit, with_features

_ROOT = Path(__file__).resolve().parents[2]
_MAP = "output_importance"
_FOR_PLANTING = 11
# What `--preprocessor` gives: the steps of `data.STEPS`.
_PREPROCESSOR = {
    "size": {"shortest_edge": data.SIDE}, "resample": data.STEPS.resample,
    "crop_size": {"height": data.SIDE, "width": data.SIDE},
    "image_mean": data.STEPS.mean, "image_std": data.STEPS.deviation,
}  # fmt: skip


def main() -> int:
    """Measure all graphs; what cannot be made is a row with an `error`."""
    options = _parser().parse_args()
    try:
        record = _measure(options)
    except (IqError, ValueError) as error:
        print(f"vision: error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, IqError) else 2
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(options.output, text)
    print(text, end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.vision", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, default = parser.add_argument, Planting()
    add("--work", type=Path, default=Path("build/vision"), help="graphs and features; resumes")
    add("--output", type=Path, default=_ROOT / "docs" / "measured" / "vision.json")
    add("--crops", type=int, default=1000, help="of the photos, to measure on")
    add("--birth", type=int, default=default.birth, help="block, from 0")
    add("--death", type=int, default=default.death)
    add("--ratio", type=float, default=default.ratio, help="spike over the median residual")
    add("--patches", type=float, default=default.patches, help="that spike, of a picture")
    add("--seed", type=int, default=default.seed, help="of the content that spikes")
    add("--dtype", default="fp16", help="of the file that iq-export compiles")
    return parser


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    planting = Planting(
        options.birth, options.death, options.ratio, options.patches, options.seed
    )  # fmt: skip
    files = data.calibration_pictures()
    calibration = np.concatenate([data.whole(files), data.crops(files, len(files), seed=1)])
    pictures = data.crops(data.photos(), options.crops, seed=0)
    with_features(data.vit(), work / "real.onnx")
    planted = planted_vit(
        data.vit(), work / "planted.onnx", planting, calibration[: len(files)][:_FOR_PLANTING]
    )
    rows = []
    for model in ("real", "planted"):
        graph = work / f"{model}.onnx"
        reference = _outputs(graph, pictures)
        for name in ("round to nearest", "iq-export"):
            row: dict[str, Any] = {"model": model, "method": name, "error": None}
            out = work / f"{model}-{name.replace(' ', '-')}.onnx"
            try:
                if name == "iq-export":
                    _compile(graph, out, files, options)
                else:
                    plain.round_to_nearest(graph, out, calibration)
                features, maps = _outputs(out, pictures)
                row |= asdict(compare_features(reference[0], features))
                row["map"] = asdict(compare_maps(reference[1], maps))
            except IqError as error:
                row["error"] = str(error)
            print(json.dumps(row), file=sys.stderr)
            rows.append(row)
    real, other = (_outputs(work / f"{model}.onnx", pictures) for model in ("real", "planted"))
    width = real[0].shape[1]
    return {
        "planting": planted.to_dict(),
        "crops": len(pictures),
        "calibration": len(calibration),
        "unchanged": {
            "features": _error(real[0], other[0][:, :width]), "map": _error(real[1], other[1]),
        },
        "rows": rows,
    }  # fmt: skip


def _error(exact: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The largest difference over the range."""
    return float(np.abs(exact - other).max() / np.ptp(exact))


def _outputs(
    graph: Path, pictures: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features `[count, width]` and maps `[count, side, side]`, kept beside the graph."""
    key = hashlib.sha256(pictures.tobytes() + sha256_file(graph).encode()).hexdigest()[:16]
    kept = graph.with_name(f"{key}.npz")
    if not kept.is_file():
        found = list(each(onnx.load(graph), [FEATURES, _MAP], pictures))
        features, maps = (np.concatenate(values) for values in zip(*found, strict=True))
        np.savez(kept, features=np.float32(features), maps=np.float32(maps[:, 0]))
    with np.load(kept) as loaded:
        return loaded["features"], loaded["maps"]


def _compile(graph: Path, out: Path, files: list[Path], options: argparse.Namespace) -> None:
    """What `iq-export compile` makes of the graph, with the pictures as a folder."""
    folder = out.parent / "calibration"
    folder.mkdir(exist_ok=True)
    for path in files:
        shutil.copyfile(path, folder / path.name)
    steps = out.parent / "preprocessor_config.json"
    steps.write_text(json.dumps(_PREPROCESSOR), encoding="utf-8")
    bundle = out.with_suffix("")
    command = [sys.executable, "-m", "iq_export.cli", "compile", str(graph), str(bundle),
               "--calibration", str(folder), "--preprocessor", str(steps), "--force",
               "--dtype", options.dtype, "--samples", str(len(files))]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise IqError((done.stderr.strip().splitlines() or ["it failed"])[-1])
    onnx.save(onnx.load(bundle / "model.onnx"), out)


if __name__ == "__main__":
    sys.exit(main())
