"""Pictures become what transformers' own processors make of them, or are refused in a sentence."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iq_export.errors import DataError, ModelError, UsageError
from iq_export.observe.pictures import load_pictures, picture_files, pixels, read_picture
from iq_export.observe.preprocessor import FILE, PictureSteps, SoundSteps, read_steps

PLAIN = PictureSteps((8, 8), 3, None, 1 / 255, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
SQUARE = {"size": {"height": 8, "width": 8}, "resample": 3}


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Edges, slopes and noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / a) + np.sign(np.cos(columns / b)) for a, b in rng.uniform(3, 40, (3, 2))]
    values = 128 + 45 * np.stack(waves, axis=-1) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def steps_of(folder: Path, config: dict[str, Any]) -> PictureSteps:
    (folder / FILE).write_text(json.dumps(config))
    steps = read_steps(folder)
    assert isinstance(steps, PictureSteps)
    return steps


@pytest.mark.parametrize("name", ["bit", "blip", "chinese_clip", "clip", "deit", "pvt", "siglip",
                                  "vit"])  # fmt: skip
def test_pixels_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """Also where the file leaves out all but the processor's name."""
    from importlib import import_module

    module = import_module(f"transformers.models.{name}.image_processing_pil_{name}")
    processor = getattr(module, module.__all__[0])()
    processor.save_pretrained(tmp_path)
    whole = read_steps(tmp_path)
    assert isinstance(whole, PictureSteps)
    kind = json.loads((tmp_path / FILE).read_text())["image_processor_type"]
    assert steps_of(tmp_path, {"image_processor_type": kind}) == whole
    for height, width in ((300, 460), (500, 333), (90, 120), (224, 224), (260, 999)):
        picture = photo(height, width)
        theirs = processor(picture, return_tensors="np")["pixel_values"][0]
        ours = pixels(picture, whole, tmp_path)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("old", [
    {"feature_extractor_type": "ViTFeatureExtractor", "size": 160, "resample": 2},
    {"feature_extractor_type": "CLIPFeatureExtractor", "size": 150, "crop_size": 140,
     "do_convert_rgb": True},
])  # fmt: skip
def test_sizes_of_older_files(tmp_path: Path, old: dict[str, Any]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    vit = old["feature_extractor_type"].startswith("ViT")
    processor = (ViTImageProcessorPil if vit else CLIPImageProcessorPil)(**old)
    theirs = processor(photo(200, 300), return_tensors="np")["pixel_values"][0]
    ours = pixels(photo(200, 300), steps_of(tmp_path, old), tmp_path)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_a_whole_processor_is_read_too(tmp_path: Path) -> None:
    inside = {"image_processor": {"image_processor_type": "SiglipImageProcessor"}}
    (tmp_path / "processor_config.json").write_text(json.dumps(inside))
    assert read_steps(tmp_path).resize == (224, 224)  # type: ignore[union-attr]


def test_a_file_without_a_type_does_what_it_states(tmp_path: Path) -> None:
    steps = steps_of(tmp_path, {**SQUARE, "image_mean": 0.5, "image_std": [0.1, 0.2, 0.4]})
    assert steps == PictureSteps((8, 8), 3, None, 1 / 255, (0.5,) * 3, (0.1, 0.2, 0.4))
    beside = tmp_path / "model.onnx"
    beside.touch()
    assert read_steps(beside) == read_steps(tmp_path) == read_steps(tmp_path / FILE) == steps


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"image_processor_type": "Qwen2VLImageProcessor"}, "'Qwen2VLImageProcessor' are not kno"),
        ({**SQUARE, "do_pad": True}, "asks for 'do_pad'"),
        ({**SQUARE, "patch_size": 14}, "asks for 'patch_size'"),
        ({"size": 224, "resample": 3}, "shortest_edge"),
        ({"size": {"longest_edge": 224}, "resample": 3}, "which is no size"),
        ({"size": {"height": 0, "width": 8}, "resample": 3}, "which is no size"),
        ({"size": {"height": 1 << 20, "width": 8}, "resample": 3}, "which is no size"),
        ({"size": {"height": 8, "width": 8}}, "not all of size, resample"),
        ({"do_resize": True}, "says nothing of 'size'"),
        ({**SQUARE, "resample": 9}, "resample is 9"),
        ({**SQUARE, "image_mean": [0, 0]}, "image_mean"),
        ({**SQUARE, "image_mean": 0.5}, "not all of image_mean, image_std"),
        ({**SQUARE, "image_mean": 0.5, "image_std": 0}, "must not be 0"),
        ({**SQUARE, "do_rescale": "yes"}, "neither true nor false"),
        ({**SQUARE, "crop_size": {"shortest_edge": 4}}, "crop_size"),
        ({"feature_extractor_type": "WhisperFeatureExtractor", "n_fft": 0}, "n_fft is 0"),
        ({"feature_extractor_type": "WhisperFeatureExtractor", "dither": 0.1}, "asks for 'dither'"),
        ({"feature_extractor_type": "Wav2Vec2FeatureExtractor"}, "not known"),
    ],
)
def test_what_a_file_cannot_say(tmp_path: Path, config: dict[str, Any], match: str) -> None:
    (tmp_path / FILE).write_text(json.dumps(config))
    with pytest.raises(ModelError, match=match) as error:
        read_steps(tmp_path)
    assert "\n" not in str(error.value) and FILE in str(error.value)


