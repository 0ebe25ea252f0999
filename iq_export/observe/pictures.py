"""Pictures of a folder as windows: read, turned upright, made RGB, and put through a model's steps.

Pillow reads and resizes, numpy does the rest, so a device needs neither torch nor transformers.
The steps are those of transformers' own processors; tests compare them.
"""

from __future__ import annotations

import io
import math
import random
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from iq_export.errors import DataError, UsageError
from iq_export.files import read_named
from iq_export.observe.folder import files_below
from iq_export.observe.preprocessor import PictureSteps

if TYPE_CHECKING:
    from PIL.Image import Image

# Names of picture files -> Pillow's name of their format. No other is tried: some run programs.
_FORMATS = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF",
    ".tif": "TIFF", ".tiff": "TIFF", ".ppm": "PPM", ".pgm": "PPM",
}  # fmt: skip
_MAX_BYTES = 256 << 20
# A picture is 3 bytes a pixel in memory, and more while it is resized.
_MAX_PIXELS = 100_000_000
_DEEP = 8  # bits below the 8 that are kept of 16


def picture_files(folder: Path) -> list[Path]:
    """The picture files below `folder`, by their names. Raises DataError if there is none."""
    return files_below(folder, _FORMATS, "picture")


def load_pictures(
    folder: Path, steps: PictureSteps, *, count: int, seed: int
) -> list[NDArray[np.float32]]:
    """Pixels `[3, height, width]` of up to `count` pictures below `folder`, drawn by `seed`.

    Raises DataError if there is none, if one cannot be read, or if they come out in several sizes;
    UsageError for a count below 1.
    """
    if count < 1:
        raise UsageError(f"at least one picture is needed, not {count}")
    files = picture_files(folder)
    chosen = random.Random(seed).sample(files, min(count, len(files)))
    found: list[NDArray[np.float32]] = []
    for path in chosen:
        found.append(pixels(read_picture(path), steps, path))
        if found[-1].shape != found[0].shape:
            raise DataError(
                f"{path} becomes {_size(found[-1])} pixels and {chosen[0]} {_size(found[0])}: "
                "pictures must come out in one size, by a crop or a fixed height and width"
            )
    return found


def read_picture(path: Path) -> Image:
    """The picture in a file: upright, RGB, 8 bits a channel; what is transparent lies on white.

    Of several frames the first. Raises DataError if it is no picture, damaged or too large.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError("Pillow reads pictures: pip install 'iq-export[pictures]'") from error
    try:
        content = read_named(path, _MAX_BYTES, DataError)
    except FileNotFoundError as error:
        raise DataError(f"picture {path} does not exist") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are bounded here, and of odd metadata
            opened = Image.open(io.BytesIO(content), formats=sorted(set(_FORMATS.values())))
            if opened.width * opened.height > _MAX_PIXELS:
                raise Image.DecompressionBombError
            opened.load()
            return _rgb(ImageOps.exif_transpose(opened), path)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(
            f"picture {path} has more than {_MAX_PIXELS // 10**6} million pixels: give a smaller "
            "copy"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise DataError(
            f"picture {path} is no picture of a known format ({', '.join(_FORMATS)}): take it out "
            "of the folder"
        ) from error
    except Exception as error:  # readers raise what they come across
        said = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(f"picture {path} is damaged ({said}): take it out of the folder") from error


def pixels(picture: Image, steps: PictureSteps, path: Path) -> NDArray[np.float32]:
    """`[3, height, width]` of an RGB picture. Raises DataError if it is too narrow to be resized;
    path: its file, for the message."""
    if steps.resize is not None:
        height, width = _resized(picture.height, picture.width, steps.resize)
        if height * width > _MAX_PIXELS:
            raise DataError(
                f"picture {path} is {picture.width} x {picture.height}, which is too narrow: its "
                f"shorter edge resized to {steps.resize}, it has {width} x {height} pixels"
            )
        picture = picture.resize((width, height), resample=steps.resample)
    values = np.asarray(picture, np.uint8)
    if steps.crop is not None:
        values = _cropped(values, *steps.crop)
    scaled = (values.astype(np.float64) * steps.scale).astype(np.float32)
    mean, deviation = (np.asarray(v, np.float32) for v in (steps.mean, steps.deviation))
    return np.ascontiguousarray(((scaled - mean) / deviation).transpose(2, 0, 1))


def _resized(height: int, width: int, wanted: tuple[int, int] | int) -> tuple[int, int]:
    """`wanted`, or the size whose shorter edge that is, the longer one rounded down."""
    if not isinstance(wanted, int):
        return wanted
    longer = wanted * max(height, width) // min(height, width)
    return (longer, wanted) if width <= height else (wanted, longer)


def _cropped(values: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """`[height, width, 3]` around the centre of `values`, black beyond its edges."""
    for axis, size in enumerate((height, width)):
        has = values.shape[axis]
        if has < size:  # what transformers does: the odd pixel comes first
            before = math.ceil((size - has) / 2)
            around = [(0, 0)] * values.ndim
            around[axis] = (before, size - has - before)
            values = np.pad(values, around)
        else:
            start = (has - size) // 2
            values = np.take(values, range(start, start + size), axis=axis)
    return values


def _rgb(picture: Image, path: Path) -> Image:
    from PIL import Image

    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> _DEEP).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise DataError(
            f"picture {path} has values of 32 bits, whose white is not stated: give 8 or 16 bits"
        )
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _size(values: NDArray[np.float32]) -> str:
    return f"{values.shape[2]} x {values.shape[1]}"