def test_nothing_is_guessed_of_a_model_without_the_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no preprocessor_config"):
        read_steps(tmp_path / "model.onnx")
    (tmp_path / FILE).write_text("[")
    with pytest.raises(ModelError, match="damaged"):
        read_steps(tmp_path)


def test_sound_is_told_from_pictures(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(
        json.dumps({"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 128})
    )
    assert read_steps(tmp_path) == SoundSteps(128, 16000, 30, 400, 160)


def _header(width: int, height: int) -> bytes:
    """A PNG that claims to be huge."""

    def chunk(name: bytes, data: bytes) -> bytes:
        whole = name + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    sizes = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", sizes) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def _truncated(path: Path) -> None:
    photo(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:-400])


@pytest.mark.parametrize(
    ("name", "make", "match"),
    [
        ("a.png", _truncated, "is damaged"),
        ("a.jpg", _truncated, "is damaged"),
        ("a.png", lambda path: path.write_bytes(b""), "is no picture"),
        ("a.jpg", lambda path: path.write_text("hello"), "is no picture"),
        ("a.png", lambda path: path.write_bytes(_header(20_000, 20_000)), "100 million"),
        ("a.png", lambda path: path.write_bytes(_header(10_100, 10_000)), "100 million"),
        ("a.tif", lambda path: Image.new("F", (4, 4)).save(path), "32 bits"),
        ("a.ppm", lambda path: path.write_bytes(b"P6 9 9 255\n"), "is damaged"),
    ],
)
def test_a_bad_picture_is_one_sentence(
    tmp_path: Path, name: str, make: Callable[[Path], object], match: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(DataError, match=match) as error:
        load_pictures(tmp_path, PLAIN, count=1, seed=0)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    picture, exif = photo(20, 30), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture.save(tmp_path / "a.png", exif=exif)
    turned = np.asarray(read_picture(tmp_path / "a.png"))
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(picture), -1))


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "1", "YCbCr"])
def test_other_colours_become_rgb(tmp_path: Path, mode: str) -> None:
    picture = photo(20, 20).convert(mode)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    picture.save(path)
    np.testing.assert_array_equal(
        np.asarray(read_picture(path)), np.asarray(picture.convert("RGB"))
    )


def test_16_bits_keep_their_upper_half(tmp_path: Path) -> None:
    values = np.arange(0, 1 << 16, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "a.png")
    found = np.asarray(read_picture(tmp_path / "a.png"))
    np.testing.assert_array_equal(found, np.repeat((values >> 8)[..., None], 3, axis=2))


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    picture.putpixel((0, 0), (10, 20, 30, 255))
    picture.save(tmp_path / "a.png")
    found = np.asarray(read_picture(tmp_path / "a.png"))
    assert found[0, 0].tolist() == [10, 20, 30] and found[1, 1].tolist() == [255, 255, 255]


def test_extreme_shapes(tmp_path: Path) -> None:
    """One pixel is a plain picture; a line becomes one too, unless its other side explodes."""
    edge = PictureSteps(224, 3, (224, 224), 1.0, (0.0,) * 3, (1.0,) * 3)
    dot = pixels(Image.new("RGB", (1, 1), (9, 8, 7)), edge, tmp_path)
    assert dot.shape == (3, 224, 224) and (dot == np.reshape([9, 8, 7], (3, 1, 1))).all()
    line = Image.new("RGB", (60_000, 1))
    assert pixels(line, PLAIN, tmp_path).shape == (3, 8, 8)
    with pytest.raises(DataError, match="too narrow"):
        pixels(line, edge, tmp_path)


def test_files_are_drawn_by_the_seed(tmp_path: Path) -> None:
    for number in range(6):
        folder = tmp_path / f"class {number % 2}"
        folder.mkdir(exist_ok=True)
        photo(16, 16, number).save(folder / f"{number}.PNG")
    (tmp_path / "README.txt").write_text("no picture")
    (tmp_path / ".hidden.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    assert len(picture_files(tmp_path)) == 6
    drawn = [load_pictures(tmp_path, PLAIN, count=3, seed=seed) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    assert len(load_pictures(tmp_path, PLAIN, count=99, seed=0)) == 6


def test_pictures_must_be_there_and_of_one_size(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no picture"):
        load_pictures(tmp_path, PLAIN, count=1, seed=0)
    with pytest.raises(DataError, match="is no folder"):
        load_pictures(tmp_path / "none", PLAIN, count=1, seed=0)
    for width in (16, 17):
        photo(16, width).save(tmp_path / f"{width}.png")
    with pytest.raises(UsageError):
        load_pictures(tmp_path, PLAIN, count=0, seed=0)
    with pytest.raises(DataError, match="in one size"):
        load_pictures(
            tmp_path, PictureSteps(None, 3, None, 1.0, (0.0,) * 3, (1.0,) * 3), count=2, seed=0
        )
